"""How much of a device's memory a streamed scorer may take, what takes it, and how long a wave then is."""

from __future__ import annotations

import torch

from pipeline.disk import readable
from pipeline.errors import ConfigError
from pipeline.models.load import free_bytes

# Beyond it a wave gains nothing: a card computes so many tokens far longer than its link takes for the weights, a CPU
# longer than its disk does. It would only hold up finished blocks.
_MOST_WAVE_TOKENS = {"cuda": 131_072, "cpu": 16_384}
# Of what is free; on the CPU the rest is left to the file cache, from which weights are read.
_SHARE_OF_FREE = {"cuda": 0.9, "cpu": 0.5}
# Workspaces of libraries, and how far the allocator may be from the sum of what is in use.
_LIBRARY_BYTES = {"cuda": 2**28, "cpu": 2**26}
_MARGIN = 1.15
_GIB = 2**30


class WaveBudget:
    """What of a device's memory goes where.

    Attributes:
        budget: bytes to be used at most.
        taken: bytes that are, or will be, in use, by what for.
    """

    def __init__(self, device: torch.device, gib: float | None):
        self._device, self._gib = device, gib
        self.budget = int(gib * _GIB if gib else _SHARE_OF_FREE[device.type] * free_bytes(device))
        self.taken = {"libraries": _LIBRARY_BYTES[device.type]}

    def take(self, what: str, nbytes: float) -> None:
        """Raises `ConfigError` where it is too much."""
        self.taken[what] = self.taken.get(what, 0) + int(nbytes)
        if (needed := sum(self.taken.values())) > self.budget:
            shown = ", ".join(f"{what} {readable(nbytes)}" for what, nbytes in self.taken.items())
            given = f"score.memory_gib = {self._gib:g}" if self._gib else f"free memory ({self._device.type})"
            raise ConfigError(
                f"{given}: expected at least {needed / _GIB:.2f} GiB to stream this model ({shown}), got "
                f"{self.budget / _GIB:.2f}; give it more, or lower score.rows_per_chunk, or score.tile_tokens if no "
                "rollout is as long"
            )

    def take_wave(self, tile_tokens: int, waiting: float, working: float, head: float) -> int:
        """Take the memory of a wave that is as long as is useful, and return its tokens.

        Args:
            tile_tokens: what a wave has at least: the longest tile's tokens.
            waiting: bytes of a token while other tiles are computed.
            working: bytes of a token in the tile that a layer works on, beside those.
            head: bytes for the logits.
        """
        self.take(
            f"a tile of {tile_tokens:,} tokens", _MARGIN * max(working * tile_tokens, head) + waiting * tile_tokens
        )
        room = self.budget - sum(self.taken.values())
        more = max(0, min(int(room / waiting), _MOST_WAVE_TOKENS[self._device.type] - tile_tokens))
        self.take(f"a wave of {tile_tokens + more:,}", more * waiting)
        return tile_tokens + more
