"""Whether packed log-probs are those of each rollout alone."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from functools import partial
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn

from pipeline.errors import ModelError
from pipeline.forward.finite import name_of, not_finite
from pipeline.forward.head import Head, score_rows, unwrapped
from pipeline.forward.packing import pack, packed_hidden

# How far packed log-probs may lie from a rollout's own, in nats. A rollout that sees another one is off by several
# somewhere; what is left is rounding, in half precision that of the model's own logits, which reach about 30.
_TOLERANCE = {torch.float64: 1e-8, torch.float32: 1e-4, torch.float16: 0.2, torch.bfloat16: 1.0}


@torch.no_grad()
def check_packing(
    model: nn.Module,
    sequences: Sequence[np.ndarray],
    response_starts: Sequence[int],
    tolerance: float | None = None,
    *,
    share_prompts_from: int | None = None,
    run: Callable[[Sequence[Callable[[], Tensor]]], list[Tensor]] = lambda forwards: [go() for go in forwards],
) -> float:
    """Compare packed log-probs with those of each rollout alone, by transformers' own attention and `.logits`.

    It catches rollouts that see one another, a wrong window or position, and a head that does more than `Head` knows.

    Args:
        tolerance: in nats; by the dtype of the model's head where None.
        run: calls every forward and gives what they return, for a model that is not in memory as a whole.

    Returns:
        The largest absolute difference, in nats.

    Raises:
        ModelError: it exceeds `tolerance`.
    """
    base, head = unwrapped(model), Head.of(model)
    device = head.weight_VD.device

    def together() -> Tensor:
        packed = pack(sequences, response_starts, device, share_prompts_from=share_prompts_from)
        return score_rows(packed_hidden(model, packed), head, packed.target_ids).logprobs

    def alone(sequence: np.ndarray, start: int) -> Tensor:
        ids = torch.as_tensor(np.asarray(sequence, np.int64), device=device)
        with _own_attention(base):
            logits: Tensor = model(input_ids=ids[None], use_cache=False).logits[0, start - 1 : -1]
        return logits.to(head.logits_dtype).log_softmax(1).gather(1, ids[start:, None])[:, 0]

    training = [module for module in model.modules() if module.training]
    model.eval()
    try:
        rollouts = zip(sequences, response_starts, strict=True)
        ours, *theirs = run([together, *(partial(alone, *rollout) for rollout in rollouts)])
    finally:
        for module in training:
            module.training = True
    if not all(bool(logprobs.isfinite().all()) for logprobs in theirs):
        raise not_finite(model, "reading a rollout alone")
    worst = float((ours - torch.cat(theirs)).abs().max()) if len(ours) else 0.0
    tolerance = _TOLERANCE[head.weight_VD.dtype] if tolerance is None else tolerance
    if not worst <= tolerance:
        raise ModelError(
            f"packing: expected packed log-probs within {tolerance:g} of each rollout's own, got a difference of "
            f"{worst:.3g}; {name_of(model)} ({type(base).__name__}) does something that "
            "redpen's packed attention or head does not know"
        )
    return worst


@contextmanager
def _own_attention(base: Any) -> Iterator[None]:
    """The model under transformers' attention: SDPA, or eager where scores are soft-capped."""
    eager = getattr(base.config.get_text_config(), "attn_logit_softcapping", None) or not base._supports_sdpa
    before = base.config._attn_implementation
    base.set_attn_implementation("eager" if eager else "sdpa")
    try:
        yield
    finally:
        base.set_attn_implementation(before)
