"""Teachers with other token ids or prompts than the student: their inputs, and their scores in the student's ids.

The student's token v is the teacher's token a(v) if both have the same text: a sparse matrix with at most one 1 in
each row and column. So log p_T(v | x) = log p_T(a(v) | a(x)), for the sampled token, candidates and the teacher's
likeliest alike, and the rest stays the rest: nothing is approximated. A token that one of them lacks is in the rest.

This holds if both tokenizers split text in the same way, which `align` checks from their rules: merges (BPE), scored
pieces (Unigram) or words. Their ids may still differ by padding, permutation and added tokens.

A teacher may also have other prompts (another template, a system message, or a solution that the student does not
get); the response's tokens are the same.
"""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, replace
from typing import TYPE_CHECKING, Any

import numpy as np
import numpy.typing as npt

import cache_schema as cs
from pipeline.config import Recipe, TeacherConfig
from pipeline.engines.scoring import Scorer, TokenBatch, as_batch
from pipeline.errors import ModelError
from pipeline.models.resolve import ResolvedModel, resolve
from pipeline.teachers.prompts import has_own_prompts, settings_of, teacher_prompts
from pipeline.teachers.spans import SpanView, span_view
from pipeline.text.teacher_prompt import MissingColumnError

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

Int32 = npt.NDArray[np.int32]


@dataclass(frozen=True)
class Alignment:
    """The teacher's id of each of the student's tokens, and the other way round.

    Attributes:
        to_teacher: i4 [V_student]; -1 if the teacher has no such token.
        to_student: i4 [V_teacher]; -1 likewise.
    """

    to_teacher: Int32
    to_student: Int32

    @classmethod
    def of(cls, pairs: Mapping[int, int], student_size: int, teacher_size: int) -> Alignment:
        """From the teacher's id by the student's."""
        found = cls(np.full(student_size, -1, np.int32), np.full(teacher_size, -1, np.int32))
        ours, theirs = (np.fromiter(ids, np.int64, len(pairs)) for ids in (pairs.keys(), pairs.values()))
        found.to_teacher[ours], found.to_student[theirs] = theirs, ours
        return found

    def is_identity(self, student: PreTrainedTokenizerBase) -> bool:
        """Whether the teacher has every token of the student's tokenizer, with the same id."""
        n_known = max(student.get_vocab().values()) + 1
        return bool((self.to_teacher[:n_known] == np.arange(n_known)).all())

    def exchanged(self, student_id: int, teacher_id: int) -> Alignment:
        """The same, but one token of the student is now `teacher_id`; the token that had it gets the old id."""
        ours, theirs = self.to_teacher.copy(), self.to_student.copy()
        before, other = int(ours[student_id]), int(theirs[teacher_id])
        ours[student_id], theirs[teacher_id] = teacher_id, student_id
        if other >= 0:
            ours[other] = before
        if before >= 0:
            theirs[before] = other
        return Alignment(ours, theirs)


@dataclass(frozen=True)
class View:
    """A teacher's input in place of the student's tokens.

    Attributes:
        prompts: its token ids of every prompt of the round; None: the student's.
        alignment: its ids of the student's tokens; None: the same.
        shared: [V_teacher] which of its tokens the student has too; None: all.
        made_of: what its prompts are made of, see `TeacherPrompts`.
    """

    prompts: Sequence[Int32] | None = None
    alignment: Alignment | None = None
    shared: npt.NDArray[np.bool_] | None = None
    made_of: dict[str, Any] = field(default_factory=dict)

    def scorer(self, scorer: Scorer) -> Scorer:
        """The same scorer, for batches and scores in the student's ids."""
        return scorer if self.prompts is None and self.alignment is None else _AlignedScorer(scorer, self)

    def lacks_tokens(self, n_tokens: int) -> bool:
        """Whether the teacher lacks a token of the student's below this id."""
        return self.alignment is not None and bool((self.alignment.to_teacher[:n_tokens] < 0).any())

    def of(self, batch: TokenBatch) -> TokenBatch:
        """The batch in the teacher's ids.

        A candidate that the teacher lacks becomes the sampled token again, which takes nothing from the rest.
        """
        blocks = tuple(self._block(block) for block in batch.blocks)
        ids = batch.candidate_ids
        if ids is not None and self.alignment is not None:
            theirs = self.alignment.to_teacher[ids]
            ids = np.where(theirs < 0, theirs[:, :1], theirs)
        return replace(batch, blocks=blocks, candidate_ids=ids)

    def back(self, scores: cs.ScoreBlock, batch: TokenBatch) -> cs.ScoreBlock:
        """The teacher's scores of `batch`, in the student's ids; NaN at candidates that it lacks."""
        if self.alignment is None:
            return scores
        if batch.candidate_ids is not None and scores.candidate_logprobs is not None:
            lacking = self.alignment.to_teacher[batch.candidate_ids] < 0
            scores = replace(
                scores, candidate_logprobs=np.where(lacking, np.float32(np.nan), scores.candidate_logprobs)
            )
        if scores.topk_ids is not None:
            scores = replace(scores, topk_ids=self.alignment.to_student[scores.topk_ids])
        return scores

    def _block(self, block: cs.RolloutBlock) -> cs.RolloutBlock:
        if self.alignment is not None:
            block = replace(
                block,
                token_ids=self._ids(block.token_ids, "a response"),
                prompt_token_ids=block.prompt_token_ids
                if self.prompts is not None
                else self._ids(block.prompt_token_ids, "a prompt"),
            )
        if self.prompts is not None:
            prompts = [self.prompts[index] for index in block.prompt_index]
            lengths = np.array([len(ids) for ids in prompts], np.int32)
            starts = (np.cumsum(lengths) - lengths).astype(np.int32)
            joined = np.concatenate(prompts).astype(np.int32)
            block = replace(block, prompt_token_ids=joined, prompt_start=starts, prompt_length=lengths)
        return block

    def _ids(self, ids: Int32, where: str) -> Int32:
        assert self.alignment is not None
        theirs = self.alignment.to_teacher[ids]
        if (theirs < 0).any():
            raise ModelError(
                f"teacher: {where} holds the student's token {int(ids[theirs < 0][0])}, which the teacher's "
                "tokenizer lacks, so it cannot read on; choose a teacher that has it"
            )
        return theirs


class _AlignedScorer:
    """A scorer behind a `View`."""

    def __init__(self, scorer: Scorer, view: View):
        self._scorer, self._view = scorer, view
        self.batch_tokens = scorer.batch_tokens

    def compute_logprobs(self, batch: TokenBatch | cs.RolloutBlock) -> cs.ScoreBlock:
        batch = as_batch(batch)
        return self._view.back(self._scorer.compute_logprobs(self._view.of(batch)), batch)


def view_of(recipe: Recipe, teacher: ResolvedModel, round_: cs.Round) -> View | SpanView:
    """A teacher's view of a round. Raises as `view_on`."""
    sampled = round_.manifest
    size = max(sampled.vocab_size, sampled.tokenizer.vocab_size)
    records = [round_.prompts[index] for index in range(round_.n_prompts)]
    name = f"cache {round_.cache.url} round {round_.index}"
    try:
        return view_on(recipe, teacher, records, sampled.tokenizer.digest, size, sampled.stop_token_ids, name)
    except MissingColumnError as error:
        raise MissingColumnError(
            f"{error}; a round keeps the columns that teacher.prompt and prompts.columns name when it is sampled"
        ) from None


def view_on(
    recipe: Recipe,
    teacher: ResolvedModel,
    records: Sequence[dict[str, Any]],
    tokenizer_digest: str,
    vocab_size: int,
    stop_token_ids: Sequence[int],
    source: str,
) -> View | SpanView:
    """A teacher's view of responses to these prompts.

    Args:
        records: the prompts.
        tokenizer_digest, vocab_size, stop_token_ids: of the student; the size is that of its head or of its
            tokenizer, whichever is larger.
        source: where the prompts are from, for messages.

    Raises:
        ModelError: it tokenizes text differently from the student, or its tokenizer lacks `stop_token`.
        PromptError: a prompt does not fit its template, or lacks a column that the teacher's text is made of.
    """
    cfg, tokenizer = settings_of(teacher), teacher.tokenizer
    same = teacher.tokenizer_identity.digest == tokenizer_digest
    student = tokenizer if same else resolve(recipe.student).tokenizer
    if recipe.score.alignment == "spans" and not split_alike(student, tokenizer):
        rendered = teacher_prompts(recipe, teacher, records, source)
        stop = tokenizer.eos_token_id if cfg.stop_token is None else _stop(cfg, tokenizer)
        return span_view(student, tokenizer, cfg.model, rendered, stop_token_ids, stop)
    alignment = align(student, tokenizer, (recipe.student.model, cfg.model), (vocab_size, teacher.vocab_size))
    shared = alignment.to_student >= 0
    if cfg.stop_token is not None:
        stop = _stop(cfg, tokenizer)
        eos = student.eos_token_id if student.eos_token_id in stop_token_ids else stop_token_ids[0]
        alignment = alignment.exchanged(eos, stop)
    known, common = None if alignment.is_identity(student) else alignment, None if shared.all() else shared
    if not has_own_prompts(cfg, records):
        return View(None, known, common)
    prompts = teacher_prompts(recipe, teacher, records, source)
    return View(prompts.ids, known, common, prompts.made_of)


def _stop(teacher: TeacherConfig, tokenizer: PreTrainedTokenizerBase) -> int:
    assert teacher.stop_token is not None
    stop = tokenizer.get_vocab().get(teacher.stop_token)
    if stop is None:
        raise ModelError(
            f"teacher.stop_token = {teacher.stop_token!r}: expected a token of {teacher.model}, such as "
            f"{tokenizer.eos_token!r}"
        )
    return int(stop)


def longest_of(round_: cs.Round, block: int, view: View | SpanView) -> int:
    """Tokens of a block's longest rollout in the teacher's view."""
    if isinstance(view, SpanView):
        (theirs,) = view.of(TokenBatch((round_.rollouts.read(block),))).blocks
        return int(theirs.rollout_length.max())
    rows = round_.rollouts.read_arrays(block, ("prompt_index", "prompt_length", "row_prompt", "response_length"))
    prompts = rows["prompt_length"]
    if view.prompts is not None:
        prompts = np.array([len(view.prompts[index]) for index in rows["prompt_index"]])
    return int((prompts[rows["row_prompt"]] + rows["response_length"]).max())


def align(
    student: PreTrainedTokenizerBase, teacher: PreTrainedTokenizerBase, names: tuple[str, str], sizes: tuple[int, int]
) -> Alignment:
    """Pair the tokens of two tokenizers that split text in the same way.

    Args:
        names: of both models, for the message.
        sizes: ids of both models, padding included.

    Raises:
        ModelError: they do not.
    """
    ours, theirs = student.get_vocab(), teacher.get_vocab()
    if not split_alike(student, teacher):
        differing, more = sum(theirs.get(token) != index for token, index in ours.items()), len(theirs.keys() - ours)
        raise ModelError(
            f"{names[1]}: it tokenizes text differently from {names[0]} (of {len(ours):,} tokens "
            f"{differing:,} differ, and it has {more:,} more), so their log-probs cannot be compared token by token; "
            'choose a teacher with the student\'s tokenizer, or set score.alignment = "spans" to compare the spans '
            "of text that both share"
        )
    pairs = {index: theirs[token] for token, index in ours.items() if token in theirs}
    if all(pairs.get(index) == index for index in ours.values()):
        pairs = {index: index for index in range(min(sizes))}  # what pads both is the same too
    return Alignment.of({v: theirs_v for v, theirs_v in pairs.items() if theirs_v < sizes[1]}, *sizes)


def split_alike(student: PreTrainedTokenizerBase, teacher: PreTrainedTokenizerBase) -> bool:
    """Whether both split every text into the same tokens, up to their ids.

    Equal vocabularies with equal ids are taken for one tokenizer; a teacher with more tokens may merge what the
    student leaves apart. Added tokens (of a chat, of tools) do not count: nothing is merged into them.
    """
    return student is teacher or _pieces(student) == _pieces(teacher) or _rules(student) == _rules(teacher)


def _pieces(tokenizer: PreTrainedTokenizerBase) -> dict[str, int]:
    added = tokenizer.get_added_vocab()
    return {token: index for token, index in tokenizer.get_vocab().items() if token not in added}


def _rules(tokenizer: PreTrainedTokenizerBase) -> Any:
    """What determines how text is split, apart from ids; equal to nothing else if that is not known."""
    backend = getattr(tokenizer, "backend_tokenizer", None)
    if backend is None:
        return object()
    settings = json.loads(backend.to_str())
    model = dict(settings["model"])
    vocab, kind = model.pop("vocab"), model["type"]
    if kind == "Unigram":
        pieces: Any = sorted(map(tuple, vocab))
    elif kind == "BPE" and not model.get("ignore_merges"):
        pieces = None  # the merges determine it
    else:
        pieces = sorted(vocab)
    model.pop("unk_id", None)
    return model, pieces, settings["normalizer"], settings["pre_tokenizer"]
