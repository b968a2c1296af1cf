"""Sampling with vLLM: one request for each rollout, and an engine that is kept full across blocks.

A request has prompt ids, a seed that is a function of (seed, round, prompt, sample), and the recipe's stop ids, the
only ones that end it. vLLM uses its own random numbers, so its rollouts differ from those of the transformers
sampler; and since its kernels may round differently in another batch, a rollout may differ in another run. The
log-probs are always those of the sampled tokens.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass, field
from typing import TYPE_CHECKING

import numpy as np

import cache_schema as cs
from pipeline.engines.sampling import PromptBlock, Sampling
from pipeline.engines.vllm import Engine
from pipeline.errors import ModelError

if TYPE_CHECKING:
    from vllm import RequestOutput, SamplingParams

# Requests in the engine for each one that can run: enough to fill each gap at once, few enough to end soon.
_REQUESTS_PER_SEQUENCE = 2
# Tokens between two reports of an unfinished rollout.
_REPORT_TOKENS = 32
_FINISH = {"stop": cs.FINISH_STOP, "length": cs.FINISH_LENGTH}


@dataclass
class _OpenBlock:
    """A block with rollouts in the engine."""

    block: PromptBlock
    n_waiting: int
    rows: list[cs.RolloutRow] = field(default_factory=list)
    seconds: float = 0.0


@dataclass
class _Request:
    """One rollout in the engine: its place, and how many of its tokens have been counted."""

    block: _OpenBlock
    prompt: int
    sample_index: int
    n_counted: int = 0


class VllmSampler:
    """Samples from a causal language model in vLLM.

    Blocks are returned as they complete, in any order. The seconds of a block are a part of the wall time: every step
    of the engine is divided among the rollouts that were unfinished then, so blocks add up to the whole.

    Args:
        engine: the student.
        batch_size: rollouts that run at the same time; the engine's `max_sequences`.
        on_step: called after each step of the engine with the rollouts that ended and the tokens sampled since the
            last call (those of unfinished rollouts a few at a time); what it raises stops the sampling, and
            incomplete blocks are lost.
    """

    def __init__(
        self,
        engine: Engine,
        sampling: Sampling,
        *,
        batch_size: int = 256,
        on_step: Callable[[int, int], None] = lambda rollouts, tokens: None,
    ):
        self._engine, self._sampling, self._on_step = engine, sampling, on_step
        self._max_requests = _REQUESTS_PER_SEQUENCE * batch_size
        self._n_added = 0

    def sample(self, blocks: Iterable[PromptBlock]) -> Iterator[tuple[int, cs.RolloutBlock, float]]:
        waiting, requests = iter(blocks), dict[str, _Request]()
        try:
            since = time.perf_counter()
            while True:
                while len(requests) < self._max_requests and (block := next(waiting, None)) is not None:
                    requests |= self._add(block)
                if not requests:
                    return
                outputs = self._step()
                now = time.perf_counter()
                for request in requests.values():
                    request.block.seconds += (now - since) / len(requests)
                since = now
                n_ended, n_tokens, whole = 0, 0, []
                for output in outputs:
                    request = requests[output.request_id]
                    n_tokens += len(output.outputs[0].token_ids) - request.n_counted
                    request.n_counted = len(output.outputs[0].token_ids)
                    if output.finished:
                        n_ended += 1
                        del requests[output.request_id]
                        request.block.rows.append(self._row(request, output))
                        request.block.n_waiting -= 1
                        if not request.block.n_waiting:
                            whole.append(request.block)
                for done in whole:
                    yield done.block.block, cs.RolloutBlock.from_rows(done.block.prompts, done.rows), done.seconds
                self._on_step(n_ended, n_tokens)
        finally:
            self._engine.abort(requests)

    def params(self, prompt_index: int, sample_index: int) -> SamplingParams:
        """The parameters of one rollout's request."""
        from vllm import SamplingParams
        from vllm.sampling_params import RequestOutputKind

        return SamplingParams(
            temperature=self._sampling.temperature,
            top_p=self._sampling.top_p,
            seed=self._sampling.key(prompt_index, sample_index) & (2**63 - 1),
            max_tokens=self._sampling.max_response_tokens,
            stop_token_ids=list(self._sampling.stop_token_ids),
            ignore_eos=True,  # other EOS tokens of the model are ordinary tokens
            logprobs=0,  # of the sampled token alone
            flat_logprobs=True,
            detokenize=False,
            output_kind=RequestOutputKind.CUMULATIVE,
            stream_interval=_REPORT_TOKENS,
        )

    def _add(self, block: PromptBlock) -> dict[str, _Request]:
        """Queue all rollouts of a block. Those of a prompt follow one another and share its prefix in the engine."""
        samples = range(self._sampling.rollouts_per_prompt)
        opened = _OpenBlock(block, n_waiting=len(block.prompts) * len(samples))
        requests = {}
        for prompt, (index, ids) in enumerate(block.prompts):
            token_ids = ids.tolist()
            for sample in samples:
                name = str(self._n_added)
                self._engine.add(name, token_ids, self.params(index, sample))
                requests[name] = _Request(opened, prompt, sample)
                self._n_added += 1
        return requests

    def _step(self) -> list[RequestOutput]:
        try:
            return self._engine.step()
        except Exception:
            self._on_step(0, 0)  # raises if a stop signal, which vLLM's processes receive too, is the reason
            raise

    def _row(self, request: _Request, output: RequestOutput) -> cs.RolloutRow:
        response = output.outputs[0]
        logprobs = np.array(response.logprobs.logprobs, np.float32)
        if not np.isfinite(logprobs).all():
            raise ModelError(
                "student.model in vLLM: its logits are not finite while sampling; most likely its values overflow "
                'its dtype, or its weights are damaged; use student.dtype = "bfloat16" or "float32", or download it '
                "again"
            )
        return cs.RolloutRow(
            prompt=request.prompt,
            sample_index=request.sample_index,
            token_ids=np.array(response.token_ids, np.int32),
            # vLLM returns a greedy token's log-prob at temperature 1; it was sampled with certainty
            logprobs=logprobs if self._sampling.temperature > 0 else np.zeros_like(logprobs),
            finish_reason=_FINISH.get(response.finish_reason, cs.FINISH_OTHER),
        )
