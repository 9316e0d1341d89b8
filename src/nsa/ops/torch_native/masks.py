"""What the queries of a tile see: the range of keys worth multiplying, and a bias of -inf on the rest.

A mask gives the smallest range of key rows that holds everything the queries at positions `first` .. `last` see, and
hides in their scores what a single query does not see. Only the ragged edges of a tile need that. Scores may come
transposed (keys outermost in memory); a bias follows their layout, because adding it is cheap only where both run the
same way. A mask lives for one call and keeps the biases that its tiles share.

Shapes: scores `[b, k, R, C, S]` for C queries and S keys of b batch rows and k groups.
"""

from __future__ import annotations

from collections.abc import Callable
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
    max_queries: int  # of a tile

    def keys(self, first: int, last: int) -> tuple[int, int]:
        """Rows start .. stop-1 of the keys, zeros appended, that hold all that queries first .. last see."""
        ...

    def hide(self, scores: Tensor, tile: Tile) -> None:
        """Add -inf where a query of the tile does not see a key of the tile."""
        ...


class Biases:
    """Biases `[C, S]` of 0 and -inf in the layout of the scores they are added to, each made once."""

    def __init__(self) -> None:
        self._made: dict[tuple[int | bool, ...], Tensor] = {}

    def add(self, scores: Tensor, hidden: Callable[[Tensor, Tensor], Tensor], *key: int) -> None:
        """scores += -inf where `hidden(query number, column number)`; `key` and the shape identify the bias."""
        num_queries, num_columns = scores.shape[-2:]
        if num_columns == 0:
            return
        transposed = scores.stride(-1) != 1
        name = (transposed, num_queries, num_columns, *key)
        if name not in self._made:
            query = torch.arange(num_queries, device=scores.device)[:, None]
            column = torch.arange(num_columns, device=scores.device)
            self._made[name] = bias_like(scores, hidden(query, column))
        scores.add_(self._made[name])


def bias_like(scores: Tensor, hidden: Tensor) -> Tensor:
    """-inf where `hidden`, else 0, with the memory order of the last two dimensions of `scores`."""
    if scores.stride(-1) != 1:
        hidden = hidden.transpose(-1, -2).contiguous().transpose(-1, -2)
    return torch.zeros_like(hidden, dtype=scores.dtype).masked_fill_(hidden, -torch.inf)


class CompressedMask:
    """Compressed token i is visible to t when i d + l - 1 <= t.

    Ranges of keys are rounded up, past the last token too: oneDNN compiles a kernel for each new shape.
    """

    max_queries = 256

    def __init__(self, geometry: BlockGeometry) -> None:
        self.geometry, self.biases = geometry, Biases()

    def keys(self, first: int, last: int) -> tuple[int, int]:
        seen = self.geometry.num_compressed(last + 1)
        step = 32 if seen <= 512 else 64
        return 0, -(-seen // step) * step

    def hide(self, scores: Tensor, tile: Tile) -> None:
        # Columns before `seen` are visible to the tile's first query, hence to all.
        seen = self.geometry.num_compressed(tile.first + 1)
        stride = self.geometry.compress_stride
        until_next = seen * stride + self.geometry.compress_block_size - 1 - tile.first
        self.biases.add(scores[..., seen:], lambda query, i: i * stride + until_next > query, until_next)


class WindowMask:
    """Key at position s is visible to t when t-w < s <= t; row 0 of the keys is at position `k_start`."""

    def __init__(self, geometry: BlockGeometry, k_start: int) -> None:
        self.window_size, self.k_start, self.biases = geometry.window_size, k_start, Biases()
        # A tile multiplies max_queries - 1 keys more than a window has.
        self.max_queries = 128 if self.window_size > 128 else 64

    def keys(self, first: int, last: int) -> tuple[int, int]:
        return max(0, first - self.window_size + 1) - self.k_start, last + 1 - self.k_start

    def hide(self, scores: Tensor, tile: Tile) -> None:
        num_queries = scores.shape[-2]
        hide_future(self.biases, scores)
        # Query c sees columns from c - late on.
        late = max(0, self.window_size - 1 - tile.first)
        before = scores[..., : max(0, min(num_queries - 1 - late, scores.shape[-1]))]
        self.biases.add(before, lambda query, column: column < query - late, late)


def hide_future(biases: Biases, scores: Tensor) -> None:
    """Hide the keys after each query, where the last column is the last query's own position."""
    own = scores[..., max(0, scores.shape[-1] - scores.shape[-2]) :]
    offset = own.shape[-1] - own.shape[-2]
    biases.add(own, lambda query, column: column > query + offset, -1)
