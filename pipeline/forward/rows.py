"""How rollouts are laid out for a forward pass: packed end to end, or as rows padded on the right.

Shapes: B rows of a group, S tokens of its longest rollout, T response tokens of all rollouts, D hidden.

Packing (`pipeline.forward.packing`) needs a model whose tokens meet in attention alone, through transformers'
attention interface. Every other causal model takes rows: attention, convolution and recurrence never look to the
right, so a row has the values that its rollout has alone, with no mask and whatever the padding holds. Rows of
similar length share a forward, which bounds the padding. Both layouts give hidden rows in the same order.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from functools import partial
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn

from pipeline.errors import ModelError
from pipeline.forward.attention import ATTENTION, similar_lengths
from pipeline.forward.head import unwrapped
from pipeline.forward.packing import PackedTokens, check_starts, check_token_ids, decoder_body, pack, packed_hidden

# Padding, in tokens, that costs less than one more forward; beyond it padding may only take up a share.
_FREE_PADDING_TOKENS = 256


@dataclass(frozen=True)
class RowGroup:
    """Rollouts that share a forward.

    Attributes:
        input_ids: i64 [B, S], padded on the right.
        predict_rows: i64 [t], the rows of B * S whose outputs predict their response tokens.
    """

    input_ids: Tensor
    predict_rows: Tensor


@dataclass(frozen=True)
class RowTokens:
    """Rollouts as padded rows.

    Attributes:
        order: i64 [T], where each response token is in the groups' outputs end to end.
        target_ids: i64 [T], the response tokens in the rollouts' order.
        lowest_id, highest_id: of all tokens, known without asking the device.
    """

    groups: tuple[RowGroup, ...]
    order: Tensor
    target_ids: Tensor
    lowest_id: int
    highest_id: int

    @classmethod
    def of(
        cls,
        sequences: Sequence[np.ndarray],
        response_starts: Sequence[int],
        device: torch.device | str = "cpu",
        *,
        one_group: bool = False,
        padding_id: int = 0,
    ) -> RowTokens:
        """Lay out N >= 1 sequences (prompt + response); see `pack` for the arguments.

        Args:
            one_group: all rows in one forward, whatever the padding costs.

        Raises:
            ModelError: an empty sequence, or a response that starts outside its bounds.
        """
        check_starts(sequences, response_starts)
        lengths = [len(sequence) for sequence in sequences]
        offsets = np.cumsum([0, *(n - start for n, start in zip(lengths, response_starts, strict=True))])
        order = np.zeros(offsets[-1], np.int64)
        every = list(range(len(lengths)))
        groups: list[RowGroup] = []
        done = 0
        for members in [every] if one_group else similar_lengths(lengths, every, _FREE_PADDING_TOKENS):
            longest = max(lengths[i] for i in members)
            ids = np.full((len(members), longest), padding_id, np.int64)
            predict: list[np.ndarray] = []
            for row, i in enumerate(members):
                ids[row, : lengths[i]] = sequences[i]
                predict.append(row * longest + np.arange(response_starts[i] - 1, lengths[i] - 1))
                order[offsets[i] : offsets[i + 1]] = done + np.arange(len(predict[-1]))
                done += len(predict[-1])
            rows = np.concatenate(predict)
            groups.append(RowGroup(torch.from_numpy(ids).to(device), torch.from_numpy(rows).to(device)))
        targets = np.concatenate([s[start:] for s, start in zip(sequences, response_starts, strict=True)])
        return cls(
            groups=tuple(groups),
            order=torch.from_numpy(order).to(device),
            target_ids=torch.from_numpy(targets.astype(np.int64)).to(device),
            lowest_id=min(int(sequence.min()) for sequence in sequences),
            highest_id=max(int(sequence.max()) for sequence in sequences),
        )


LaidOut = PackedTokens | RowTokens


def is_packed(model: nn.Module) -> bool:
    """Whether the model takes packed rollouts: it was loaded with redpen's packed attention."""
    return bool(decoder_body(model).config._attn_implementation == ATTENTION)  # type: ignore[union-attr]


def native_attention(model: nn.Module) -> str:
    """The implementation of transformers under which a model computes all that its configuration asks for: SDPA, or
    eager if it has none or caps its scores, which SDPA silently leaves out.
    """
    base = unwrapped(model)
    return "eager" if _caps_scores(base) or not base._supports_sdpa else "sdpa"


def sampling_attention(model: nn.Module) -> str:
    """The same for generation; scores are capped by redpen's attention if it can be used, in blocks of queries, and
    keys are not repeated for grouped queries (`pipeline.forward.decoding`).
    """
    base = unwrapped(model)
    native = native_attention(base)
    if not pads_left(base):
        return native
    if _caps_scores(base):
        return ATTENTION
    if native != "sdpa":
        return native
    from pipeline.forward.decoding import DECODING_ATTENTION, register_decoding_attention

    register_decoding_attention()
    return DECODING_ATTENTION


@contextmanager
def attention_of(base: Any, implementation: str) -> Iterator[None]:
    """Another attention implementation within the body."""
    before = base.config._attn_implementation
    base.set_attn_implementation(implementation)
    try:
        yield
    finally:
        base.set_attn_implementation(before)


@contextmanager
def eval_mode(model: nn.Module) -> Iterator[None]:
    """Eval mode within the body; afterwards the modules that were in training mode are in it again."""
    training = [module for module in model.modules() if module.training]
    model.eval()
    try:
        yield
    finally:
        for module in training:
            module.training = True


def _caps_scores(base: Any) -> bool:
    return bool(getattr(base.config.get_text_config(), "attn_logit_softcapping", None))


def pads_left(model: nn.Module) -> bool:
    """Whether prompts of several lengths can be sampled together, padded on the left: what can be packed can."""
    return bool(getattr(unwrapped(model), "redpen_can_pack", True))


def set_can_pack(model: nn.Module, can_pack: bool) -> None:
    """Remember what `pipeline.models.architecture` found out about a model."""
    unwrapped(model).redpen_can_pack = can_pack


def lay_out(
    model: nn.Module,
    sequences: Sequence[np.ndarray],
    response_starts: Sequence[int],
    device: torch.device | str = "cpu",
    *,
    share_prompts_from: int | None = None,
    one_forward: bool = False,
) -> LaidOut:
    """Lay out sequences as the model takes them; rows never share prompts. Raises `ModelError`; see `pack`.

    Args:
        one_forward: never split rows into groups, where ranks must run equally many forwards.
    """
    if is_packed(model):
        return pack(sequences, response_starts, device, share_prompts_from=share_prompts_from)
    return RowTokens.of(sequences, response_starts, device, one_group=one_forward)


def forwards(model: nn.Module, tokens: LaidOut) -> list[Callable[[], Tensor]]:
    """The forwards that the tokens take; `gather_hidden` puts what they return together."""
    if isinstance(tokens, PackedTokens):
        return [partial(packed_hidden, model, tokens)]
    check_token_ids(model, tokens.lowest_id, tokens.highest_id)
    return [partial(_group_hidden, model, group) for group in tokens.groups]


def _group_hidden(model: nn.Module, group: RowGroup) -> Tensor:
    body: Any = decoder_body(model)
    if body.config._attn_implementation == ATTENTION:
        raise ModelError(f"attention: expected transformers' own for rows, got {ATTENTION!r}")
    hidden_BSD: Tensor = body(input_ids=group.input_ids, use_cache=False).last_hidden_state
    return hidden_BSD.flatten(0, 1).index_select(0, group.predict_rows)


def gather_hidden(tokens: LaidOut, parts: Sequence[Tensor]) -> Tensor:
    """Hidden rows [T, D] in the order of `tokens.target_ids`, from what its forwards returned."""
    if isinstance(tokens, PackedTokens):
        return parts[0]
    return torch.cat(list(parts)).index_select(0, tokens.order)


def response_hidden(model: nn.Module, tokens: LaidOut) -> Tensor:
    """Hidden rows [T, D] after the final norm, at the rows that predict response tokens. Differentiable.

    Raises `ModelError` for tokens outside the model's vocabulary.
    """
    return gather_hidden(tokens, [forward() for forward in forwards(model, tokens)])
