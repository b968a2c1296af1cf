"""Several rollouts in one forward pass, without padding and without seeing one another.

Shapes: S packed tokens (prompts and responses end to end), T response positions, N sequences.

Rollouts of one prompt may share it: the prompt is then one sequence, each response another, whose keys are the
prompt's followed by its own. That is what each would see with a copy of the prompt before it, at the price of one.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn

from pipeline.errors import ModelError
from pipeline.forward.attention import ATTENTION, PackPlan
from pipeline.forward.finite import name_of
from pipeline.forward.head import unwrapped


@dataclass(frozen=True)
class PackedTokens:
    """Rollouts end to end, ready for `packed_hidden`.

    Attributes:
        input_ids, position_ids: i64 [1, S]; positions start again with every sequence, or go on from its prompt.
        predict_rows: i64 [T], the row of S whose output predicts each response token, in packed order.
        target_ids: i64 [T], those response tokens.
        plan: for the attention.
        lowest_id, highest_id: of `input_ids`, known without asking the device.
    """

    input_ids: Tensor
    position_ids: Tensor
    predict_rows: Tensor
    target_ids: Tensor
    plan: PackPlan
    lowest_id: int
    highest_id: int

    @property
    def cu_seqlens(self) -> Tensor:
        return self.plan.cu_seqlens

    @property
    def max_seqlen(self) -> int:
        return self.plan.max_seqlen

    def model_kwargs(self) -> dict[str, Any]:
        """What a decoder body's forward is to be called with."""
        kwargs = {
            "input_ids": self.input_ids,
            "position_ids": self.position_ids,
            "use_cache": False,
            "pack_plan": self.plan,
        }
        if self.plan.keys is None:  # else they would describe responses without their prompt
            kwargs |= {"cu_seqlens": self.plan.cu_seqlens, "max_seqlen": self.plan.max_seqlen}
        return kwargs


def pack(
    sequences: Sequence[np.ndarray],
    response_starts: Sequence[int],
    device: torch.device | str = "cpu",
    *,
    share_prompts_from: int | None = None,
) -> PackedTokens:
    """Lay sequences (prompt + response token ids) end to end.

    Args:
        sequences: N >= 1 integer arrays.
        response_starts: where each response starts in its sequence, from 1 (something must predict its first token)
            to the sequence's length (no response).
        share_prompts_from: read a prompt of so many tokens once for all sequences that begin with it, which takes
            an attention call more. None: never. Only for models whose tokens meet in attention alone: what
            `check_layout` finds out.

    Raises:
        ModelError: an empty sequence, or a response that starts outside those bounds.
    """
    parts: list[np.ndarray] = []  # what S is made of; a shared prompt is one, and each of its responses
    prefixes: list[range] = []
    positions: list[np.ndarray] = []
    predicting: list[np.ndarray] = []
    prompts = [sequence[:response].tobytes() for sequence, response in zip(sequences, response_starts, strict=True)]
    times = Counter(prompts)
    shared: dict[bytes, range] = {}
    total = 0

    def lay(ids: np.ndarray, prefix: range = range(0)) -> range:
        nonlocal total
        rows = range(total, total + len(ids))
        parts.append(np.asarray(ids, np.int64))
        prefixes.append(prefix)
        positions.append(np.arange(len(prefix), len(prefix) + len(ids)))
        total = rows.stop
        return rows

    check_starts(sequences, response_starts)
    for sequence, response, prompt in zip(sequences, response_starts, prompts, strict=True):
        if times[prompt] > 1 and share_prompts_from is not None and response >= share_prompts_from:
            if prompt not in shared:
                shared[prompt] = lay(sequence[:response])
            rows = np.r_[shared[prompt], lay(sequence[response:], shared[prompt])]
        else:
            rows = np.asarray(lay(sequence))
        predicting.append(rows[response - 1 : -1])

    def on_device(array: np.ndarray) -> Tensor:
        return torch.from_numpy(array.astype(np.int64, copy=False)).to(device)

    targets = [sequence[response:] for sequence, response in zip(sequences, response_starts, strict=True)]
    ids = np.concatenate(parts)
    return PackedTokens(
        input_ids=on_device(ids)[None],
        position_ids=on_device(np.concatenate(positions))[None],
        predict_rows=on_device(np.concatenate(predicting)),
        target_ids=on_device(np.concatenate(targets)),
        plan=PackPlan.of([len(part) for part in parts], device, prefixes),
        lowest_id=int(ids.min(initial=0)),
        highest_id=int(ids.max(initial=0)),
    )


def check_starts(sequences: Sequence[np.ndarray], response_starts: Sequence[int]) -> None:
    """Refuse responses that nothing predicts. Raises `ModelError`."""
    for i, (sequence, response) in enumerate(zip(sequences, response_starts, strict=True)):
        if not 1 <= response <= len(sequence):
            raise ModelError(
                f"sequence {i}: expected its response to start after 1..{len(sequence)} prompt tokens, got "
                f"{response}; a rollout needs at least one prompt token"
            )


def tiles(lengths: Sequence[int], tile_tokens: int) -> list[range]:
    """Split sequences, in order, into runs of at most `tile_tokens` tokens; a longer one has a run to itself."""
    runs: list[range] = []
    start, total = 0, 0
    for i, length in enumerate(lengths):
        if i > start and total + length > tile_tokens:
            runs.append(range(start, i))
            start, total = i, 0
        total += length
    if start < len(lengths):
        runs.append(range(start, len(lengths)))
    return runs


def decoder_body(model: nn.Module) -> nn.Module:
    """The decoder without its head, also inside a PEFT wrapper; `Head` maps its output to logits.

    Raises:
        ModelError: the adapter adds positions of its own (prompt or prefix tuning), which packing cannot place; or
            the model has no decoder apart from its head.
    """
    adapters: Any = getattr(model, "peft_config", {})
    if any(adapter.is_prompt_learning for adapter in adapters.values()):
        raise ModelError("adapter: expected one of weights (LoRA), got prompt learning, which cannot be packed")
    base = unwrapped(model)
    body: Any = base.get_decoder()
    if body in (base, base.get_output_embeddings()):  # the latter is what ModernBERT's decoder calls so
        embedding, head = base.get_input_embeddings(), base.get_output_embeddings()
        modules = {child: set(child.modules()) for child in base.children()}
        apart = [child for child, within in modules.items() if embedding in within - {child} and head not in within]
        if len(apart) != 1:
            raise ModelError(f"{name_of(model)}: {type(base).__name__} has no decoder apart from its head")
        body = apart[0]
    decoder: nn.Module = body
    return decoder


def check_token_ids(model: nn.Module, lowest: int, highest: int) -> None:
    """Refuse tokens that the embedding has no row for, which a GPU would answer by ending the process. Raises
    `ModelError`.
    """
    embedding = unwrapped(model).get_input_embeddings()
    rows = getattr(embedding, "num_embeddings", highest + 1)
    if lowest < 0 or highest >= rows:
        found = lowest if lowest < 0 else highest
        raise ModelError(
            f"{name_of(model)}: its vocabulary has the ids 0..{rows - 1}, found {found}; the tokens were made with "
            "another vocabulary, or with more padding of it"
        )


def packed_hidden(model: nn.Module, packed: PackedTokens) -> Tensor:
    """Hidden rows [T, D] after the final norm, at the rows that predict response tokens. Differentiable.

    Raises:
        ModelError: the model was not loaded with (or set to) `attn_implementation="redpen_packed"`, or a token is
            outside its vocabulary.
    """
    body: Any = decoder_body(model)
    check_token_ids(model, packed.lowest_id, packed.highest_id)
    if body.config._attn_implementation != ATTENTION:
        raise ModelError(
            f"attention: expected a model with attn_implementation={ATTENTION!r}, got "
            f"{body.config._attn_implementation!r}, under which packed rollouts may see one another"
        )
    hidden_SD: Tensor = body(**packed.model_kwargs()).last_hidden_state[0]
    return hidden_SD.index_select(0, packed.predict_rows)
