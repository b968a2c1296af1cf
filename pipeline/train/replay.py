"""Which cached rollouts a training step sees, and in which micro-batches. numpy only.

The order is a pure function of (seed, epoch, step): an epoch permutes the blocks, shuffles the prompts (each with
all its rollouts) inside windows of `window_blocks` blocks, and the epochs follow one another as one stream. Step s
takes the prompts [s * P, (s + 1) * P) of that stream. Only then are its rollouts packed by token budget and dealt
to ranks, so the global batch is the same for every world size, micro-batch budget and resume point.

Shapes: T response positions of a rollout or a block. Steps and epochs count from 0.
"""

from __future__ import annotations

import threading
from collections import OrderedDict
from collections.abc import Generator, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from functools import cached_property, lru_cache
from typing import Any

import numpy as np
import numpy.typing as npt

import cache_schema as cs
from pipeline.train.packs import deal, pack_rows

Array = npt.NDArray[Any]
Int64 = npt.NDArray[np.int64]


@dataclass(frozen=True)
class Order:
    """The replay order of a round. Its fields are all that it depends on.

    Attributes:
        n_prompts, prompts_per_block: of the round.
        prompts_per_step: P, the size of a global batch.
        window_blocks: blocks whose prompts are shuffled together, and so are in memory together.
    """

    n_prompts: int
    prompts_per_block: int
    prompts_per_step: int
    window_blocks: int
    seed: int

    def epoch(self, epoch: int) -> Int64:
        """[n_prompts]: every prompt of the round once, in the order of this epoch."""
        return _epoch_order(self, epoch)

    def step(self, step: int) -> Int64:
        """[P]: the prompts of a step, in stream order. A step may reach from one epoch into the next."""
        positions = np.arange(step * self.prompts_per_step, (step + 1) * self.prompts_per_step)
        epochs, offsets = np.divmod(positions, self.n_prompts)
        return np.concatenate([self.epoch(int(e))[offsets[epochs == e]] for e in np.unique(epochs)])

    @property
    def resident_blocks(self) -> int:
        """Blocks worth keeping: those of the windows that a step and the next one can reach into."""
        windows = 1 + -(-self.prompts_per_step // (self.window_blocks * self.prompts_per_block))
        return self.window_blocks * windows


@lru_cache(maxsize=4)
def _epoch_order(order: Order, epoch: int) -> Int64:
    # Raw bits of a bit generator are stable across numpy releases (NEP 19); `Generator.permutation` is not.
    bits = np.random.PCG64(np.random.SeedSequence([order.seed, epoch]))

    def shuffled(values: Int64) -> Int64:
        return values[np.argsort(bits.random_raw(len(values)), kind="stable")]

    blocks = shuffled(np.arange(-(-order.n_prompts // order.prompts_per_block)))
    prompts = blocks[:, None] * order.prompts_per_block + np.arange(order.prompts_per_block)
    windows = []
    for start in range(0, len(blocks), order.window_blocks):
        window = prompts[start : start + order.window_blocks].ravel()
        windows.append(shuffled(window[window < order.n_prompts]))
    result = np.concatenate(windows)
    result.setflags(write=False)  # shared by every caller
    return result


@dataclass(frozen=True)
class LoadedBlock:
    """A block's rollouts with the columns that training needs, all [T, ...] over the block's response tokens.

    Attributes:
        columns: by `<scorer>/<array>`, e.g. `teacher/candidate_logprobs`.
        weights: f4 [T], what a token counts for in the loss: 1 if it is `trained` and scored, else 0.
    """

    rollouts: cs.RolloutBlock
    columns: Mapping[str, Array]
    weights: npt.NDArray[np.float32]

    def rows_of(self, prompt: int) -> range:
        """Rollouts of the block's prompt number `prompt`."""
        first, last = np.searchsorted(self.rollouts.row_prompt, [prompt, prompt + 1])
        return range(int(first), int(last))


@dataclass(frozen=True)
class Rollout:
    """One cached rollout: a row of a loaded block, nothing copied."""

    block: LoadedBlock
    row: int

    @property
    def prompt_index(self) -> int:
        return int(self.block.rollouts.prompt_index[self.block.rollouts.row_prompt[self.row]])

    @property
    def prompt_ids(self) -> Array:
        return self.block.rollouts.prompt(self.row)

    @property
    def token_ids(self) -> Array:
        """Prompt and response, end to end."""
        return np.concatenate([self.prompt_ids, self.block.rollouts.response(self.row)])

    @property
    def n_tokens(self) -> int:
        """Tokens that a forward pass reads, prompt included."""
        rollouts = self.block.rollouts
        return int(rollouts.prompt_length[rollouts.row_prompt[self.row]] + rollouts.response_length[self.row])

    @property
    def weights(self) -> npt.NDArray[np.float32]:
        return self.block.weights[self.block.rollouts.response_slice(self.row)]

    @property
    def content(self) -> tuple[object, ...]:
        """Equal for rollouts that teach the same: prompt, response, weights, candidates (which may be drawn), and
        which of them a teacher told.
        """
        ids = [self.column(name).tobytes() for name in self.block.columns if name.endswith("_ids")]
        ids += [np.isnan(self.column(n)).tobytes() for n in self.block.columns if n.endswith("/candidate_logprobs")]
        response = self.block.rollouts.response(self.row)
        return (self.prompt_index, response.tobytes(), self.weights.tobytes(), *ids)

    def column(self, name: str) -> Array:
        """[T, ...] of one of the block's columns."""
        return self.block.columns[name][self.block.rollouts.response_slice(self.row)]


@dataclass(frozen=True)
class MicroBatch:
    """Rollouts for one forward and backward.

    Attributes:
        copies: how often each occurs in the global batch; it is read once and weighs as much as all of them.
        counts: False for padding, which must add nothing to the gradient.
    """

    rollouts: tuple[Rollout, ...]
    copies: tuple[int, ...]
    counts: bool = True

    def column(self, name: str) -> Array:
        """[T, ...] over all response tokens, in packed order."""
        return np.concatenate([rollout.column(name) for rollout in self.rollouts])

    @property
    def copies_T(self) -> Int64:
        """i8 [T]: how often each token occurs in the global batch."""
        return np.repeat(self.copies, [len(rollout.weights) for rollout in self.rollouts])

    @property
    def weights(self) -> npt.NDArray[np.float32]:
        """f4 [T]: what each token counts for, all its copies together; zeros where the micro-batch is padding."""
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
        """Each different rollout with the number of its copies, in order of first occurrence.

        A student that is sure of itself answers alike most of the time, and equal rollouts have equal gradients.
        """
        copies: dict[tuple[object, ...], list[Rollout]] = {}
        for rollout in self.rollouts:
            copies.setdefault(rollout.content, []).append(rollout)
        return tuple((same[0], len(same)) for same in copies.values())

    def micro_batches(self, tokens_per_microbatch: int, rank: int = 0, world: int = 1) -> list[MicroBatch]:
        """This rank's share: as many micro-batches as every other rank has, so that collectives match."""
        packs = pack_rows([rollout.n_tokens for rollout, _ in self.distinct], tokens_per_microbatch, world)
        shares = []
        for pack in deal(packs, rank, world):
            if pack is None:
                shortest = min((rollout for rollout, _ in self.distinct), key=lambda rollout: rollout.n_tokens)
                shares.append(MicroBatch((shortest,), (1,), counts=False))
            else:
                rollouts, copies = zip(*(self.distinct[i] for i in pack), strict=True)
                shares.append(MicroBatch(rollouts, copies))
        return shares


class Replay:
    """Batches of a round, read from its cache block by block and digest-checked.

    Args:
        columns: arrays to read, by scorer, e.g. `{"teacher": ("logprobs", "rest_logprob")}`.
    """

    def __init__(self, round_: cs.Round, columns: Mapping[str, Sequence[str]], order: Order):
        self.order = order
        self._round = round_
        self._groups = {name: (round_.scores(name), tuple(arrays)) for name, arrays in columns.items()}
        self._loaded: OrderedDict[int, LoadedBlock] = OrderedDict()
        self._lock = threading.Lock()

    def batch(self, step: int) -> Batch:
        """The global batch of a step. Raises `CacheError` where a block is damaged or no longer committed."""
        rollouts: list[Rollout] = []
        for prompt in self.order.step(step).tolist():
            index, within = divmod(prompt, self.order.prompts_per_block)
            block = self._block(index)
            rollouts += [Rollout(block, row) for row in block.rows_of(within)]
        return Batch(step, tuple(rollouts))

    def batches(self, steps: range) -> Generator[Batch]:
        """The batches of `steps`, each read in a thread while the one before is in use."""
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

    def _block(self, index: int) -> LoadedBlock:
        with self._lock:
            if index not in self._loaded:
                self._loaded[index] = self._load(index)
                while len(self._loaded) > self.order.resident_blocks:
                    self._loaded.popitem(last=False)
            self._loaded.move_to_end(index)
            return self._loaded[index]

    def _load(self, index: int) -> LoadedBlock:
        rollouts = self._round.rollouts.read(index)
        columns = {
            f"{name}/{array}": value
            for name, (group, arrays) in self._groups.items()
            for array, value in group.read_arrays(index, arrays).items()
        }
        counts = rollouts.trained == 1
        for name, value in columns.items():
            if name.endswith("/logprobs"):  # what a scorer has not told of is nothing to learn from
                counts &= np.isfinite(value)
        return LoadedBlock(rollouts, columns, counts.astype(np.float32))
