"""What the queries of a tile see: the range of keys worth multiplying, and a bias of -inf on the rest.

A mask gives the smallest range of key rows that holds everything the queries at positions `first` .. `last` see, and
hides in their scores what a single query does not see. Scores may come transposed (keys outermost in memory); the
bias follows their layout, because adding it is cheap only where both run the same way.

Shapes: scores `[b, k, R, C, S]` for C queries and S keys of b batch rows and k groups.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import NamedTuple, Protocol

import torch
from torch import Tensor

from nsa.geometry import BlockGeometry


class Tile(NamedTuple):
    """Queries of some batch rows and groups against key rows; the first query's position is `first`."""

    batch: slice
    groups: slice
    queries: slice
    keys: slice
    first: int


class Mask(Protocol):
    def keys(self, first: int, last: int) -> tuple[int, int]:
        """Rows start .. stop-1 of the key tensor that queries at positions first .. last may see."""
        ...

    def hide(self, scores: Tensor, tile: Tile) -> None:
        """Add -inf where a query of the tile does not see a key of the tile."""
        ...


def add_bias(scores: Tensor, hidden: Tensor) -> None:
    """scores += -inf where the boolean `hidden` (broadcast) is true, in the memory order of the scores."""
    if scores.stride(-1) != 1:
        hidden = hidden.transpose(-1, -2).contiguous().transpose(-1, -2)
    bias = torch.zeros_like(hidden, dtype=scores.dtype).masked_fill_(hidden, -torch.inf)
    scores.add_(bias)


@dataclass(frozen=True)
class CompressedMask:
    """Compressed token i is visible to t when i d + l - 1 <= t."""

    geometry: BlockGeometry

    def keys(self, first: int, last: int) -> tuple[int, int]:
        return 0, self.geometry.num_compressed(last + 1)

    def hide(self, scores: Tensor, tile: Tile) -> None:
        # Columns before `seen` are visible to the tile's first query, hence to all.
        seen = self.geometry.num_compressed(tile.first + 1)
        scores = scores[..., seen:]
        if scores.shape[-1] == 0:
            return
        columns = torch.arange(seen, seen + scores.shape[-1], device=scores.device)
        last = columns * self.geometry.compress_stride + self.geometry.compress_block_size - 1
        queries = torch.arange(tile.first, tile.first + scores.shape[-2], device=scores.device)
        add_bias(scores, last > queries[:, None])


@dataclass(frozen=True)
class WindowMask:
    """Key at position s is visible to t when t-w < s <= t; row 0 of the keys is at position `k_start`."""

    geometry: BlockGeometry
    k_start: int

    def keys(self, first: int, last: int) -> tuple[int, int]:
        return max(0, first - self.geometry.window_size + 1) - self.k_start, last + 1 - self.k_start

    def hide(self, scores: Tensor, tile: Tile) -> None:
        queries = torch.arange(tile.first, tile.first + scores.shape[-2], device=scores.device)
        keys = torch.arange(tile.keys.start, tile.keys.stop, device=scores.device) + self.k_start
        distance = queries[:, None] - keys
        add_bias(scores, (distance < 0) | (distance >= self.geometry.window_size))
