"""Whether rollouts have the log-probs among others that they have alone, and which layout a model is given.

Two questions, answered on a few real rollouts, chosen to differ:

    exchange    the rollouts beside one are replaced by others of the same lengths. Shapes and kernels stay, so its
                log-probs must not move: whatever they move by is a leak, or an expert's batch that was another.
    agreement   its log-probs are those of a forward of it alone, by transformers' own attention. It finds a wrong
                position, window or head.

In fp32 both have a fixed tolerance. In half precision they are held against the model's own noise, which is how far a
rollout's log-probs move when transformers runs it beside another row, or by its eager attention: a recurrent state
that decays leaks a few tenths of a nat, which no fixed tolerance can separate from rounding.
"""

from __future__ import annotations

import inspect
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from functools import partial
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn

from pipeline.console import warn
from pipeline.errors import ModelError
from pipeline.forward.finite import name_of, not_finite
from pipeline.forward.head import Head, score_rows, unwrapped
from pipeline.forward.packing import decoder_body, pack
from pipeline.forward.rows import (
    LaidOut,
    RowTokens,
    attention_of,
    eval_mode,
    is_packed,
    native_attention,
    response_hidden,
)

_TOLERANCE = {torch.float64: 1e-8, torch.float32: 1e-4}
# In half precision, in multiples of the model's own noise, and at least so many nats. Rows are transformers' own
# forward, in which a mistake of layout is nats; a false alarm would refuse a model.
_LEAK, _DIFFERENCE, _LEAK_OF_ROWS = 3.0, 4.0, 8.0
_LEAST_LEAK, _LEAST_DIFFERENCE, _LEAST_OF_ROWS = 1e-4, 0.1, 0.25
_MOST = 1.0
# Noise is measured on rollouts no longer than this: eager attention holds a matrix of S x S.
_NOISE_TOKENS = 1024
# Tokens of a rollout that is checked.
_LONGEST = {"cuda": 8192, "cpu": 1536}

Run = Callable[[Sequence[Callable[[], Tensor]]], list[Tensor]]


def _in_turn(forwards: Sequence[Callable[[], Tensor]]) -> list[Tensor]:
    return [forward() for forward in forwards]


def longest_checked(device: torch.device | str) -> int:
    """Tokens of the longest rollout that is checked on a device."""
    return _LONGEST[torch.device(device).type]


def choose_checked(lengths: Sequence[int], device: torch.device | str, count: int = 4) -> list[int]:
    """Rollouts to check: the longest that is not too costly, the shortest, and others alternately from both ends."""
    order = np.argsort(np.asarray(lengths), kind="stable").tolist()
    fitting = [i for i in order if lengths[i] <= longest_checked(device)] or order[:1]
    ends = [i for pair in zip(reversed(fitting), fitting, strict=True) for i in pair]
    return list(dict.fromkeys(ends))[:count]


@torch.no_grad()
def settle_layout(
    model: nn.Module,
    sequences: Sequence[np.ndarray],
    response_starts: Sequence[int],
    *,
    share_prompts_from: int | None = None,
    run: Run = _in_turn,
) -> str:
    """Check a model's layout; if packing is not exact, give it rows instead. Returns what was found, as a sentence.

    Raises:
        ModelError: rows are not exact either, or the model's forward fails.
    """
    if is_packed(model):
        try:
            worst = check_layout(model, sequences, response_starts, share_prompts_from=share_prompts_from, run=run)
            return f"packing check: packed and unpacked log-probs agree to {worst:.1g} nats"
        except torch.OutOfMemoryError:
            raise
        except Exception as error:  # whatever a forward raises that is called with what it does not take
            text = " ".join(str(error).split())[:200]
            warn(f"{name_of(model)}: rollouts are not packed but padded, one a row ({text})")
        unwrapped(model).set_attn_implementation(native_attention(model))
    try:
        worst = check_layout(model, sequences, response_starts, run=run)
    except (ModelError, torch.OutOfMemoryError):
        raise
    except Exception as error:  # whatever a forward raises
        text = " ".join(f"{type(error).__name__}: {error}".split())[:200]
        raise ModelError(
            f"{name_of(model)}: its forward fails ({text}); choose another model, dtype or version of transformers"
        ) from error
    return f"packing check: not packed; padded rows and single rollouts agree to {worst:.1g} nats"


@torch.no_grad()
def check_layout(
    model: nn.Module,
    sequences: Sequence[np.ndarray],
    response_starts: Sequence[int],
    tolerance: float | None = None,
    *,
    share_prompts_from: int | None = None,
    run: Run = _in_turn,
) -> float:
    """Compare log-probs of rollouts laid out together, packed or as rows, with those of each alone.

    Args:
        tolerance: in nats, for both questions above; by the dtype of the model's head and its own noise where None.
        run: calls every forward and gives what they return, for a model that is not in memory as a whole.

    Returns:
        The largest absolute difference to a rollout alone, in nats.

    Raises:
        ModelError: it exceeds the tolerance; or log-probs move when other rollouts are exchanged.
    """
    sequences = [np.asarray(sequence, np.int64) for sequence in sequences]
    if len(sequences) == 1:  # with a neighbour to see
        sequences, response_starts = sequences * 2, [*response_starts] * 2
    base, head = unwrapped(model), Head.of(model)
    device, packed, starts = head.weight_VD.device, is_packed(model), list(response_starts)
    every, halves = range(len(sequences)), (range(0, len(sequences), 2), range(1, len(sequences), 2))

    def together(kept: range) -> Tensor:
        """Log-probs of the `kept` rollouts among exchanged others; rows are padded with another token then, too."""
        laid_out = [
            s if i in kept else _exchanged(sequences, starts, i, share_prompts_from) for i, s in enumerate(sequences)
        ]
        if packed:
            tokens: LaidOut = pack(laid_out, starts, device, share_prompts_from=share_prompts_from)
        else:
            padding_id = 0 if len(kept) == len(sequences) else int(sequences[0][0])
            tokens = RowTokens.of(laid_out, starts, device, one_group=True, padding_id=padding_id)
        logprobs = score_rows(response_hidden(model, tokens), head, tokens.target_ids).logprobs
        return of(logprobs, kept)

    def alone(i: int, attention: str, beside: int = 0) -> Tensor:
        """Log-probs of rollout i by transformers' own forward; perhaps beside another row."""
        ids = torch.as_tensor(sequences[i], device=device)
        batch = torch.stack([ids, *[ids.flip(0)] * beside])
        with attention_of(base, attention), _last_hidden(model) as hidden:
            _without_logits(model, batch)
        return score_rows(hidden[-1][0, starts[i] - 1 : -1], head, ids[starts[i] :]).logprobs

    def by_logits(i: int) -> Tensor:
        ids = torch.as_tensor(sequences[i], device=device)
        with attention_of(base, own):
            logits: Tensor = model(input_ids=ids[None], use_cache=False).logits[0, starts[i] - 1 : -1]
        return logits.to(head.logits_dtype).log_softmax(1).gather(1, ids[starts[i] :, None])[:, 0]

    def of(logprobs: Tensor, members: range) -> Tensor:
        """What of all rollouts' log-probs belongs to some."""
        return torch.cat([logprobs[offsets[i] : offsets[i + 1]] for i in members] or [logprobs[:0]])

    offsets = np.cumsum([0, *(len(s) - start for s, start in zip(sequences, starts, strict=True))])
    own = native_attention(model)
    half = tolerance is None and head.weight_VD.dtype not in _TOLERANCE
    work: list[Callable[[], Tensor]] = [partial(together, kept) for kept in (every, *halves)]
    work += [partial(alone, i, own) for i in every]
    shortest = min((i for i in every if len(sequences[i]) > starts[i]), key=lambda i: len(sequences[i]), default=0)
    work.append(partial(by_logits, shortest))
    noisy = [i for i in every if half and len(sequences[i]) <= _NOISE_TOKENS]
    work += [partial(alone, i, own, 1) for i in noisy]
    eager = noisy if own == "sdpa" else []
    work += [partial(alone, i, "eager") for i in eager]

    with eval_mode(model):
        found = run(work)
    ours, *exchanged = found[:3]
    single, found = found[3 : 3 + len(every)], found[3 + len(every) :]
    if not all(bool(logprobs.isfinite().all()) for logprobs in single):
        raise not_finite(model, "scoring a rollout alone")
    moved = max(_apart(of(ours, kept), other) for kept, other in zip(halves, exchanged, strict=True))
    by_head, *noise = found
    worst = max(_apart(ours, torch.cat(single)), _apart(of(ours, range(shortest, shortest + 1)), by_head))
    if half:
        level = max((_apart(single[i], other) for i, other in zip([*noisy, *eager], noise, strict=True)), default=0.0)
        factor, least = (_LEAK, _LEAST_LEAK) if packed else (_LEAK_OF_ROWS, _LEAST_OF_ROWS)
        leak = min(max(factor * level, least), _MOST)
        tolerance = min(max(_DIFFERENCE * level, _LEAST_DIFFERENCE if packed else _LEAST_OF_ROWS), _MOST)
    else:
        tolerance = leak = _TOLERANCE[head.weight_VD.dtype] if tolerance is None else tolerance
    layout = "packing" if packed else "padding"
    who = f"{name_of(model)} ({type(base).__name__})"
    if not moved <= leak:
        raise ModelError(
            f"{layout}: expected a rollout's log-probs to stay within {leak:.2g} nats when its neighbours are "
            f"exchanged, got a difference of {moved:.3g}; {who} lets rollouts see one another"
        )
    if not worst <= tolerance:
        raise ModelError(
            f"{layout}: expected log-probs within {tolerance:.2g} nats of each rollout alone, got a difference of "
            f"{worst:.3g}; {who} does something that redpen's attention or head does not know"
        )
    return worst


def _exchanged(sequences: Sequence[np.ndarray], starts: Sequence[int], i: int, shared: int | None) -> np.ndarray:
    """Other tokens in place of rollout i, as many; of its response alone where prompts are shared, whose number is
    then the same.
    """
    own, other = sequences[i], np.concatenate([sequences[i - 1][::-1], sequences[i][::-1]])
    first = 0 if shared is None else starts[i]
    return np.concatenate([own[:first], np.resize(other, len(own) - first)])


def _apart(a: Tensor, b: Tensor) -> float:
    return float((a - b).abs().max()) if len(a) else 0.0


def _without_logits(model: nn.Module, ids: Tensor) -> None:
    """A forward of the whole model, with as few logits as it can be asked for."""
    takes = inspect.signature(type(unwrapped(model)).forward).parameters
    # Its index, not the number 1: on a CPU a slice of the hidden states costs a copy of the head for every row.
    first = torch.zeros(1, dtype=torch.int64, device=ids.device)
    model(input_ids=ids, use_cache=False, **({"logits_to_keep": first} if "logits_to_keep" in takes else {}))


@contextmanager
def _last_hidden(model: nn.Module) -> Iterator[list[Tensor]]:
    """Collects what the decoder returns within."""
    found: list[Tensor] = []
    body: Any = decoder_body(model)
    handle = body.register_forward_hook(lambda module, args, output: found.append(output.last_hidden_state))
    try:
        yield found
    finally:
        handle.remove()
