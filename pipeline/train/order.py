"""The order in which a round's prompts are replayed: a pure function of (seed, epoch, step). numpy only.

An epoch permutes the blocks and shuffles the prompts inside windows of `window_blocks` blocks; all epochs form one
stream. Step s takes the prompts [s * P, (s + 1) * P) of that stream. Steps and epochs count from 0.
"""

from __future__ import annotations

from dataclasses import dataclass
from functools import lru_cache

import numpy as np
import numpy.typing as npt

from pipeline.errors import ConfigError

Int64 = npt.NDArray[np.int64]


@dataclass(frozen=True)
class Order:
    """The replay order of a round, a function of these fields only.

    Attributes:
        n_prompts, prompts_per_block: of the round.
        prompts_per_step: P, the size of a global batch.
        window_blocks: blocks shuffled together, and therefore in memory together.
        held_back: number of prompts at the round's end that are never replayed.
    """

    n_prompts: int
    prompts_per_block: int
    prompts_per_step: int
    window_blocks: int
    seed: int
    held_back: int = 0

    def __post_init__(self) -> None:
        if self.held_back >= self.n_prompts:
            raise ConfigError(
                f"train.heldout_prompts = {self.held_back}: the round holds {self.n_prompts} prompts, so none is "
                "left to train on; lower it, or sample a round of more prompts"
            )

    @property
    def n_replayed(self) -> int:
        """Prompts of an epoch."""
        return self.n_prompts - self.held_back

    def epoch(self, epoch: int) -> Int64:
        """[n_replayed]: every prompt that is not held back, in the order of this epoch."""
        return _epoch_order(self, epoch)

    def step(self, step: int) -> Int64:
        """[P]: the prompts of a step, in stream order. A step may reach from one epoch into the next."""
        positions = np.arange(step * self.prompts_per_step, (step + 1) * self.prompts_per_step)
        epochs, offsets = np.divmod(positions, self.n_replayed)
        return np.concatenate([self.epoch(int(e))[offsets[epochs == e]] for e in np.unique(epochs)])

    @property
    def resident_blocks(self) -> int:
        """Blocks to keep in memory: those of the windows that a step and the next one can touch."""
        windows = 1 + -(-self.prompts_per_step // (self.window_blocks * self.prompts_per_block))
        return self.window_blocks * windows


@lru_cache(maxsize=4)
def _epoch_order(order: Order, epoch: int) -> Int64:
    # Raw bits of a bit generator are stable across numpy releases (NEP 19); `Generator.permutation` is not.
    bits = np.random.PCG64(np.random.SeedSequence([order.seed, epoch]))

    def shuffled(values: Int64) -> Int64:
        return values[np.argsort(bits.random_raw(len(values)), kind="stable")]

    blocks = shuffled(np.arange(-(-order.n_replayed // order.prompts_per_block)))
    prompts = blocks[:, None] * order.prompts_per_block + np.arange(order.prompts_per_block)
    windows = []
    for start in range(0, len(blocks), order.window_blocks):
        window = prompts[start : start + order.window_blocks].ravel()
        windows.append(shuffled(window[window < order.n_replayed]))
    result = np.concatenate(windows)
    result.setflags(write=False)  # shared by every caller
    return result
