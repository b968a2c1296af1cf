"""Import: finished rollouts of a file become a round of a cache, and teacher log-probs in it a teacher's scores.

The file is Parquet or JSONL, one rollout a row, with these fields (their other names: `pipeline.interchange.rows`):

    prompt | messages    as in prompts files; with is_lightning_opd the prompt is rendered text, tokenized unchanged
    prompt_tokens        the prompt's ids, used instead of rendering it
    response_tokens      the ids that the student sampled: text of a response is never tokenized again. Without them
                         messages that hold assistant turns are a finished conversation, see below
    rollout_logprobs     of the distribution that was sampled from; null: unknown
    teacher_log_probs    temperature 1; null: not scored
    loss_mask            0: a token that the student did not sample, never trained
    finish_reason        stop, length or anything else; by default derived from the response's last token
    answer, source, id   as in prompts files; so are columns that a teacher's text is made of
    prompt_index         equal prompts of different numbers are not put together

A finished conversation, with tool calls or without: what precedes the first assistant turn is the prompt, the rest up
to the end of the last one the response, and the assistant turns are trained. The recipe's chat template must show
which tokens these are (`pipeline.text.assistant_turns`); if it does not, the row is refused.

Lines of the `traces.jsonl` of verifiers become rows of either kind (`pipeline.interchange.verifiers_traces`).

Values that the file lacks are recorded as missing, never as 0. The file is read twice: the first pass checks all of
it, so that nothing is written if a row is wrong; the second writes each block after its last row. The rows of a
prompt may be anywhere, but those of incomplete blocks are held in memory, 13 bytes a token: one block if the rows of
each prompt follow one another, the whole file at worst.

An unchanged export of `redpen export-cache` is restored instead (`pipeline.interchange.restoring`), scores included.

    redpen import FILE RECIPE --cache CACHE
"""

from __future__ import annotations

import hashlib
from collections import Counter, defaultdict
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt

import cache_schema as cs
from pipeline.config import Recipe, TeacherConfig
from pipeline.console import progress, say, show, suggest, warn
from pipeline.disk import bytes_per_token, require_free
from pipeline.distributed.signals import graceful
from pipeline.errors import ConfigError, PromptError, RedpenError
from pipeline.interchange.conversations import RECORD_IDS, FinishedChat, finished_chat, turn_rows
from pipeline.interchange.restoring import ChangedError, Export, restore
from pipeline.interchange.rows import FileRow, Float32, Int32, exported_scorers, read_rows
from pipeline.models.identity import created_by
from pipeline.models.resolve import ResolvedModel, resolve
from pipeline.rounds.manifests import imported_round, imported_scores
from pipeline.text.assistant_turns import ConversationTokens, Turns
from pipeline.text.records import check_record
from pipeline.text.rendering import TooLongError, check_length, render, template_identity, uses_chat
from pipeline.text.teacher_prompt import kept_columns
from pipeline.text.template_effect import N_CHATS, warn_without_effect


def run(
    file: str, recipe: Recipe, cache_url: str, *, teacher: str | None = None, round_index: int | None = None
) -> int:
    """Import the rollouts of `file`, sampled by the recipe's student, into a cache; returns the exit code 0.

    Args:
        teacher: the recipe's teacher whose log-probs the file holds; by default its only one.
        round_index: an existing round to complete, or the next number to start it; the latest by default.

    Raises:
        RedpenError: the file cannot be read, or a row is not a rollout of this student; nothing is written then.
        CacheError: the cache holds another round, is locked, or its disk is too small.
    """
    student = resolve(recipe.student)
    why_not = ""
    if teacher is None and (export := Export.of(Path(file))) is not None:
        try:
            return restore(export, export.check(student), cache_url, round_index)
        except ChangedError as changed:
            why_not = f": {changed}, so it is imported like any other file"
    reader = RolloutReader(Path(file), recipe, student, student.stop_token_ids(recipe.rollouts))
    say(f"checking {file}")
    found = reader.survey()
    if found.left_out:
        names = ", ".join(found.left_out)
        warn(f"{file}: the scores of {names} are left out; `redpen score` makes them again{why_not}")
    cfg = _teacher(recipe, teacher, file) if found.n_scored or teacher is not None else None
    if cfg is not None and not found.n_scored:
        raise RedpenError(
            f"{file}: expected teacher_log_probs of {cfg.name}, got none in any row; leave --teacher out"
        )
    with Path(file).open("rb") as stream:
        sha256 = hashlib.file_digest(stream, "sha256").hexdigest()
    manifest = imported_round(
        recipe,
        student,
        found.records,
        template=reader.template(found.renderings),
        rollouts_per_prompt=max(Counter(found.prompt_of_row).values()),
        file_sha256=sha256,
    )
    n_tokens = sum(found.lengths)
    cache = cs.create(cache_url, created_by=created_by())
    with cache.lock("redpen import"):
        round_ = cache.start_round(manifest, found.records, round_index)
        pending = ~round_.rollouts.committed()
        scores = None
        if cfg is not None:
            scores = round_.start_scores(cfg.name, imported_scores(manifest, cfg, sha256))
            pending |= ~scores.committed()
        if pending.any():
            require_free(cache_url, n_tokens * (bytes_per_token(cs.ROLLOUT_ARRAYS) + 4), "the rollouts")
            _write(reader, found, round_, scores, pending)
    show(
        f"import: {len(found.lengths):,} rollouts of {len(found.records):,} prompts in {cache_url} round "
        f"{round_.index}, {n_tokens:,} tokens"
        + (f", {found.n_trained:,} of them trained" if found.n_trained < n_tokens else "")
        + (f", {found.n_scored:,} of them scored by {cfg.name}" if cfg is not None else "")
        + ("" if pending.any() else "; nothing to do")
    )
    suggest(f"redpen score RECIPE --cache {cache_url}")
    return 0


def _write(
    reader: RolloutReader,
    found: FileSurvey,
    round_: cs.Round,
    scores: cs.BlockGroup[cs.ScoresManifest] | None,
    pending: npt.NDArray[np.bool_],
) -> None:
    """Write the pending blocks, each after its last row."""
    per_block, total = round_.manifest.prompts_per_block, len(found.prompt_of_row)
    missing = Counter(prompt // per_block for prompt in found.prompt_of_row)
    waiting: dict[int, list[tuple[cs.RolloutRow, Float32]]] = defaultdict(list)
    samples: Counter[int] = Counter()
    done = sum(missing[block] for block in np.flatnonzero(~pending).tolist())
    with graceful() as stop, progress("import", total, "rollouts", done=done) as bar:
        for row, prompt, turns in zip(reader.rows(found), found.prompt_of_row, found.turns, strict=True):
            block, within = divmod(prompt, per_block)
            if not pending[block]:
                continue
            finished = finished_chat(row)
            chat = None if finished is None else reader.tokens(finished, turns)
            waiting[block].append(reader.response(row, within, samples[prompt], chat))
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
        raise ConfigError(f"{file} holds log-probs of a teacher: name the teacher with --teacher, one of {names}")
    for teacher in recipe.teacher:
        if wanted in (None, teacher.name):
            return teacher
    raise ConfigError(f"--teacher: expected one of {names}, got {wanted!r}")


@dataclass
class FileSurvey:
    """What the first pass found: the prompts, each once, and the prompt number and length of every row."""

    records: list[dict[str, Any]] = field(default_factory=list)
    prompts: list[Int32] = field(default_factory=list)
    renderings: set[str] = field(default_factory=set)
    prompt_of_row: list[int] = field(default_factory=list)
    lengths: list[int] = field(default_factory=list)
    by_turn: list[bool] = field(default_factory=list)  # of every branch or line: whether its turns are rows
    turns: list[Turns | None] = field(default_factory=list)  # of every row that is a conversation
    n_trained: int = 0  # tokens that the student wrote
    n_scored: int = 0  # tokens with a teacher's log-prob
    chats: list[tuple[list[dict[str, Any]], list[Any] | None]] = field(default_factory=list)  # the first, with tools
    left_out: list[str] = field(default_factory=list)  # scorers of an export, whose columns are not read


@dataclass(frozen=True)
class RolloutReader:
    """Reads the rows of a file as rollouts of the recipe's student."""

    path: Path
    recipe: Recipe
    student: ResolvedModel
    stop_ids: tuple[int, ...]

    def survey(self) -> FileSurvey:
        """Check every row. Raises `RedpenError` naming the first bad one and how many there are."""
        found, numbers = FileSurvey(), dict[tuple[object, ...], int]()
        n_ids = max(self.student.vocab_size, self.student.tokenizer_identity.vocab_size)
        first_fault = ""
        n_rows = n_faults = n_unended = n_certain = n_open = n_longer = n_retokenized = n_no_temperature = 0
        columns = kept_columns(self.recipe)
        left_out = Counter[str]()
        for row in self._first_read(found, columns, left_out):
            n_rows += 1
            found.left_out = found.left_out or exported_scorers(row.values)
            try:
                self._check_sampling(row)
                finished = finished_chat(row, columns)
                record = check_record(row.values, row.place, columns) if finished is None else finished.record
                given = row.ids("prompt_tokens", n_ids)
                rendered, prompt_index = row.get("rendered")[1] is True, str(row.get("prompt_index")[1])
                line = cs.encode_prompts([record])[0]
                key = (line, prompt_index, rendered, given if given is None else given.tobytes())
                if key not in numbers:
                    rendering, ids = self._prompt(row, record, rendered, given)
                    numbers[key] = len(numbers)
                    found.records.append(record)
                    found.prompts.append(ids)
                    found.renderings.add(rendering)
                chat = None if finished is None else self.tokens(finished)
                rollout, teacher_logprobs = self.response(row, chat=chat)
            except RedpenError as fault:
                first_fault, n_faults = first_fault or str(fault), n_faults + 1
                continue
            found.prompt_of_row.append(numbers[key])
            found.turns.append(None if chat is None else chat.turns)
            found.lengths.append(len(teacher_logprobs))
            found.n_trained += int(np.asarray(rollout.trained).sum())
            found.n_scored += int(np.isfinite(teacher_logprobs).sum())
            is_unended = rollout.finish_reason != cs.FINISH_STOP
            if finished is None:
                n_unended += row.get("finish_reason")[1] == "stop" and is_unended
            else:
                n_open, n_longer = n_open + is_unended, n_longer + finished.is_longer
                n_retokenized += 0 if chat is None else finished.n_retokenized(chat.turns)
                if len(found.chats) < N_CHATS:
                    found.chats.append((finished.messages[:-1], record.get("tools")))
            n_no_temperature += row.sampled is not None and "temperature" not in dict(row.sampled.settings)
            n_certain += len(teacher_logprobs) > 1 and not teacher_logprobs.any()
        if n_faults:
            raise RedpenError(f"{first_fault} ({n_faults} of {n_rows} rows are at fault; nothing was written)")
        of_traces = "; ".join(f"{reason}: {n}" for reason, n in sorted(left_out.items()))
        if not n_rows:
            raise RedpenError(
                f"{self.path}: expected at least one rollout, the file holds none"
                + (f" (left out: {of_traces})" if of_traces else "")
            )
        if of_traces:
            warn(f"{self.path}: left out: {of_traces}")
        self._check_lengths(found)
        if found.chats:
            warn_without_effect(found.chats, self.student.tokenizer, self.recipe.prompts)
        stop_ids = ", ".join(map(str, self.stop_ids))
        if n_unended:
            warn(
                f"{n_unended} of {n_rows} rollouts have finish_reason stop, but do not end with one of the stop ids "
                f"{stop_ids}; they are imported with finish_reason other (see rollouts.stop_token_ids)"
            )
        if n_open:
            warn(
                f"{n_open} conversations, as the chat template writes them, do not end with one of the stop ids "
                f"{stop_ids}, so the student does not learn where to stop; set rollouts.stop_token_ids to the token "
                "that ends a turn"
            )
        if n_longer:
            warn(f"{n_longer} conversations have messages after the last assistant turn, which are left out")
        if n_by_turn := sum(found.by_turn):
            warn(
                f"{n_by_turn} conversations are imported turn by turn, each with all before it as its prompt: the "
                "chat template writes earlier turns in another way"
            )
        if n_no_temperature:
            warn(
                f"{n_no_temperature} of {n_rows} rollouts record no temperature; they are taken to be sampled at "
                f"rollouts.temperature, {self.recipe.rollouts.temperature:g} (vf-eval --sampling.temperature)"
            )
        if n_retokenized:
            warn(
                f"{n_retokenized} turns have another number of tokens than the server counted, so these are not the "
                f"tokens that the student sampled; {RECORD_IDS}"
            )
        if n_certain:
            warn(
                f"{n_certain} of {n_rows} rollouts have teacher log-probs of 0 throughout, probability 1; if 0 "
                "stands for missing values, write null instead"
            )
        return found

    def rows(self, found: FileSurvey) -> Iterator[FileRow]:
        """The rows again, as `survey` had them."""
        for row, is_by_turn in zip(read_rows(self.path), found.by_turn, strict=True):
            yield from turn_rows(row) if is_by_turn else (row,)

    def _first_read(self, found: FileSurvey, columns: Sequence[str], left_out: Counter[str]) -> Iterator[FileRow]:
        """The rows, traces turn by turn where the chat template changes earlier turns."""
        for row in read_rows(self.path, columns, left_out):
            found.by_turn.append(self._is_by_turn(row, columns))
            if row.sampled is None or not found.by_turn[-1]:
                yield row
                continue
            rows = turn_rows(row)
            if n_empty := len(row.sampled.counts) - len(rows):
                left_out["empty turns, without token ids"] += n_empty
            yield from rows

    def _is_by_turn(self, row: FileRow, columns: Sequence[str]) -> bool:
        if row.sampled is None:
            return False
        try:
            finished = finished_chat(row, columns)
        except RedpenError:  # as for any row
            return False
        return finished is not None and finished.is_rewritten(self.recipe, self.student.tokenizer, self.stop_ids)

    def template(self, renderings: set[str]) -> dict[str, Any]:
        """How the prompts became tokens, for provenance."""
        if renderings == {"recipe"}:
            return template_identity(self.student.tokenizer, self.recipe.prompts)
        return {"kind": "none"} if renderings == {"text"} else {"kind": "imported"}

    def tokens(self, chat: FinishedChat, turns: Turns | None = None) -> ConversationTokens:
        """See `FinishedChat.tokens`."""
        return chat.tokens(self.recipe, self.student.tokenizer, self.stop_ids, turns)

    def response(
        self, row: FileRow, prompt: int = 0, sample_index: int = 0, chat: ConversationTokens | None = None
    ) -> tuple[cs.RolloutRow, Float32]:
        """The row's rollout and its teacher log-probs, NaN where they are missing; `chat` is the row's conversation.

        Raises `RedpenError`.
        """
        called, reason = row.get("finish_reason")
        if not isinstance(reason, str | None):
            raise row.fault(called, "stop, length or other text", type(reason).__name__, "leave it out if unknown")
        if chat is not None:
            span = slice(chat.turns[0][0], chat.turns[-1][1])
            ids, trained, reason = chat.ids[span], chat.trained[span].astype(np.uint8), "stop"
        else:
            given = row.ids("response_tokens", self.student.vocab_size)
            if given is None:
                raise row.fault(
                    "response_tokens",
                    "the ids that the student sampled, or messages with the assistant's turns",
                    "neither",
                    "text is never tokenized again",
                )
            ids, trained = given, row.mask("trained", len(given))
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
            trained=trained,
        )
        return rollout, row.logprobs("teacher_logprobs", len(ids))

    def _prompt(self, row: FileRow, record: dict[str, Any], rendered: bool, given: Int32 | None) -> tuple[str, Int32]:
        """What made the prompt's ids ("ids", "text" or "recipe"), and the ids."""
        if given is not None:
            return "ids", given
        try:
            return self._rendered(row, record, rendered)
        except TooLongError as error:
            raise RedpenError(
                f"{row.place}: prompt: {error}; remove it, or set rollouts.max_prompt_tokens higher"
            ) from None
        except PromptError as error:
            raise RedpenError(f"{row.place}: {error}") from None

    def _rendered(self, row: FileRow, record: dict[str, Any], rendered: bool) -> tuple[str, Int32]:
        cfg, tokenizer, limit = self.recipe.prompts, self.student.tokenizer, self.recipe.rollouts.max_prompt_tokens
        text_ids: list[int] = []
        if "prompt" in record:
            check_length(record["prompt"], tokenizer, limit)
            text_ids = tokenizer(record["prompt"], add_special_tokens=False)["input_ids"]
        if rendered and text_ids:
            return "text", np.asarray(text_ids, np.int32)
        special = {i for i, token in tokenizer.added_tokens_decoder.items() if token.special} & set(text_ids)
        if special and uses_chat(tokenizer, cfg):
            raise row.fault(
                "prompt",
                "text for the chat template",
                f"text that holds {tokenizer.decode([min(special)])}, so it went through one",
                'set prompts.template to "none"',
            )
        return "recipe", np.asarray(render(record, tokenizer, cfg, limit), np.int32)

    def _check_sampling(self, row: FileRow) -> None:
        """Refuse a trace that was sampled with other settings than the recipe's, which describe the round."""
        for name, value in () if row.sampled is None else sorted(row.sampled.settings):
            expected = getattr(self.recipe.rollouts, name)
            if value != expected:
                raise RedpenError(
                    f"{row.place}: {name}: expected {expected:g}, as rollouts.{name}, got {value:g}; set "
                    f"rollouts.{name} to it"
                )

    def _check_lengths(self, found: FileSurvey) -> None:
        """Refuse rollouts beyond the recipe's limits or the student's context."""
        settings, responses = self.recipe.rollouts, np.array(found.lengths)
        prompts = np.array([len(ids) for ids in found.prompts])[found.prompt_of_row]
        both = prompts + responses
        for what, lengths, limit, remedy in (
            ("rollouts.max_prompt_tokens", prompts, settings.max_prompt_tokens, "set it to {} or "),
            ("rollouts.max_response_tokens", responses, settings.max_response_tokens, "set it to {} or "),
            ("the student's context", both, self.student.context or int(both.max()), ""),
        ):
            over = np.flatnonzero(lengths > limit)
            if len(over):
                longest = int(lengths.max())
                raise RedpenError(
                    f"{self.path}: rollout {over[0] + 1}: {what}: expected at most {limit} tokens, got "
                    f"{lengths[over[0]]} ({len(over)} of {len(lengths)} rollouts are too long, the longest has "
                    f"{longest}); {remedy.format(longest)}remove them; nothing was written"
                )
