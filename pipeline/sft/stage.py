"""Supervised fine-tuning: new knowledge from documents, mixed with chats.

    redpen sft RECIPE --data FILE --run DIR
    torchrun --nproc-per-node 8 -m pipeline -- sft RECIPE --run DIR      with [[sft.data]] in the recipe

The examples of all steps, mixed by share, become a round of a cache, RUN/data.zarr, which is trained on with
cross-entropy. Everything else is `redpen train`: replay, packing, LoRA or all weights, several ranks, checkpoints,
the same bits after a kill. The adapter is the next stage's student (`student.adapter`), which continues training it.
"""

from __future__ import annotations

import contextlib
import hashlib
import os
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np

import cache_schema as cs
from pipeline.config import PromptsConfig, Recipe, TrainConfig
from pipeline.config.training import CLIPS, POLICY_GRADIENT
from pipeline.console import progress, warn
from pipeline.distributed.ranks import join_ranks
from pipeline.distributed.signals import graceful
from pipeline.errors import ConfigError, PromptError
from pipeline.models.identity import created_by
from pipeline.models.resolve import resolve
from pipeline.rounds.manifests import examples_round
from pipeline.runs.files import SFT_ROUND
from pipeline.sft.examples import FIELDS, Example, ExampleReader, mix
from pipeline.text.prompts import raw_rows
from pipeline.train import stage as train

#: A line of a data file: its place, for messages, and its value.
Line = tuple[str, Any]


def run(recipe: Recipe, data: Sequence[str], run_dir: str | os.PathLike[str]) -> int:
    """Fine-tune until done, from wherever an earlier call left off; returns the exit code of `train.stage.run`.

    Under torchrun every rank calls this.

    Args:
        data: files in place of `sft.data`, each as FILE or FILE=SHARE.

    Raises:
        RedpenError: a line is not an example (the message names file and line), or training fails.
        CacheError: the run's round holds different examples, or its disk is full.
    """
    recipe = _train_recipe(with_data(recipe, data))
    url = str(Path(run_dir) / SFT_ROUND)
    with join_ranks() as ranks:
        ranks.broadcast(lambda: _prepare_round(recipe, url))
    return train.run(recipe, url, run_dir)


def with_data(recipe: Recipe, data: Sequence[str]) -> Recipe:
    """The recipe with these files in place of `sft.data`. Raises `ConfigError` if there are no files at all."""
    settings = recipe.model_dump()
    if data:
        settings["sft"]["data"] = [_parse_data(text) for text in data]
    if not settings["sft"]["data"]:
        raise ConfigError("sft.data is not set: give --data FILE, or [[sft.data]] in the recipe")
    return Recipe.from_dict(settings, "sft", source=recipe.source)


def _parse_data(text: str) -> dict[str, Any]:
    """FILE or FILE=SHARE as an entry of `sft.data`."""
    path, equals, share = text.rpartition("=")
    with contextlib.suppress(ValueError):
        if equals:
            return {"path": path, "share": float(share)}
    return {"path": text}


def _train_recipe(recipe: Recipe) -> Recipe:
    """The recipe for `redpen train`: [train] with the values of [sft], without rewards and selection of rollouts."""
    sft, settings = recipe.sft, recipe.model_dump()
    if recipe.train.warmup_steps > sft.steps:
        raise ConfigError(
            f"train.warmup_steps = {recipe.train.warmup_steps} is more than sft.steps = {sft.steps}, so "
            "sft.learning_rate would never be reached; lower it, or raise sft.steps"
        )
    settings["train"] |= {name: getattr(TrainConfig(), name) for name in CLIPS + POLICY_GRADIENT}
    settings["train"] |= {
        "loss": "cross_entropy",
        "steps": sft.steps,
        "prompts_per_step": sft.examples_per_step,
        "learning_rate": sft.learning_rate,
    }
    if recipe.train.heldout_metric == "reverse_kl":
        settings["train"]["heldout_metric"] = None
    return Recipe.from_dict(settings | {"select": {}, "reward": {}}, "sft", source=recipe.source)


def _prepare_round(recipe: Recipe, url: str) -> None:
    """Write the round of examples, or what is missing of it. A complete one is kept without tokenizing anything."""
    files = [PromptsConfig(path=each.path, split=each.split) for each in recipe.sft.data]
    sources = [list(raw_rows(file, FIELDS, "sft.data")) for file in files]
    settings = recipe.sft.model_dump(exclude={"learning_rate"}) | {"seed": recipe.train.seed}
    provenance = {"data": settings, "sha256": _sha256(sources)}
    if _is_complete(url, provenance):
        return
    student = resolve(recipe.student)
    stop_ids = student.stop_token_ids(recipe.rollouts)
    max_tokens = min(recipe.sft.max_tokens, student.context or recipe.sft.max_tokens)
    examples = _examples(recipe, sources, ExampleReader(student.tokenizer, recipe.prompts, stop_ids, max_tokens))
    records = [example.record for example in examples]
    manifest = examples_round(
        recipe,
        student,
        records,
        max_prompt_tokens=max(len(example.prompt) for example in examples),
        max_response_tokens=max(len(example.response) for example in examples),
        data=provenance,
    )
    cache = cs.create(url, created_by=created_by())
    with cache.lock("redpen sft"), graceful() as stop, progress("examples", len(examples), "examples") as bar:
        round_ = cache.start_round(manifest, records, 0)
        for block in np.flatnonzero(~round_.rollouts.committed()).tolist():
            stop.check(f"{int(round_.rollouts.committed().sum())} of {round_.n_blocks} blocks are committed")
            numbers = manifest.block_prompts(block)
            round_.rollouts.write(block, _block([(number, examples[number]) for number in numbers], stop_ids))
            bar.advance(len(numbers))


def _sha256(sources: Sequence[Sequence[Line]]) -> str:
    """Digest of the lines of all files. Raises `PromptError` naming a line with values that JSON does not have."""
    digest = hashlib.sha256()
    for lines in sources:
        try:
            digest.update(cs.prompts_sha256([{"line": value} for _, value in lines]).encode())
        except (TypeError, ValueError, RecursionError):
            for place, value in lines:
                try:
                    cs.prompts_sha256([{"line": value}])
                except (TypeError, ValueError, RecursionError) as error:
                    raise PromptError(
                        f"{place}: expected text, numbers, lists and objects, as JSON has them ({str(error)[:100]})"
                    ) from None
            raise
    return digest.hexdigest()


def _is_complete(url: str, provenance: dict[str, Any]) -> bool:
    """Whether the round exists, from the same data; if from different data, `start_round` says what differs."""
    with contextlib.suppress(cs.NotACacheError):
        cache = cs.open(url)
        if cache.round_indices():
            round_ = cache.round(0)
            return round_.manifest.sampler_settings == provenance and bool(round_.rollouts.committed().all())
    return False


def _examples(recipe: Recipe, sources: Sequence[Sequence[Line]], reader: ExampleReader) -> list[Example]:
    """The examples of all steps, mixed by share; without shares, by the trained tokens of each file."""
    by_source = [_read(reader, each.path, lines) for each, lines in zip(recipe.sft.data, sources, strict=True)]
    reader.warn_without_effect(example for examples in by_source for example in examples)
    shares = [
        each.share if each.share is not None else float(sum(int(example.trained.sum()) for example in examples))
        for each, examples in zip(recipe.sft.data, by_source, strict=True)
    ]
    return mix(by_source, shares, recipe.sft.steps * recipe.sft.examples_per_step, recipe.train.seed)


def _read(reader: ExampleReader, path: str, lines: Sequence[Line]) -> list[Example]:
    """Every example of a file. Raises `PromptError` if it has none."""
    by_line = [reader.read(value, place, Path(path).stem) for place, value in lines]
    nothing = [value for (_, value), examples in zip(lines, by_line, strict=True) if not examples]
    if n_empty := sum(value.get("text") is not None for value in nothing):
        warn(f"{path}: {n_empty:,} of {len(lines):,} documents are empty, left out")
    if left_out := len(nothing) - n_empty:
        warn(f"{path}: {left_out:,} of {len(lines):,} chats are longer than {reader.max_tokens} tokens, left out")
    examples = [example for each in by_line for example in each]
    if not examples:
        raise PromptError(f"{path}: expected at least one example of at most {reader.max_tokens} tokens, found none")
    return examples


def _block(numbered: Sequence[tuple[int, Example]], stop_ids: Sequence[int]) -> cs.RolloutBlock:
    rows = [
        cs.RolloutRow(
            place,
            0,
            example.response,
            np.full(len(example.response), np.nan, np.float32),
            cs.FINISH_STOP if int(example.response[-1]) in stop_ids else cs.FINISH_OTHER,
            example.trained.astype(np.uint8),
        )
        for place, (_, example) in enumerate(numbered)
    ]
    return cs.RolloutBlock.from_rows([(number, example.prompt) for number, example in numbered], rows)
