"""Sampling with vLLM: one request for each turn of a rollout, and an engine that is kept full across blocks.

A request has prompt ids, a seed that is a function of (seed, round, prompt, sample, turn), and the recipe's stop ids,
the only ones that end it. vLLM uses its own random numbers, so its rollouts differ from those of the transformers
sampler; and since its kernels may round differently in another batch, a rollout may differ in another run. The
log-probs are always those of the sampled tokens.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Iterable, Iterator
from concurrent.futures import FIRST_COMPLETED, Future, wait
from dataclasses import dataclass
from typing import TYPE_CHECKING

import numpy as np

import cache_schema as cs
from pipeline.engines.episodes import LOOK_EVERY, Episodes, Rollout, rollouts_of
from pipeline.engines.sampling import PromptBlock, Sampling
from pipeline.engines.vllm import Engine
from pipeline.errors import ModelError
from pipeline.text.environments import Reply

if TYPE_CHECKING:
    from vllm import RequestOutput, SamplingParams

# Requests in the engine for each one that can run: enough to fill each gap at once, few enough to end soon.
_REQUESTS_PER_SEQUENCE = 2
# Tokens between two reports of an unfinished rollout.
_REPORT_TOKENS = 32
_FINISH = {"stop": cs.FINISH_STOP, "length": cs.FINISH_LENGTH}


@dataclass(eq=False)
class _OpenBlock:
    """A block with rollouts in the engine."""

    block: PromptBlock
    rollouts: list[Rollout]
    n_waiting: int
    seconds: float = 0.0


@dataclass
class _Request:
    """One turn of a rollout in the engine, and how many of its tokens have been counted."""

    block: _OpenBlock
    rollout: Rollout
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
        episodes: replies to the student's turns, each of which is a request. The engine runs on while they are
            waited for.
    """

    def __init__(
        self,
        engine: Engine,
        sampling: Sampling,
        *,
        batch_size: int = 256,
        on_step: Callable[[int, int], None] = lambda rollouts, tokens: None,
        episodes: Episodes | None = None,
    ):
        self._engine, self._sampling, self._on_step, self._episodes = engine, sampling, on_step, episodes
        self._max_requests = _REQUESTS_PER_SEQUENCE * batch_size
        self._n_added = 0

    def sample(self, blocks: Iterable[PromptBlock]) -> Iterator[tuple[int, cs.RolloutBlock, float]]:
        waiting, requests, replies = iter(blocks), dict[str, _Request](), dict[Future[Reply], _Request]()
        try:
            since = time.perf_counter()
            while True:
                while (
                    len(requests) + len(replies) < self._max_requests and (block := next(waiting, None)) is not None
                ):
                    requests |= self._add(block)
                if not requests and not replies:
                    return
                outputs = self._step() if requests else []
                patience = 0 if requests else LOOK_EVERY
                replied = wait(replies, patience, FIRST_COMPLETED).done if replies else ()
                now, unfinished = time.perf_counter(), [*requests.values(), *replies.values()]
                for request in unfinished:
                    request.block.seconds += (now - since) / len(unfinished)
                since = now
                n_tokens, ended = 0, list[_OpenBlock]()
                for output in outputs:
                    request = requests[output.request_id]
                    n_tokens += len(output.outputs[0].token_ids) - request.n_counted
                    request.n_counted = len(output.outputs[0].token_ids)
                    if output.finished:
                        del requests[output.request_id]
                        self._add_turn(request.rollout, output)
                        if (reply := self._ask(request)) is not None:
                            replies[reply] = request
                        else:
                            ended.append(request.block)
                for reply in replied:
                    request = replies.pop(reply)
                    assert self._episodes is not None
                    if self._episodes.add(request.rollout, reply, self._sampling.max_response_tokens):
                        requests |= self._start(_Request(request.block, request.rollout))
                    else:
                        ended.append(request.block)
                for done in ended:
                    done.n_waiting -= 1
                for done in dict.fromkeys(ended):
                    if not done.n_waiting:
                        kept = done.rollouts if self._episodes is None else self._episodes.kept(done.rollouts)
                        rows = [rollout.row() for rollout in kept]
                        yield done.block.block, cs.RolloutBlock.from_rows(done.block.prompts, rows), done.seconds
                self._on_step(len(ended), n_tokens)
        finally:
            self._engine.abort(requests)

    def params(self, prompt_index: int, sample_index: int, turn: int = 0, n_before: int = 0) -> SamplingParams:
        """The parameters of the request for one turn of a rollout, after so many tokens of the response."""
        from vllm import SamplingParams
        from vllm.sampling_params import RequestOutputKind

        return SamplingParams(
            temperature=self._sampling.temperature,
            top_p=self._sampling.top_p,
            seed=self._sampling.key(prompt_index, sample_index, turn) & (2**63 - 1),
            max_tokens=self._sampling.max_response_tokens - n_before,
            stop_token_ids=list(self._sampling.stop_token_ids),
            ignore_eos=True,  # other EOS tokens of the model are ordinary tokens
            logprobs=0,  # of the sampled token alone
            flat_logprobs=True,
            detokenize=False,
            output_kind=RequestOutputKind.CUMULATIVE,
            stream_interval=_REPORT_TOKENS,
        )

    def _add(self, block: PromptBlock) -> dict[str, _Request]:
        """Queue all rollouts of a block. Those of a prompt share its prefix in the engine."""
        rollouts = rollouts_of(block, self._sampling.rollouts_per_prompt)
        opened, requests = _OpenBlock(block, rollouts, n_waiting=len(rollouts)), dict[str, _Request]()
        for rollout in rollouts:
            requests |= self._start(_Request(opened, rollout))
        return requests

    def _start(self, request: _Request) -> dict[str, _Request]:
        """Queue the request of a rollout's next turn."""
        rollout, name = request.rollout, str(self._n_added)
        params = self.params(rollout.index, rollout.sample, rollout.n_turns, len(rollout.token_ids))
        self._engine.add(name, rollout.context.tolist(), params)
        self._n_added += 1
        return {name: request}

    def _ask(self, request: _Request) -> Future[Reply] | None:
        """Ask for the reply to a rollout's latest turn; None if it has ended with it."""
        if self._episodes is None:
            return None
        return self._episodes.ask(request.rollout, request.block.block.records[request.rollout.prompt])

    def _step(self) -> list[RequestOutput]:
        try:
            return self._engine.step()
        except Exception:
            self._on_step(0, 0)  # raises if a stop signal, which vLLM's processes receive too, is the reason
            raise

    def _add_turn(self, rollout: Rollout, output: RequestOutput) -> None:
        response = output.outputs[0]
        logprobs = np.array(response.logprobs.logprobs, np.float32)
        if not np.isfinite(logprobs).all():
            raise ModelError(
                "student.model in vLLM: its logits are not finite while sampling; most likely its values overflow "
                'its dtype, or its weights are damaged; use student.dtype = "bfloat16" or "float32", or download it '
                "again"
            )
        # vLLM returns a greedy token's log-prob at temperature 1; it was sampled with certainty
        logprobs = logprobs if self._sampling.temperature > 0 else np.zeros_like(logprobs)
        finish = _FINISH.get(response.finish_reason, cs.FINISH_OTHER)
        rollout.add_turn(np.array(response.token_ids, np.int32), logprobs, finish)
