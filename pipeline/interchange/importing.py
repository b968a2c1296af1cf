"""Import: finished rollouts in a file become a round of a cache, teacher log-probs in it a teacher's scores.

The file is Parquet or JSONL, one rollout a row, with these fields (their other names: `pipeline.interchange.rows`):

    prompt | messages    as in prompts files; with is_lightning_opd the prompt is rendered text, read as it is
    prompt_tokens        the prompt's ids, used instead of rendering it
    response_tokens      required, what the student sampled: text is never tokenised again
    rollout_logprobs     under the distribution that was sampled from; null: unknown
    teacher_log_probs    temperature 1; null: not scored
    loss_mask            0: not the student's own token, never trained
    finish_reason        stop, length or anything else; by default what the response's end says
    answer, source, id   as in prompts files
    prompt_index         equal prompts of different numbers are not put together

What the file does not tell stays unscored, never 0. It is read twice: first all of it is checked, and one bad row
refuses the file before anything is written; then each block is written as soon as its last row has come. The rows of
a prompt may lie anywhere, but those of a block that is not whole are in memory, 13 bytes a token: one block where
the rows of each prompt follow one another, at worst the file.

    redpen import FILE RECIPE --cache CACHE
"""

from __future__ import annotations

import hashlib
from collections import Counter, defaultdict
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
import numpy.typing as npt

import cache_schema as cs
from pipeline.config import Recipe, TeacherConfig
from pipeline.console import progress, say, show, suggest, warn
from pipeline.disk import bytes_per_token, require_free
from pipeline.distributed.signals import graceful
from pipeline.errors import ConfigError, PromptError, RedpenError
from pipeline.interchange.rows import Float32, Int32, Row, read_rows
from pipeline.models import load as models
from pipeline.models.identity import IMPORTED, created_by
from pipeline.text.prompts import check_record, render, template_identity

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase


def run(
    file: str, recipe: Recipe, cache_url: str, *, teacher: str | None = None, round_index: int | None = None
) -> int:
    """Bring the rollouts of `file`, sampled by the recipe's student, into a cache; returns the exit code 0.

    Args:
        teacher: the recipe's teacher whose log-probs the file holds; by default its only one.
        round_index: an existing round to complete, or the next number to start it; the latest by default.

    Raises:
        RedpenError: the file cannot be read, or a row of it is no rollout of this student; nothing was written then.
        CacheError: the cache holds something else, is locked, or its disk is too small.
    """
    settings, facts = recipe.rollouts, models.model_facts(recipe.student)
    tokenizer = models.load_tokenizer(recipe.student)
    reader = _Reader(
        Path(file),
        recipe,
        tokenizer,
        models.tokenizer_identity(tokenizer, recipe.student.model),
        models.stop_token_ids(recipe.student, tokenizer, settings),
        facts,
    )
    say(f"checking {file}")
    found = reader.survey()
    cfg = _teacher(recipe, teacher, file) if found.n_told or teacher is not None else None
    if cfg is not None and not found.n_told:
        raise RedpenError(
            f"{file}: expected teacher_log_probs of {cfg.name}, got none in any row; leave --teacher out"
        )
    with Path(file).open("rb") as stream:
        sha256 = hashlib.file_digest(stream, "sha256").hexdigest()
    manifest = cs.RoundManifest(
        student=models.model_identity(recipe.student),
        tokenizer=reader.tokenizer_identity,
        template=reader.template(found.renderings),
        stop_token_ids=reader.stop_ids,
        temperature=settings.temperature,
        top_p=settings.top_p,
        rollouts_per_prompt=max(Counter(found.prompt_of_row).values()),
        max_prompt_tokens=settings.max_prompt_tokens,
        max_response_tokens=settings.max_response_tokens,
        prompts_per_block=settings.prompts_per_block,
        seed=settings.seed,
        engine=IMPORTED,
        prompts_sha256=cs.prompts_sha256(found.records),
        n_prompts=len(found.records),
        vocab_size=facts.vocab_size,
        dtype=facts.dtype,
        sampler_settings={"file_sha256": sha256},
        created_by=created_by(),
    )
    n_tokens = sum(found.lengths)
    cache = cs.create(cache_url, created_by=created_by())
    with cache.lock("redpen import"):
        round_ = cache.start_round(manifest, found.records, round_index)
        pending = ~round_.rollouts.committed()
        scores = None
        if cfg is not None:
            scores = round_.start_scores(cfg.name, _scores_manifest(manifest, cfg, sha256))
            pending |= ~scores.committed()
        if pending.any():
            require_free(cache_url, n_tokens * (bytes_per_token(cs.ROLLOUT_ARRAYS) + 4), "the rollouts")
            _write(reader, found, round_, scores, pending)
    show(
        f"import: {len(found.lengths):,} rollouts of {len(found.records):,} prompts in {cache_url} round "
        f"{round_.index}, {n_tokens:,} tokens"
        + (f", {found.n_told:,} of them scored by {cfg.name}" if cfg is not None else "")
        + ("" if pending.any() else "; nothing to do")
    )
    suggest(f"redpen score RECIPE --cache {cache_url}")
    return 0


def _write(
    reader: _Reader,
    found: _Survey,
    round_: cs.Round,
    scores: cs.BlockGroup | None,
    pending: npt.NDArray[np.bool_],
) -> None:
    """Write the pending blocks, each when its last row has come."""
    per_block, total = round_.manifest.prompts_per_block, len(found.prompt_of_row)
    missing = Counter(prompt // per_block for prompt in found.prompt_of_row)
    waiting: dict[int, list[tuple[cs.RolloutRow, Float32]]] = defaultdict(list)
    samples: Counter[int] = Counter()
    done = sum(missing[block] for block in np.flatnonzero(~pending).tolist())
    with graceful() as stop, progress("import", total, "rollouts", done=done) as bar:
        for row, prompt in zip(read_rows(reader.path), found.prompt_of_row, strict=True):
            block, within = divmod(prompt, per_block)
            if not pending[block]:
                continue
            waiting[block].append(reader.response(row, within, samples[prompt]))
            samples[prompt] += 1
            if len(waiting[block]) < missing[block]:
                continue
            stop.check(f"{int(round_.rollouts.committed().sum())} of {round_.n_blocks} blocks are committed")
            rows = sorted(waiting.pop(block), key=lambda pair: (pair[0].prompt, pair[0].sample_index))
            prompts = [(index, found.prompts[index]) for index in round_.block_prompts(block)]
            rollouts = cs.RolloutBlock.from_rows(prompts, [row for row, _ in rows])
            if not round_.rollouts.is_committed(block):
                round_.rollouts.write(block, rollouts)
            if scores is not None:
                logprobs = np.concatenate([logprobs for _, logprobs in rows])
                scores.write(block, cs.ScoreBlock(logprobs=logprobs), rollouts=rollouts)
            bar.advance(len(rows))


def _teacher(recipe: Recipe, wanted: str | None, file: str) -> TeacherConfig:
    names = ", ".join(recipe.teacher_names)
    if wanted is None and len(recipe.teacher) > 1:
        raise ConfigError(f"{file} holds log-probs of a teacher: say with --teacher whose, one of {names}")
    for teacher in recipe.teacher:
        if wanted in (None, teacher.name):
            return teacher
    raise ConfigError(f"--teacher: expected one of {names}, got {wanted!r}")


def _scores_manifest(sampled: cs.RoundManifest, cfg: TeacherConfig, sha256: str) -> cs.ScoresManifest:
    """Log-probs that someone else computed: of the sampled tokens alone, and perhaps not of all."""
    return cs.ScoresManifest(
        role="teacher",
        model=cs.ModelIdentity(cfg.model, None, f"imported:{sha256[:32]}"),
        tokenizer=sampled.tokenizer,
        template=sampled.template,
        dtype="unknown",
        quantisation=None,
        engine=IMPORTED,
        tile_tokens=0,
        vocab_size=sampled.vocab_size,
        candidate_kind="topk",
        candidates=0,
        sampling_temperature=None,
        entropy=False,
        partial=True,
        created_by=created_by(),
    )


@dataclass
class _Survey:
    """What the first reading found: the prompts, each once, and of every row its prompt's number and its length."""

    records: list[dict[str, Any]] = field(default_factory=list)
    prompts: list[Int32] = field(default_factory=list)
    renderings: set[str] = field(default_factory=set)
    prompt_of_row: list[int] = field(default_factory=list)
    lengths: list[int] = field(default_factory=list)
    n_told: int = 0  # tokens with a teacher's log-prob


@dataclass(frozen=True)
class _Reader:
    """Rows of a file as rollouts of the recipe's student."""

    path: Path
    recipe: Recipe
    tokenizer: PreTrainedTokenizerBase
    tokenizer_identity: cs.TokenizerIdentity
    stop_ids: tuple[int, ...]
    facts: models.ModelFacts

    def survey(self) -> _Survey:
        """Check every row. Raises `RedpenError` naming the first bad one and how many there are."""
        found, numbers = _Survey(), dict[tuple[object, ...], int]()
        first_fault = ""
        n_rows = n_faults = n_unended = n_certain = 0
        for row in read_rows(self.path):
            n_rows += 1
            try:
                record = check_record(row.values, row.place)
                given = row.ids("prompt_tokens", max(self.facts.vocab_size, self.tokenizer_identity.vocab_size))
                rendered, prompt_index = row.get("rendered")[1] is True, str(row.get("prompt_index")[1])
                line = cs.encode_prompts([record])[0]
                key = (line, prompt_index, rendered, given if given is None else given.tobytes())
                if key not in numbers:
                    numbers[key] = len(numbers)
                    rendering, ids = self._prompt(row, record, rendered, given)
                    found.records.append(record)
                    found.prompts.append(ids)
                    found.renderings.add(rendering)
                rollout, teacher_logprobs = self.response(row)
            except RedpenError as fault:
                first_fault, n_faults = first_fault or str(fault), n_faults + 1
                continue
            found.prompt_of_row.append(numbers[key])
            found.lengths.append(len(teacher_logprobs))
            found.n_told += int(np.isfinite(teacher_logprobs).sum())
            n_unended += row.get("finish_reason")[1] == "stop" and rollout.finish_reason != cs.FINISH_STOP
            n_certain += len(teacher_logprobs) > 1 and not teacher_logprobs.any()
        if n_faults:
            raise RedpenError(f"{first_fault} ({n_faults} of {n_rows} rows are at fault; nothing was written)")
        if not n_rows:
            raise RedpenError(f"{self.path}: expected at least one rollout, the file holds none")
        self._check_lengths(found)
        if n_unended:
            warn(
                f"{n_unended} of {n_rows} rollouts finished by stop, but not with one of the stop ids "
                f"{', '.join(map(str, self.stop_ids))}: kept as finished otherwise (see rollouts.stop_token_ids)"
            )
        if n_certain:
            warn(
                f"{n_certain} of {n_rows} rollouts have teacher log-probs of 0 throughout, probability 1: if that is "
                "what fills in for missing ones, make it null"
            )
        return found

    def template(self, renderings: set[str]) -> dict[str, Any]:
        """How the prompts became tokens, for provenance."""
        if renderings == {"recipe"}:
            return template_identity(self.tokenizer, self.recipe.prompts)
        return {"kind": "none"} if renderings == {"text"} else {"kind": "imported"}

    def response(self, row: Row, prompt: int = 0, sample_index: int = 0) -> tuple[cs.RolloutRow, Float32]:
        """The row's rollout, with the teacher's log-probs of it, NaN where there are none. Raises `RedpenError`."""
        ids = row.ids("response_tokens", self.facts.vocab_size)
        if ids is None:
            raise row.fault(
                "response_tokens", "the ids that the student sampled", "none", "text is never tokenised again"
            )
        called, reason = row.get("finish_reason")
        if not isinstance(reason, str | None):
            raise row.fault(called, "stop, length or other text", type(reason).__name__, "leave it out if unknown")
        finish = cs.FINISH_OTHER
        if reason in ("stop", None) and int(ids[-1]) in self.stop_ids:
            finish = cs.FINISH_STOP
        elif reason == "length" or (reason is None and len(ids) == self.recipe.rollouts.max_response_tokens):
            finish = cs.FINISH_LENGTH
        rollout = cs.RolloutRow(
            prompt=prompt,
            sample_index=sample_index,
            token_ids=ids,
            logprobs=row.logprobs("rollout_logprobs", len(ids)),
            finish_reason=finish,
            trained=row.mask("trained", len(ids)),
        )
        return rollout, row.logprobs("teacher_logprobs", len(ids))

    def _prompt(self, row: Row, record: dict[str, Any], rendered: bool, given: Int32 | None) -> tuple[str, Int32]:
        """What made the prompt's ids, and they."""
        cfg = self.recipe.prompts
        if given is not None:
            return "ids", given
        text_ids: list[int] = []
        if "prompt" in record:
            text_ids = self.tokenizer(record["prompt"], add_special_tokens=False)["input_ids"]
        if rendered and text_ids:
            return "text", np.asarray(text_ids, np.int32)
        special = {i for i, token in self.tokenizer.added_tokens_decoder.items() if token.special} & set(text_ids)
        if special and template_identity(self.tokenizer, cfg)["kind"] == "chat":
            raise row.fault(
                "prompt",
                "text for the chat template",
                f"text that holds {self.tokenizer.decode([min(special)])}, so it went through one",
                'set prompts.template to "none"',
            )
        try:
            return "recipe", np.asarray(render(record, self.tokenizer, cfg), np.int32)
        except PromptError as error:
            raise RedpenError(f"{row.place}: {error}") from None

    def _check_lengths(self, found: _Survey) -> None:
        """Refuse rollouts beyond the recipe's limits or the student's context."""
        settings, responses = self.recipe.rollouts, np.array(found.lengths)
        prompts = np.array([len(ids) for ids in found.prompts])[found.prompt_of_row]
        both = prompts + responses
        for what, lengths, limit, remedy in (
            ("rollouts.max_prompt_tokens", prompts, settings.max_prompt_tokens, "set it to {} or "),
            ("rollouts.max_response_tokens", responses, settings.max_response_tokens, "set it to {} or "),
            ("the student's context", both, self.facts.context or int(both.max()), ""),
        ):
            over = np.flatnonzero(lengths > limit)
            if len(over):
                longest = int(lengths.max())
                raise RedpenError(
                    f"{self.path}: rollout {over[0] + 1}: {what}: expected at most {limit} tokens, got "
                    f"{lengths[over[0]]} ({len(over)} of {len(lengths)} rollouts are too long, the longest has "
                    f"{longest}); {remedy.format(longest)}remove them; nothing was written"
                )
