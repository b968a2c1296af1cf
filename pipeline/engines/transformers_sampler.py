"""Sampling with a transformers model, one block at a time: rollouts depend on nothing but their block.

Shapes: B rollouts decoded together, S prompt tokens (padded on the left), V vocabulary.

Every position of every rollout has its own uniform number u (`Sampling.uniforms`), and its token is the first with a
cumulative probability above u. A rollout is therefore a function of its prompt and key; its neighbours in the batch
only affect the last bits of the logits. Models that cannot be packed (recurrent or convolutional state, ALiBi, sinks)
are not padded either: prompts of equal length form a batch. The logits come from `pipeline.forward.head`, as in
scoring and training (fp32 from half-precision weights). A model's generation_config (top_k, repetition penalties) is
ignored.
"""

from __future__ import annotations

import contextlib
import inspect
import itertools
import time
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass, replace
from typing import Any, TypeAlias

import numpy as np
import numpy.typing as npt
import torch
from torch import Tensor
from transformers import (
    DynamicCache,
    LogitsProcessorList,
    PreTrainedModel,
    TemperatureLogitsWarper,
    TopPLogitsWarper,
)

import cache_schema as cs
from pipeline.console import warn
from pipeline.engines.episodes import Episodes, Rollout, rollouts_of
from pipeline.engines.sampling import PromptBlock, Sampling
from pipeline.forward.finite import name_of, not_finite
from pipeline.forward.head import Head, logits
from pipeline.forward.packing import check_token_ids, decoder_body
from pipeline.forward.rows import pads_left
from pipeline.models.load import free_bytes

# Finished rollouts are removed from the batch once they are this fraction of it: removing copies its keys and values.
_FINISHED_FRACTION = 0.1
# The cache of a model that is not padded is checked on the first prompt's tokens, past its window, for some steps.
_PROBE_WINDOW, _PROBE_TOKENS, _PROBE_STEPS = 4096, 32, 12
# Nats that it may be off by; in half precision so many times the model's own noise, of which sound caches make 0 to
# 0.9, and those of Bamba, Granite 4 and RecurrentGemma in transformers 5.19 make 6 to 10.
_PROBE_TOLERANCE, _PROBE_NOISE, _PROBE_LEAST = 1e-4, 2.0, 1e-3
# An fp32 copy of the head is made if so many times its size is free.
_ROOM_FOR_HEAD = 4
# Elements of a float64 [rows, V] temporary while drawing: 256 MiB.
_DRAW_ELEMENTS = 2**25


@dataclass(frozen=True)
class _Request:
    """Tokens to sample after `token_ids`; requests of the same array share its forward pass.

    Attributes:
        uniforms: [at most this many tokens] in [0, 1), for each token to be sampled.
    """

    token_ids: npt.NDArray[np.int32]
    uniforms: npt.NDArray[np.float64]


@dataclass(frozen=True)
class _Sampled:
    """What was sampled for a request: [T] token ids and log-probs, and whether a stop token ends them."""

    token_ids: npt.NDArray[np.int32]
    logprobs: npt.NDArray[np.float32]
    stopped: bool


class _Tokens:
    """Replaces the KV cache: the tokens so far, over which every step runs a whole forward pass."""

    def __init__(self) -> None:
        self._ids: Tensor | None = None

    def extend(self, ids: Tensor) -> Tensor:
        self._ids = ids if self._ids is None else torch.cat([self._ids, ids], 1)
        return self._ids

    def reorder_cache(self, rows: Tensor) -> None:
        assert self._ids is not None
        self._ids = self._ids[rows]


_Cache: TypeAlias = DynamicCache | _Tokens


class TransformersSampler:
    """Samples from a causal language model with a KV cache.

    Args:
        model: on its device, loaded with attention="sampling".
        batch_size: rollouts decoded together; rollouts of similar prompt length share a batch.
        on_step: called between decode steps with the rollouts that ended and the tokens sampled since the last call;
            what it raises stops the sampling, and the current block is lost.
        episodes: replies to the student's turns. A turn is a request with a longer prompt, and its uniforms are those
            of its positions in the response.
    """

    def __init__(
        self,
        model: PreTrainedModel,
        sampling: Sampling,
        *,
        batch_size: int = 256,
        on_step: Callable[[int, int], None] = lambda rollouts, tokens: None,
        episodes: Episodes | None = None,
    ):
        self._episodes = episodes
        self._model, self._config = model, model.config
        self._body, self._head = decoder_body(model), _cast_once(Head.of(model))
        self._device = self._head.weight_VD.device
        self._sampling, self._batch_size, self._on_step = sampling, batch_size, on_step
        self._pads_left, self._caches = pads_left(model), True
        takes = inspect.signature(self._body.forward).parameters
        self._cache_argument = next((name for name in ("past_key_values", "cache_params") if name in takes), None)
        self._is_probed = self._pads_left

    def sample(self, blocks: Iterable[PromptBlock]) -> Iterator[tuple[int, cs.RolloutBlock, float]]:
        for block in blocks:
            started = time.perf_counter()
            rollouts = self.sample_block(block)
            yield block.block, rollouts, time.perf_counter() - started

    def sample_block(self, block: PromptBlock) -> cs.RolloutBlock:
        """Every rollout of a block's prompts. Raises `RedpenError` if the environment failed in all of them."""
        rollouts = rollouts_of(block, self._sampling.rollouts_per_prompt)
        if not self._is_probed:
            self._caches, self._is_probed = self._can_continue(block.prompts[0][1]), True
        going, longest = rollouts, self._sampling.max_response_tokens
        while going:
            going = sorted(going, key=lambda rollout: len(rollout.prompt_ids) + len(rollout.token_ids))
            for rollout, turn in zip(going, self._answer([self._request(one) for one in going]), strict=True):
                finish = cs.FINISH_STOP if turn.stopped else cs.FINISH_LENGTH
                rollout.add_turn(turn.token_ids, turn.logprobs, finish)
            if self._episodes is None:
                break
            n_asked = len(going)
            going = self._episodes.next_turns(going, block.records, longest, lambda: self._on_step(0, 0))
            self._on_step(n_asked - len(going), 0)
        kept = rollouts if self._episodes is None else self._episodes.kept(rollouts)
        return cs.RolloutBlock.from_rows(block.prompts, [rollout.row() for rollout in kept])

    def _request(self, rollout: Rollout) -> _Request:
        uniforms = self._sampling.uniforms(rollout.index, rollout.sample)
        return _Request(rollout.context, uniforms[len(rollout.token_ids) :])

    def _answer(self, requests: Sequence[_Request]) -> list[_Sampled]:
        """What is sampled for requests in order of their length."""
        sampled: list[_Sampled] = []
        for alike in [requests] if self._pads_left else _of_equal_length(requests):
            for start in range(0, len(alike), self._batch_size):
                sampled += self._decode(alike[start : start + self._batch_size])
        return sampled

    @torch.inference_mode()
    def _decode(self, requests: Sequence[_Request]) -> list[_Sampled]:
        limits = np.array([len(request.uniforms) for request in requests])
        shape = len(requests), int(limits.max())
        uniforms = np.zeros(shape)
        for row, request in enumerate(requests):
            uniforms[row, : limits[row]] = request.uniforms
        tokens = np.full(shape, -1, np.int32)
        logprobs = np.full(shape, np.nan, np.float32)
        lengths = np.zeros(len(requests), np.int64)
        stopped, done = np.zeros(len(requests), bool), np.zeros(len(requests), bool)

        cache: _Cache = DynamicCache(config=self._config) if self._caches else _Tokens()
        hidden_BD, mask_BS = self._prefill(requests, cache)
        position_B = mask_BS.sum(1)
        live = np.arange(len(requests))  # the requests of the batch, some of which may be done
        for step in range(shape[1]):
            uniform_B = torch.from_numpy(uniforms[live, step]).to(self._device)
            token_B, logprob_B = self._draw(hidden_BD, uniform_B)
            ended = np.isin(drawn := token_B.cpu().numpy(), self._sampling.stop_token_ids)
            going = ~done[live]
            drawn_logprobs = logprob_B.cpu().numpy()[going]
            if not np.isfinite(drawn_logprobs).all():
                raise not_finite(self._model, f"sampling token {step + 1} of a response")
            tokens[live[going], step] = drawn[going]
            logprobs[live[going], step] = drawn_logprobs
            lengths[live[going]] += 1
            stopped[live[going]] = ended[going]
            last = ended | (step + 1 == limits[live])
            done[live] |= last
            n_ended = 0 if self._episodes is not None else int((going & last).sum())
            self._on_step(n_ended, int(going.sum()))

            going &= ~last
            if not going.any():
                break
            if going.mean() <= 1 - _FINISHED_FRACTION:
                keep = torch.from_numpy(np.flatnonzero(going)).to(self._device)
                cache.reorder_cache(keep)
                token_B, position_B, mask_BS, live = (
                    token_B[keep],
                    position_B[keep],
                    mask_BS[keep],
                    live[going],
                )
            mask_BS = torch.cat([mask_BS, mask_BS.new_ones(len(live), 1)], 1)
            hidden_BD = self._forward(token_B[:, None], mask_BS, position_B[:, None], cache)
            position_B = position_B + 1

        return [
            _Sampled(tokens[row, :length], logprobs[row, :length], bool(stopped[row]))
            for row, length in enumerate(lengths)
        ]

    def _prefill(self, requests: Sequence[_Request], cache: _Cache) -> tuple[Tensor, Tensor]:
        """Run each prompt once, padded on the left, and copy its state to all its requests.

        Returns the hidden row of every request's last prompt token [B, D] and the attention mask [B, S].
        """
        prompts = {id(request.token_ids): request.token_ids for request in requests}
        row_of = {prompt: row for row, prompt in enumerate(prompts)}
        sequences = list(prompts.values())
        longest = max(len(ids) for ids in sequences)
        ids_PS = np.zeros((len(sequences), longest), np.int64)
        mask_PS = np.zeros((len(sequences), longest), np.int64)
        for row, ids in enumerate(sequences):
            ids_PS[row, longest - len(ids) :] = ids
            mask_PS[row, longest - len(ids) :] = 1
        check_token_ids(self._model, int(ids_PS.min()), int(ids_PS.max()))
        mask = torch.from_numpy(mask_PS).to(self._device)
        positions = (mask.cumsum(1) - 1).clamp_min(0)
        hidden_PD = self._forward(torch.from_numpy(ids_PS).to(self._device), mask, positions, cache)
        prompt_of = torch.tensor([row_of[id(request.token_ids)] for request in requests], device=self._device)
        cache.reorder_cache(prompt_of)
        return hidden_PD[prompt_of], mask[prompt_of]

    def _forward(self, ids: Tensor, mask: Tensor, positions: Tensor, cache: _Cache) -> Tensor:
        """The hidden row of the last token of every sequence, [B, D]; extends the cache."""
        if isinstance(cache, _Tokens):
            out = self._body(input_ids=cache.extend(ids), use_cache=False)
        else:
            kwargs: dict[str, Any] = {self._cache_argument or "past_key_values": cache}
            if self._pads_left:  # else there is no padding, and not every such model takes positions
                kwargs |= {"attention_mask": mask, "position_ids": positions}
            out = self._body(input_ids=ids, use_cache=True, **kwargs)
        hidden: Tensor = out.last_hidden_state[:, -1]
        return hidden

    @torch.inference_mode()
    def _can_continue(self, prompt: npt.NDArray[np.int32]) -> bool:
        """Whether the model computes the same with its cache as without; not every architecture does.

        In half precision the difference is compared with what an error of one rounding in the embeddings makes of the
        same log-probs: a sound cache makes less, one that goes wrong several times as much.
        """
        check_token_ids(self._model, int(prompt.min()), int(prompt.max()))
        text = self._config.get_text_config()
        window = max(getattr(text, name, None) or 0 for name in ("sliding_window", "attention_window_size"))
        ids = torch.from_numpy(np.resize(prompt, min(window, _PROBE_WINDOW) + _PROBE_TOKENS))
        ids = ids.to(self._device, torch.int64)[None]
        split = max(1, ids.shape[1] - _PROBE_STEPS)

        def logprobs(hidden_nD: Tensor) -> Tensor:
            shape = len(hidden_nD), self._head.vocab_size
            out_nV = torch.empty(shape, dtype=self._head.logits_dtype, device=self._device)
            return logits(hidden_nD, self._head, out_nV).log_softmax(1)

        def without_cache() -> Tensor:
            return logprobs(self._body(input_ids=ids, use_cache=False).last_hidden_state[0, split:])

        whole = without_cache()

        def apart(other: Tensor) -> float:
            return float(((other - whole).abs() * whole.exp()).sum(1).mean())

        try:
            cache, none, swapped = DynamicCache(config=self._config), torch.empty(0), torch.tensor([1, 0, 1])
            both = torch.cat([ids.flip(1), ids])
            self._forward(both[:, :split], none, none, cache)
            cache.reorder_cache(swapped.to(self._device))
            steps = [
                self._forward(both[swapped, step : step + 1], none, none, cache)[0]
                for step in range(split, ids.shape[1])
            ]
        except torch.OutOfMemoryError:
            raise
        except Exception as error:  # a forward pass with another kind of cache may raise anything
            reason = type(error).__name__
        else:
            found, bound = apart(logprobs(torch.stack(steps))), _PROBE_TOLERANCE
            if self._model.dtype not in (torch.float32, torch.float64):
                with _rounded_once_more(self._model):
                    bound = _PROBE_LEAST + _PROBE_NOISE * apart(without_cache())
            if found <= bound or whole.isnan().any():
                return True
            reason = f"{found:.2g} nats apart"
        name = name_of(self._model)
        warn(f"{name}: its cache cannot be used ({reason}); every token is sampled by a forward over all before it")
        return False

    def _draw(self, hidden_BD: Tensor, uniform_B: Tensor) -> tuple[Tensor, Tensor]:
        n_rows, vocab = hidden_BD.shape[0], self._head.vocab_size
        logits_BV = torch.empty(n_rows, vocab, dtype=self._head.logits_dtype, device=self._device)
        logits(hidden_BD, self._head, logits_BV)
        rows_at_a_time = max(1, _DRAW_ELEMENTS // vocab)
        parts = [
            draw(logits_BV[i : i + rows_at_a_time], uniform_B[i : i + rows_at_a_time], self._sampling)
            for i in range(0, n_rows, rows_at_a_time)
        ]
        token_B, logprob_B = (torch.cat(values) for values in zip(*parts, strict=True))
        return token_B, logprob_B


def _cast_once(head: Head) -> Head:
    """On a CPU, a half-precision head in fp32, if there is room: `logits` would cast all of it at every token."""
    weight_VD = head.weight_VD.detach()
    if weight_VD.is_cuda or weight_VD.dtype == head.logits_dtype:
        return head
    if free_bytes(weight_VD.device) < _ROOM_FOR_HEAD * weight_VD.numel() * head.logits_dtype.itemsize:
        return head
    return replace(head, weight_VD=weight_VD.to(head.logits_dtype))


@contextlib.contextmanager
def _rounded_once_more(model: PreTrainedModel) -> Iterator[None]:
    """Embeddings off by about a rounding error of their dtype, within the body."""
    embedding = model.get_input_embeddings()
    generator = torch.Generator().manual_seed(0)

    def perturb(module: Any, args: Any, embedded: Tensor) -> Tensor:
        signs = torch.randint(0, 2, embedded.shape, generator=generator) * 2 - 1
        return embedded * (1 + signs * torch.finfo(embedded.dtype).eps / 2).to(embedded)

    handle = embedding.register_forward_hook(perturb)
    try:
        yield
    finally:
        handle.remove()


def _of_equal_length(requests: Sequence[_Request]) -> list[list[_Request]]:
    groups = itertools.groupby(requests, key=lambda request: len(request.token_ids))
    return [list(group) for _, group in groups]


def draw(logits_BV: Tensor, uniform_B: Tensor, sampling: Sampling) -> tuple[Tensor, Tensor]:
    """One token a row from the sampling distribution, by inverting its cumulative distribution in float64.

    Returns the ids and their log-probs under that distribution, [B] each. Greedy decoding is a point mass:
    log-prob 0. A token of probability 0 is never drawn: `right=True` finds the first with a cumulative probability
    above u. If a row's logits are not finite, its log-prob is NaN and its token is arbitrary.
    """
    if sampling.temperature == 0:
        highest_B, token_B = logits_BV.max(1)
        return token_B, torch.where(highest_B.isfinite(), 0.0, torch.nan).double()
    warpers = LogitsProcessorList()
    if sampling.temperature != 1:
        warpers.append(TemperatureLogitsWarper(float(sampling.temperature)))
    if sampling.top_p < 1:
        warpers.append(TopPLogitsWarper(sampling.top_p))
    scores_BV = warpers(None, logits_BV.to(torch.float64, copy=True))
    scores_BV -= scores_BV.max(1, keepdim=True).values
    cumulative_BV = scores_BV.exp().cumsum_(1)  # times the sum that would normalise it
    sum_B1 = cumulative_BV[:, -1:]
    token_B1 = torch.searchsorted(cumulative_BV, uniform_B[:, None] * sum_B1, right=True)
    token_B1.clamp_max_(logits_BV.shape[1] - 1)  # past the last, where the distribution is NaN
    return token_B1[:, 0], (scores_BV.gather(1, token_B1) - sum_B1.log())[:, 0]
