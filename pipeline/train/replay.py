"""The cached rollouts of a training step, and its micro-batches. numpy only.

A step takes its prompts from `pipeline.train.order`, each with all its rollouts, and those of their tokens that
`select` keeps. Only then are they packed by token budget and dealt to ranks, so the global batch, and the number of
its tokens that the loss is divided by, are the same for every world size, micro-batch budget and resume point.

Shapes: T response positions of a rollout or a block. Steps and epochs count from 0.
"""

from __future__ import annotations

import threading
from collections import OrderedDict
from collections.abc import Callable, Generator, Iterator, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, replace
from functools import cached_property, lru_cache
from typing import Any

import numpy as np
import numpy.typing as npt

import cache_schema as cs
from pipeline.errors import ConfigError
from pipeline.train.order import Int64, Order
from pipeline.train.packs import PackedRow, deal, pack_rows
from pipeline.train.selection import Selection, Weights

Array = npt.NDArray[Any]
Derived = Callable[[cs.RolloutBlock], Mapping[str, Array]]

#: Column of a loaded block: f4 [T], each token's log-prob under the distribution that it was sampled from.
BEHAVIOUR = "rollouts/rollout_logprobs"


def behaviour(rollouts: cs.RolloutBlock) -> Mapping[str, Array]:
    """`BEHAVIOUR` of a block."""
    return {BEHAVIOUR: rollouts.rollout_logprobs}


@dataclass(frozen=True)
class LoadedBlock:
    """A block's rollouts with the columns that training needs, all [T, ...] over the block's response tokens.

    Attributes:
        columns: by `<scorer>/<array>`, e.g. `teacher/candidate_logprobs`: all inputs of a loss except the tokens and
            their weights.
        weights: f4 [T], a token's weight in the loss: 1 if it is `trained`, scored and selected, else 0.
    """

    rollouts: cs.RolloutBlock
    columns: Mapping[str, Array]
    weights: Weights

    def rows_of(self, prompt: int) -> range:
        """Rollouts of the block's prompt number `prompt`."""
        first, last = np.searchsorted(self.rollouts.row_prompt, [prompt, prompt + 1])
        return range(int(first), int(last))


@dataclass(frozen=True)
class Rollout:
    """One cached rollout: a row of a loaded block, without a copy.

    It ends with its last token of positive weight, if there is one: no token depends on those after it.

    Attributes:
        selected: weights of its first tokens, if they depend on the global batch; later tokens have weight 0.
    """

    block: LoadedBlock
    row: int
    selected: Weights | None = None

    @property
    def prompt_index(self) -> int:
        return int(self.block.rollouts.prompt_index[self.block.rollouts.row_prompt[self.row]])

    @property
    def prompt_ids(self) -> Array:
        return self.block.rollouts.prompt(self.row)

    @property
    def token_ids(self) -> Array:
        """Prompt and response, end to end."""
        return np.concatenate([self.prompt_ids, self.block.rollouts.token_ids[self.response]])

    @property
    def n_tokens(self) -> int:
        """Tokens that a forward pass reads, prompt included."""
        return len(self.prompt_ids) + int(self.response.stop - self.response.start)

    @cached_property
    def response(self) -> slice:
        """Where its T tokens lie in the block's columns."""
        whole = self.block.rollouts.response_slice(self.row)
        weights = self.block.weights[whole] if self.selected is None else self.selected
        counted = np.flatnonzero(weights)
        return slice(whole.start, whole.start + (int(counted[-1]) + 1 if len(counted) else len(weights)))

    @property
    def weights(self) -> Weights:
        """f4 [T]: the weight of each token in the loss."""
        if self.selected is None:
            return self.block.weights[self.response]
        return self.selected[: self.response.stop - self.response.start]

    @property
    def content(self) -> tuple[object, ...]:
        """Equal for rollouts with equal gradients: the same tokens and weights, and the same bytes in every column.

        The columns are all other inputs of a loss, so a difference in reward or in cached log-probs is detected here.
        """
        columns = [self.column(name).tobytes() for name in sorted(self.block.columns)]
        return (self.prompt_index, self.token_ids.tobytes(), self.weights.tobytes(), *columns)

    def column(self, name: str) -> Array:
        """[T, ...] of one of the block's columns."""
        return self.block.columns[name][self.response]


@dataclass(frozen=True)
class MicroBatch:
    """Rollouts for one forward and backward.

    Attributes:
        copies: how often each occurs in the global batch; it is computed once, with the weight of all of them.
        counts: False for padding, which adds nothing to the gradient.
    """

    rollouts: tuple[Rollout, ...]
    copies: tuple[int, ...]
    counts: bool = True

    def column(self, name: str) -> Array:
        """[T, ...] over all response tokens, in packed order."""
        return np.concatenate([rollout.column(name) for rollout in self.rollouts])

    @property
    def _lengths(self) -> list[int]:
        return [rollout.response.stop - rollout.response.start for rollout in self.rollouts]

    @property
    def token_ids(self) -> npt.NDArray[np.int32]:
        """i4 [T]: the response tokens."""
        return np.concatenate([r.block.rollouts.token_ids[r.response] for r in self.rollouts])

    @property
    def prompts_T(self) -> Int64:
        """i8 [T]: the prompt of each token, counted in the round."""
        return np.repeat([r.prompt_index for r in self.rollouts], self._lengths)

    @property
    def copies_T(self) -> Int64:
        """i8 [T]: how often each token occurs in the global batch."""
        return np.repeat(self.copies, self._lengths)

    @property
    def weights(self) -> Weights:
        """f4 [T]: the weight of each token, all its copies together; zeros if the micro-batch is padding."""
        weights = np.concatenate([rollout.weights for rollout in self.rollouts])
        return (weights * self.copies_T * self.counts).astype(np.float32)


@dataclass(frozen=True)
class Batch:
    """The global batch of one step, the same on every rank."""

    step: int
    rollouts: tuple[Rollout, ...]

    @cached_property
    def n_tokens(self) -> float:
        """Trained tokens of the whole batch: what the loss is divided by, known before any forward pass."""
        return float(sum(float(rollout.weights.sum(dtype=np.float64)) for rollout in self.rollouts))

    @cached_property
    def distinct(self) -> tuple[tuple[Rollout, int], ...]:
        """The distinct rollouts with positive weight (by `Rollout.content`) and their copies, by first occurrence.

        A confident student repeats itself most of the time, so this saves much of the work.
        """
        copies: dict[tuple[object, ...], list[Rollout]] = {}
        for rollout in self.rollouts:
            if rollout.weights.any():
                copies.setdefault(rollout.content, []).append(rollout)
        return tuple((same[0], len(same)) for same in copies.values())

    def rows(self, share_prompts_from: int | None = None) -> list[PackedRow]:
        """`distinct` as rows to pack; rollouts share prompts of at least `share_prompts_from` tokens."""
        made = []
        for i, (rollout, _) in enumerate(self.distinct):
            n_prompt = len(rollout.prompt_ids)
            shared = share_prompts_from is not None and n_prompt >= share_prompts_from
            made.append(PackedRow(rollout.prompt_index if shared else -1 - i, n_prompt, len(rollout.weights)))
        return made

    def micro_batches(
        self, tokens_per_microbatch: int, rank: int = 0, world: int = 1, *, share_prompts_from: int | None = None
    ) -> list[MicroBatch]:
        """This rank's micro-batches; every rank has as many, so that collectives match."""
        packs = pack_rows(self.rows(share_prompts_from), tokens_per_microbatch, world)
        found = []
        for pack in deal(packs, rank, world):
            if pack is None:
                shortest = min((rollout for rollout, _ in self.distinct), key=lambda rollout: rollout.n_tokens)
                found.append(MicroBatch((shortest,), (1,), counts=False))
            else:
                rollouts, copies = zip(*(self.distinct[i] for i in pack), strict=True)
                found.append(MicroBatch(rollouts, copies))
        return found


class Replay:
    """Batches of a round, read from its cache block by block and digest-checked.

    Args:
        columns: arrays to read, by scorer, e.g. `{"teacher": ("logprobs", "rest_logprob")}`.
        selection: which tokens count; by default all that are trained and scored.
        taught: bool [n_prompts] by scorer: the prompts that need its scores, if not all do.
        derived: functions from a block's rollouts to further columns [T, ...] by name.
    """

    def __init__(
        self,
        round_: cs.Round,
        columns: Mapping[str, Sequence[str]],
        order: Order,
        *,
        selection: Selection | None = None,
        taught: Mapping[str, npt.NDArray[np.bool_]] | None = None,
        derived: Sequence[Derived] = (),
    ):
        self.order, self.selection = order, selection or Selection()
        self._round, self._taught, self._derived = round_, taught or {}, derived
        if self.selection.by_entropy:
            of_student = columns.get(cs.STUDENT, ())
            columns = {**columns, cs.STUDENT: (*of_student, *({"entropy"} - set(of_student)))}
        self._groups = {name: (round_.scores(name), tuple(arrays)) for name, arrays in columns.items()}
        self._loaded: OrderedDict[int, LoadedBlock] = OrderedDict()
        self._lock = threading.Lock()

    def batch(self, step: int) -> Batch:
        """The global batch of a step.

        Raises `CacheError` if a block is damaged or no longer committed, `ConfigError` if no token of the batch
        counts.
        """
        prompts = self.order.step(step)
        blocks = self._load_blocks(np.unique(prompts // self.order.prompts_per_block).tolist())
        batch = self._gather(step, prompts, blocks.__getitem__)
        if not batch.distinct:
            raise ConfigError(
                f"{str(self.selection) or 'scores'}: none of the {len(batch.rollouts)} rollouts of step {step + 1} "
                "has a token left to train on; leave in more tokens, or raise train.prompts_per_step"
            )
        return batch

    def held_back(self, prompts_per_batch: int) -> Iterator[Batch]:
        """The held-back prompts, in batches to measure on; tokens are selected as for training.

        Raises `CacheError` as `batch` does, `ConfigError` if no token of any of them counts.
        """
        order, nothing = self.order, True
        load = lru_cache(maxsize=1)(self._load)  # leaves the training blocks in memory
        for number, start in enumerate(range(order.n_replayed, order.n_prompts, prompts_per_batch)):
            prompts = np.arange(start, min(start + prompts_per_batch, order.n_prompts))
            if (batch := self._gather(number, prompts, load)).distinct:
                nothing = False
                yield batch
        if nothing:
            raise ConfigError(
                f"{str(self.selection) or 'scores'}: none of the {order.held_back} prompts held back has a token "
                "left to measure on; leave in more tokens, or raise train.heldout_prompts"
            )

    def _gather(self, number: int, prompts: Int64, load: Callable[[int], LoadedBlock]) -> Batch:
        rollouts: list[Rollout] = []
        for prompt in prompts.tolist():
            index, within = divmod(prompt, self.order.prompts_per_block)
            block = load(index)
            rollouts += [Rollout(block, row) for row in block.rows_of(within)]
        if self.selection.by_entropy:
            rollouts = self._most_uncertain(rollouts)
        return Batch(number, tuple(rollouts))

    def _most_uncertain(self, rollouts: list[Rollout]) -> list[Rollout]:
        weights = [rollout.weights for rollout in rollouts]
        entropy_T = np.concatenate([rollout.column(f"{cs.STUDENT}/entropy") for rollout in rollouts])
        selected_T = self.selection.of_batch(np.concatenate(weights), entropy_T)
        parts = np.split(selected_T, np.cumsum([len(w) for w in weights])[:-1])
        return [replace(rollout, selected=part) for rollout, part in zip(rollouts, parts, strict=True)]

    def batches(self, steps: range) -> Generator[Batch]:
        """The batches of `steps`; the next one is read in a thread while one is in use."""
        reader = ThreadPoolExecutor(1, "replay")
        try:
            following = reader.submit(self.batch, steps.start) if steps else None
            for step in steps:
                assert following is not None
                batch = following.result()
                if step + 1 in steps:
                    following = reader.submit(self.batch, step + 1)
                yield batch
        finally:
            reader.shutdown(cancel_futures=True)

    def _load_blocks(self, indices: Sequence[int]) -> dict[int, LoadedBlock]:
        groups: list[cs.BlockGroup[Any]] = [self._round.rollouts, *(group for group, _ in self._groups.values())]
        with self._lock:
            missing = [index for index in indices if index not in self._loaded]
            for index in set(indices) - set(missing):
                self._loaded.move_to_end(index)
            for index, block in zip(missing, cs.read_ahead(self._load, missing, groups), strict=True):
                self._loaded[index] = block
                while len(self._loaded) > self.order.resident_blocks:
                    self._loaded.popitem(last=False)
            return {index: self._loaded[index] for index in indices}

    def _load(self, index: int) -> LoadedBlock:
        rollouts = self._round.rollouts.read(index)
        columns = {
            f"{name}/{array}": value
            for name, (group, arrays) in self._groups.items()
            for array, value in group.read_arrays(index, arrays).items()
        }
        counts = (rollouts.trained == 1) & self.selection.of_block(rollouts)
        prompts_T = rollouts.token_prompts
        for name in self._groups:
            if (logprobs := columns.get(f"{name}/logprobs")) is not None:
                scored = np.isfinite(logprobs)
                counts &= scored | ~self._taught[name][prompts_T] if name in self._taught else scored
        for derive in self._derived:
            columns |= derive(rollouts)
        return LoadedBlock(rollouts, columns, counts.astype(np.float32))
