"""Scoring with vLLM: a teacher scores rollouts as prompts.

A request is a whole rollout, with one token to generate, which is dropped. vLLM's newer model runner returns the
log-probs of the candidates (`prompt_logprob_token_ids`), its older one those of its likeliest tokens, both at
temperature 1, and without the prefix cache, since cached positions would be missing.
`pipeline.engines.prompt_logprobs` makes scores of them.
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
    ScoreRequest,
    joined,
    misaligned,
    partial_scores,
    refuse_nan,
    score_requests,
)
from pipeline.engines.scoring import ScoreOptions, TokenBatch, as_batch
from pipeline.engines.vllm import Engine
from pipeline.errors import ModelError, one_line
from pipeline.models.resolve import resolve, setting_name

if TYPE_CHECKING:
    from vllm import RequestOutput, SamplingParams
    from vllm.logprobs import FlatLogprobs

_MAX_SEQUENCES = 256
#: Elements of the logits of one step: the older runner holds those of a step's prompt tokens in fp32 (half a GiB),
#: with a few copies, in memory that vLLM does not reserve.
_LOGITS_PER_STEP = 2**27


class VllmScorer:
    """Scores tokens with vLLM: log-probs of the tokens, of candidates if it returns them, of its likeliest; no
    entropy.

    Args:
        model: is started in vLLM. `close` stops it.
        max_length: tokens of the longest rollout, prompt and response together.
        on_tile: called between steps of the engine with the response tokens scored since the last call; what it
            raises stops the scoring.

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
                'more to score it; set score.placement = "resident" or "streamed"'
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
        """Stop vLLM and free its memory."""
        self._engine.close()

    def compute_logprobs(self, batch: TokenBatch | cs.RolloutBlock) -> cs.ScoreBlock:
        """Scores of every response token of the batch, [T] end to end.

        Raises `ModelError` for ids that the model lacks, and if vLLM returns scores of other tokens.
        """
        requests = score_requests(as_batch(batch), self._vocab_size, self._who)
        returned: dict[int, cs.ScoreBlock] = {}
        n_scored = 0
        try:
            for number, request in enumerate(requests):
                self._engine.add(str(number), request.token_ids.tolist(), self._params(request))
            while self._engine.n_unfinished:
                self._on_tile(n_scored)
                n_scored = 0
                for output in self._step():
                    number = int(output.request_id)
                    returned[number] = self._scores(requests[number], output)
                    n_scored += returned[number].n_tokens
        except BaseException:
            with contextlib.suppress(Exception):  # an engine that failed cannot
                self._engine.abort(str(number) for number in range(len(requests)) if number not in returned)
            raise
        self._on_tile(n_scored)
        return joined([returned[number] for number in range(len(requests))])

    def _step(self) -> list[RequestOutput]:
        try:
            return self._engine.step()
        except Exception as error:  # whatever vLLM and its kernels raise
            self._on_tile(0)  # raises if a stop signal, which vLLM's processes receive too, is the reason
            hint = "; it may not score prompts with an adapter: merge it, or score" if self._adapted else "; score"
            raise ModelError(
                f"{self._who}: failed while scoring ({one_line(error)}){hint} by placement resident or streamed"
            ) from error

    def _params(self, request: ScoreRequest) -> SamplingParams:
        from vllm import SamplingParams
        from vllm.sampling_params import RequestOutputKind

        if self._engine.supports_given_ids:
            options = {
                "prompt_logprob_token_ids": request.given_ids(request.n_candidates, self._vocab_size),
                "prompt_logprob_start": request.start - 1,  # row i of vLLM predicts token i + 1
                "prompt_logprobs": self._options.topk or None,
            }
        else:
            options = {"prompt_logprobs": self._likeliest}
        return SamplingParams(
            max_tokens=1,
            temperature=0,
            flat_logprobs=True,
            detokenize=False,
            output_kind=RequestOutputKind.FINAL_ONLY,
            **options,
        )

    def _scores(self, request: ScoreRequest, output: RequestOutput) -> cs.ScoreBlock:
        try:
            sent = request.token_ids
            if output.prompt_token_ids is None or not np.array_equal(sent, output.prompt_token_ids):
                raise ModelError("returned scores of other tokens than were sent")
            returned = None
            if output.prompt_logprobs is not None:
                returned = _likeliest(output.prompt_logprobs, request)
            if self._engine.supports_given_ids:
                if output.prompt_token_id_logprobs is None:
                    raise ModelError("did not return the log-probs of the requested ids")
                ids = request.given_ids(request.n_candidates, self._vocab_size)
                given = EngineLogprobs.of_given_ids(ids, output.prompt_token_id_logprobs)
                returned = given if returned is None else given.joined_with(returned)
            if returned is None:
                raise ModelError("returned no log-probs of the prompt")
            return partial_scores(request, returned, self._options.topk, self._options.topk_among)
        except ModelError as error:
            raise ModelError(f"{self._who}: {error}") from error


def _likeliest(returned: FlatLogprobs, request: ScoreRequest) -> EngineLogprobs:
    """From vLLM's lists: nothing for the first token, then for each token its log-prob and those of the likeliest."""
    n_positions = len(returned.start_indices)
    if n_positions != len(request.token_ids):
        raise ModelError(f"returned {n_positions} positions, {len(request.token_ids)} tokens were sent")
    first = request.start - 1
    shape = (n_positions - 1, -1)
    ids = np.array(returned.token_ids, np.int64).reshape(shape)[first:]
    if len(wrong := np.flatnonzero(ids[:, 0] != request.response)):
        row = int(wrong[0])
        raise misaligned(request.start + row, int(request.response[row]), int(ids[row, 0]))
    logprobs = np.array(returned.logprobs, np.float64).reshape(shape)[first:]
    refuse_nan(logprobs)
    return EngineLogprobs(ids, logprobs)
