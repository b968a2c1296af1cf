"""Scoring with vLLM: a teacher read through the log-probs of its prompt.

A request is a rollout whole, with one token to generate, which is dropped. vLLM's newer model runner returns the
log-probs of the candidates themselves (`prompt_logprob_token_ids`), its older one those of its likeliest tokens;
either way at temperature 1, and without the prefix cache, whose positions would be missing.
`pipeline.engines.prompt_logprobs` says what becomes of them.
"""

from __future__ import annotations

import contextlib
from collections.abc import Callable
from typing import TYPE_CHECKING

import numpy as np

import cache_schema as cs
from pipeline.config import ModelConfig, VllmConfig
from pipeline.console import say
from pipeline.engines.prompt_logprobs import (
    LIKELIEST,
    EngineLogprobs,
    Question,
    joined,
    misaligned,
    partial_scores,
    questions,
    refuse_nan,
)
from pipeline.engines.scoring import ScoreOptions, TokenBatch, as_batch
from pipeline.engines.vllm import Engine
from pipeline.errors import ModelError, one_line
from pipeline.models.resolve import resolve, setting_name

if TYPE_CHECKING:
    from vllm import RequestOutput, SamplingParams
    from vllm.logprobs import FlatLogprobs

_MAX_SEQUENCES = 256
#: Logits of one step, in numbers: the older runner holds those of a step's prompt tokens in fp32 (half a GiB), and a
#: few copies, in memory that vLLM does not plan for.
_LOGITS_PER_STEP = 2**27


class VllmScorer:
    """Scores tokens with vLLM: log-probs of the tokens, of candidates if it returns them, of its likeliest; no
    entropy.

    Args:
        model: starts in vLLM here. `close` stops it.
        max_length: tokens of the longest rollout, prompt and response together.
        on_tile: called between steps of the engine with the response tokens read since the last call; what it raises
            stops it.

    Raises:
        ConfigError: vLLM is not installed. ModelError: it cannot run the model, or not at this length.
    """

    batch_tokens = 65_536

    def __init__(
        self,
        model: ModelConfig,
        settings: VllmConfig,
        options: ScoreOptions = ScoreOptions(),  # noqa: B008  frozen
        *,
        max_length: int,
        on_tile: Callable[[int], None] = lambda tokens: None,
    ):
        facts = resolve(model)
        self._who, self._vocab_size = f"{setting_name(model, 'model')} = {model.model!r} in vLLM", facts.vocab_size
        self._options, self._on_tile, self._adapted = options, on_tile, model.adapter is not None
        if facts.context is not None and max_length >= facts.context:
            raise ModelError(
                f"{self._who}: its context is {facts.context} tokens, a rollout has {max_length}, and vLLM needs one "
                'more to read it; set score.placement = "resident" or "streamed"'
            )
        self._likeliest = max(options.candidates, options.topk, LIKELIEST)
        self._engine = Engine(
            model,
            settings,
            max_length=max_length + 1,
            max_sequences=_MAX_SEQUENCES,
            max_logprobs=self._likeliest,
            max_batched_tokens=max(_LOGITS_PER_STEP // facts.vocab_size, _MAX_SEQUENCES),
        )
        if not self._engine.supports_given_ids:
            say(
                f"{self._who}: this runner returns its {self._likeliest} likeliest tokens at a position; "
                "other candidates count as the rest"
            )

    def close(self) -> None:
        """Stop vLLM and give its memory back."""
        self._engine.close()

    def compute_logprobs(self, batch: TokenBatch | cs.RolloutBlock) -> cs.ScoreBlock:
        """Scores of every response token of the batch, [T] end to end.

        Raises `ModelError` for ids the model lacks, and if what vLLM returns is not about these tokens.
        """
        asked = questions(as_batch(batch), self._vocab_size, self._who)
        returned: dict[int, cs.ScoreBlock] = {}
        n_read = 0
        try:
            for number, question in enumerate(asked):
                self._engine.add(str(number), question.token_ids.tolist(), self._params(question))
            while self._engine.n_unfinished:
                self._on_tile(n_read)
                n_read = 0
                for output in self._step():
                    number = int(output.request_id)
                    returned[number] = self._scores(asked[number], output)
                    n_read += returned[number].n_tokens
        except BaseException:
            with contextlib.suppress(Exception):  # an engine that failed cannot
                self._engine.abort(str(number) for number in range(len(asked)) if number not in returned)
            raise
        self._on_tile(n_read)
        return joined([returned[number] for number in range(len(asked))])

    def _step(self) -> list[RequestOutput]:
        try:
            return self._engine.step()
        except Exception as error:  # whatever vLLM and its kernels raise
            self._on_tile(0)  # a signal to stop may have reached vLLM's processes too: then that is the reason
            hint = "; it may not read prompts through an adapter: merge it, or score" if self._adapted else "; score"
            raise ModelError(
                f"{self._who}: failed while reading ({one_line(error)}){hint} by placement resident or streamed"
            ) from error

    def _params(self, question: Question) -> SamplingParams:
        from vllm import SamplingParams
        from vllm.sampling_params import RequestOutputKind

        if self._engine.supports_given_ids:
            asked_for = {
                "prompt_logprob_token_ids": question.given_ids(question.n_candidates, self._vocab_size),
                "prompt_logprob_start": question.start - 1,  # row i of vLLM predicts token i + 1
                "prompt_logprobs": self._options.topk or None,
            }
        else:
            asked_for = {"prompt_logprobs": self._likeliest}
        return SamplingParams(
            max_tokens=1,
            temperature=0,
            flat_logprobs=True,
            detokenize=False,
            output_kind=RequestOutputKind.FINAL_ONLY,
            **asked_for,
        )

    def _scores(self, question: Question, output: RequestOutput) -> cs.ScoreBlock:
        try:
            sent = question.token_ids
            if output.prompt_token_ids is None or not np.array_equal(sent, output.prompt_token_ids):
                raise ModelError("answered for other tokens than were sent")
            returned = None
            if output.prompt_logprobs is not None:
                returned = _likeliest(output.prompt_logprobs, question)
            if self._engine.supports_given_ids:
                if output.prompt_token_id_logprobs is None:
                    raise ModelError("did not return the log-probs of the ids asked for")
                ids = question.given_ids(question.n_candidates, self._vocab_size)
                given = EngineLogprobs.given(ids, output.prompt_token_id_logprobs)
                returned = given if returned is None else given.beside(returned)
            if returned is None:
                raise ModelError("returned no log-probs of the prompt")
            return partial_scores(question, returned, self._options.topk, self._options.topk_among)
        except ModelError as error:
            raise ModelError(f"{self._who}: {error}") from error


def _likeliest(returned: FlatLogprobs, question: Question) -> EngineLogprobs:
    """From vLLM's lists: nothing of the first token, then of each its own log-prob and those of the likeliest."""
    n_positions = len(returned.start_indices)
    if n_positions != len(question.token_ids):
        raise ModelError(f"returned {n_positions} positions, {len(question.token_ids)} tokens were sent")
    first = question.start - 1
    shape = (n_positions - 1, -1)
    ids = np.array(returned.token_ids, np.int64).reshape(shape)[first:]
    if len(wrong := np.flatnonzero(ids[:, 0] != question.response)):
        row = int(wrong[0])
        raise misaligned(question.start + row, int(question.response[row]), int(ids[row, 0]))
    logprobs = np.array(returned.logprobs, np.float64).reshape(shape)[first:]
    refuse_nan(logprobs)
    return EngineLogprobs(ids, logprobs)
