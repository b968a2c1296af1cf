"""Where a round's rollouts and scores come from, as pairs of text."""

from __future__ import annotations

from typing import Any

import cache_schema as cs
from pipeline.credentials import mask


def facts(round_: cs.Round) -> list[list[str]]:
    """What the manifests of a round and of its scores say, in the order of the work."""
    made, tokenizer = round_.manifest, round_.manifest.tokenizer
    told: list[tuple[str, Any]] = [
        ("cache", f"{round_.cache.url}, round {round_.index}"),
        ("made by", made.created_by),
        ("student", _model(made.student)),
        ("student dtype", made.dtype),
        ("tokenizer", f"{tokenizer.name}, digest {tokenizer.digest}, {tokenizer.vocab_size:,} tokens"),
        ("template", _settings(made.template)),
        ("prompts", f"{made.n_prompts:,}, SHA-256 {made.prompts_sha256}"),
        ("rollouts a prompt", made.rollouts_per_prompt),
        ("sampler", made.engine),
        ("sampler settings", _settings(made.sampler_settings)),
        ("temperature", f"{made.temperature:g}"),
        ("top-p", f"{made.top_p:g}"),
        ("seed", made.seed),
        ("most tokens", f"{made.max_prompt_tokens:,} of a prompt, {made.max_response_tokens:,} of a response"),
        ("stop tokens", ", ".join(map(str, made.stop_token_ids))),
    ]
    for name in round_.scorer_names():
        scores = round_.scores(name)
        told += _scorer(name, scores)
    return [[name, mask(str(value))] for name, value in told if value not in ("", None)]


def model_label(model: cs.ModelIdentity) -> str:
    """A model's name, and that it has an adapter."""
    return mask(f"{model.name} + adapter" if model.adapter_digest else model.name)


def _scorer(name: str, scores: cs.BlockGroup) -> list[tuple[str, Any]]:
    made = scores.manifest
    assert isinstance(made, cs.ScoresManifest)
    kept = f"{made.candidates} {'sampled' if made.candidate_kind == 'sampled' else 'likeliest'} of the student"
    if made.candidates == 0:
        kept = "none, only the token itself"
    if made.topk:
        kept += f", and the teacher's own {made.topk} likeliest"
    quantised = f", quantised to {made.quantisation}" if made.quantisation else ""
    return [
        (f"{name}: model", _model(made.model)),
        (f"{name}: read by", f"{made.engine} in {made.dtype}{quantised}"),
        (f"{name}: candidates", kept),
        (f"{name}: not all told", "values may be missing" if made.partial else None),
        (f"{name}: blocks", f"{int(scores.committed().sum()):,} of {scores.n_blocks:,}"),
        (f"{name}: made by", made.created_by),
    ]


def _model(model: cs.ModelIdentity) -> str:
    revision = f", revision {model.revision}" if model.revision else ""
    adapter = f", adapter {model.adapter_digest}" if model.adapter_digest else ""
    return f"{model.name}{revision}, digest {model.digest}{adapter}"


def _settings(values: dict[str, Any]) -> str:
    return ", ".join(f"{key} {value}" for key, value in values.items())
