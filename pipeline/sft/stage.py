"""Supervised fine-tuning: new knowledge from documents, mixed with chats.

    redpen sft RECIPE --data FILE --run DIR
    torchrun --nproc-per-node 8 -m pipeline -- sft RECIPE --run DIR      with [[sft.data]] in the recipe

The examples of all steps, mixed by share, become a round of a cache, RUN/data.zarr, whose tokens are learnt by
cross-entropy. Everything else is `redpen train`: replay, packing, LoRA or all weights, many processes, checkpoints,
the same bits after a kill. The adapter is the next stage's student (`student.adapter`), which goes on training it.
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
from pipeline.config import PromptsConfig, Recipe, SftData, TrainConfig
from pipeline.console import progress, warn
from pipeline.distributed.ranks import join_ranks
from pipeline.distributed.signals import graceful
from pipeline.errors import ConfigError, PromptError
from pipeline.models import load as models
from pipeline.models.identity import DATA, created_by
from pipeline.sft.examples import FIELDS, Example, Reader, mixed
from pipeline.text.prompts import raw_rows, template_identity
from pipeline.train import stage as train

#: The round of examples, in the run's directory.
ROUND = "data.zarr"


def run(recipe: Recipe, data: Sequence[str], run_dir: str | os.PathLike[str]) -> int:
    """Fine-tune until done, from wherever an earlier call left off; the exit code of `train.stage.run`.

    Under torchrun every rank calls this.

    Args:
        data: files in place of `sft.data`, each as FILE or FILE=SHARE.

    Raises:
        RedpenError: a line is no example, names file and line; or what training raises.
        CacheError: the run's round holds other examples, or its disk is full.
    """
    recipe = _of_sft(recipe, data)
    url = str(Path(run_dir) / ROUND)
    with join_ranks() as ranks:
        ranks.broadcast(lambda: _write_round(recipe, url))
    return train.run(recipe, url, run_dir)


def with_data(recipe: Recipe, data: Sequence[str]) -> Recipe:
    """The recipe with these files in place of `sft.data`. Raises `ConfigError` where there are none."""
    told = recipe.model_dump()
    if data:
        told["sft"]["data"] = [_source(text) for text in data]
    if not told["sft"]["data"]:
        raise ConfigError("sft.data is not set: give --data FILE, or [[sft.data]] in the recipe")
    return Recipe.from_dict(told, "sft")


def _of_sft(recipe: Recipe, data: Sequence[str]) -> Recipe:
    """The recipe with what [sft] says in the place of [train]'s, and without what [select] leaves out of rollouts."""
    told = with_data(recipe, data).model_dump()
    sft = told["sft"]
    if recipe.train.warmup_steps > sft["steps"]:
        raise ConfigError(
            f"train.warmup_steps = {recipe.train.warmup_steps} is more than sft.steps = {sft['steps']}, so "
            "sft.learning_rate would never be reached; lower it, or raise sft.steps"
        )
    # what belongs to other losses stays behind
    belongs = ("advantage", "ratio_truncation", "ppo_clip", "behaviour_correction")
    told["train"] |= {name: getattr(TrainConfig(), name) for name in belongs}
    told["select"], told["reward"] = {}, {}
    if told["train"]["heldout_metric"] == "reverse_kl":
        told["train"]["heldout_metric"] = None
    told["train"] |= {
        "loss": "cross_entropy",
        "steps": sft["steps"],
        "prompts_per_step": sft["examples_per_step"],
        "learning_rate": sft["learning_rate"],
    }
    return Recipe.from_dict(told, "sft")


def _source(text: str) -> dict[str, Any]:
    path, equals, share = text.rpartition("=")
    try:
        return {"path": path, "share": float(share)} if equals else {"path": text}
    except ValueError:
        return {"path": text}


def _write_round(recipe: Recipe, url: str) -> None:
    """The round of examples, written whole or completed; nothing is tokenised where it is there already."""
    settings = recipe.sft.model_dump(exclude={"learning_rate"}) | {"seed": recipe.train.seed}
    lines = [list(raw_rows(_reading(source), FIELDS, "sft.data")) for source in recipe.sft.data]
    digest = hashlib.sha256()
    for source in lines:
        digest.update(_sha256(source).encode())
    made_of = {"data": settings, "sha256": digest.hexdigest()}
    if _is_there(url, made_of):
        return
    tokenizer, facts = models.load_tokenizer(recipe.student), models.model_facts(recipe.student)
    stop_ids = models.stop_token_ids(recipe.student, tokenizer, recipe.rollouts)
    longest = min(recipe.sft.max_tokens, facts.context or recipe.sft.max_tokens)
    reader = Reader(tokenizer, recipe.prompts, stop_ids, longest)
    sources = [_read(reader, source.path, found) for source, found in zip(recipe.sft.data, lines, strict=True)]
    reader.warn_without_effect(example for found in sources for example in found)
    shares = [source.share for source in recipe.sft.data]
    weights = [_n_learnt(examples) if s is None else s for examples, s in zip(sources, shares, strict=True)]
    count = recipe.sft.steps * recipe.sft.examples_per_step
    examples = mixed(sources, weights, count, recipe.train.seed)
    records = [example.record for example in examples]
    manifest = cs.RoundManifest(
        student=models.model_identity(recipe.student),
        tokenizer=models.tokenizer_identity(tokenizer, recipe.student.model),
        template=template_identity(tokenizer, recipe.prompts),
        stop_token_ids=stop_ids,
        temperature=1.0,
        top_p=1.0,
        rollouts_per_prompt=1,
        max_prompt_tokens=max(len(example.prompt) for example in examples),
        max_response_tokens=max(len(example.response) for example in examples),
        prompts_per_block=min(recipe.rollouts.prompts_per_block, count),
        seed=recipe.train.seed,
        engine=DATA,
        prompts_sha256=cs.prompts_sha256(records),
        n_prompts=count,
        vocab_size=facts.vocab_size,
        dtype=facts.dtype,
        sampler_settings=made_of,
        created_by=created_by(),
    )
    cache = cs.create(url, created_by=created_by())
    with cache.lock("redpen sft"), graceful() as stop, progress("examples", count, "examples") as bar:
        round_ = cache.start_round(manifest, records, 0)
        for block in np.flatnonzero(~round_.rollouts.committed()).tolist():
            stop.check(f"{int(round_.rollouts.committed().sum())} of {round_.n_blocks} blocks are committed")
            numbers = manifest.block_prompts(block)
            round_.rollouts.write(block, _block([(number, examples[number]) for number in numbers], stop_ids))
            bar.advance(len(numbers))


def _sha256(lines: Sequence[tuple[str, Any]]) -> str:
    """Digest of the lines of a file. Raises `PromptError` naming one that holds what JSON cannot."""
    try:
        return cs.prompts_sha256([{"line": value} for _, value in lines])
    except (TypeError, ValueError, RecursionError):
        for place, value in lines:
            try:
                cs.prompts_sha256([{"line": value}])
            except (TypeError, ValueError, RecursionError) as error:
                raise PromptError(
                    f"{place}: expected text, numbers, lists and objects, as JSON has them ({str(error)[:100]})"
                ) from None
        raise


def _is_there(url: str, made_of: dict[str, Any]) -> bool:
    """Whether the round is whole and was made of the same data; of others, `start_round` says what differs."""
    with contextlib.suppress(cs.NotACacheError):
        cache = cs.open(url)
        if cache.round_indices():
            round_ = cache.round(0)
            return round_.manifest.sampler_settings == made_of and bool(round_.rollouts.committed().all())
    return False


def _reading(source: SftData) -> PromptsConfig:
    return PromptsConfig(path=source.path, split=source.split)


def _read(reader: Reader, path: str, lines: Sequence[tuple[str, Any]]) -> list[Example]:
    """Every example of a file. Raises `PromptError` where there is none."""
    name = Path(path).stem
    found = [reader.read(value, place, name) for place, value in lines]
    if left_out := sum(not examples for examples in found):
        warn(f"{path}: {left_out:,} of {len(lines):,} chats are longer than {reader.max_tokens} tokens, left out")
    examples = [example for of_line in found for example in of_line]
    if not examples:
        raise PromptError(f"{path}: expected at least one example of at most {reader.max_tokens} tokens, found none")
    return examples


def _n_learnt(examples: Sequence[Example]) -> float:
    return float(sum(int(example.learnt.sum()) for example in examples))


def _block(numbered: Sequence[tuple[int, Example]], stop_ids: Sequence[int]) -> cs.RolloutBlock:
    rows = [
        cs.RolloutRow(
            place,
            0,
            example.response,
            np.full(len(example.response), np.nan, np.float32),
            cs.FINISH_STOP if int(example.response[-1]) in stop_ids else cs.FINISH_OTHER,
            example.learnt.astype(np.uint8),
        )
        for place, (_, example) in enumerate(numbered)
    ]
    return cs.RolloutBlock.from_rows([(number, example.prompt) for number, example in numbered], rows)
