"""The cache of one NSA layer: one append, one view.

It holds the selected branch's keys and values whole, the window branch's newest tokens in a rolling buffer, and the
compressed stream, which gains a token every d tokens after the first l. Nothing is copied for each token: buffers grow
by doubling, and rolling ones move their contents to the front when they are full.

Rows are left-aligned: row b's tokens are at positions 0 .. lengths[b]-1, whatever padding they came with, and rows may
differ in length. Buffers are `[B, Hkv, S, D]`, so that a head's tokens lie together; the view shows `[B, S, Hkv, D]`.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from nsa.geometry import BRANCHES, BlockGeometry
from nsa.ops.cache_view import CacheView

Pair = tuple[Tensor, Tensor]
Compress = Callable[[Tensor, Tensor, list[int], list[int]], Pair]


@dataclass(frozen=True)
class Reads:
    """Tokens that one decode step reads for each group, `[B]` lists by branch (SPEC: N(S) + n l' + min(w, S))."""

    predicted: dict[str, list[int]]
    done: dict[str, list[int]]


class NSACache:
    """Keys and values of one layer for decoding.

    Args:
        geometry: block sizes of the layer.

    >>> from nsa import BlockGeometry, NSAAttention
    >>> layer = NSAAttention(64, num_heads=4, num_kv_heads=2, geometry=BlockGeometry(8, 4, 16, 4, window_size=32))
    >>> cache = NSACache(layer.geometry)
    >>> with torch.no_grad():
    ...     prompt = layer(torch.randn(1, 50, 64), cache=cache)
    ...     token = layer(torch.randn(1, 1, 64), cache=cache)
    >>> cache.lengths
    (51,)
    """

    def __init__(self, geometry: BlockGeometry) -> None:
        self.geometry = geometry
        self.reset()

    def reset(self) -> None:
        """Forget everything."""
        self.lengths: tuple[int, ...] = ()
        self._raw = GrowingBuffer(multiple=self.geometry.select_block_size)
        self._compressed = GrowingBuffer(multiple=1)
        self._window = RollingBuffer(self.geometry.window_size - 1)
        self._tail = RollingBuffer(self.geometry.compress_block_size - 1)
        self.last_block_indices: Tensor | None = None

    def append(
        self,
        selected: Pair,
        window: Pair | None,
        to_compress: Pair,
        compress: Compress,
        num_new: Sequence[int] | None = None,
    ) -> CacheView:
        """Add tokens to every row and return the view that their queries read.

        Args:
            selected, window, to_compress: keys `[B, T, Hkv, Dk]` and values `[B, T, Hkv, Dv]` of each branch; None for
                a window branch that reads what the selected one does.
            compress: maps keys and values of whole blocks `[B', L, Hkv, D]`, the rows that they belong to, and the
                position of the first token of each row, to compressed keys and values.
            num_new: how many of the T tokens of each row are real (the first ones); all unless given.

        Raises:
            ValueError: the batch differs from what the cache holds, `num_new` does not fit, or gradients are needed.
        """
        batch, length = selected[0].shape[:2]
        num_new = self.check_new(selected[0], num_new)
        old = self.lengths or (0,) * batch
        self._raw.write(selected, old, num_new)
        if window is None:
            (k_win, v_win), win_start = self._raw.view(), (0,) * batch
        else:
            (k_win, v_win), win_start = self._window.append(window, old, num_new)
        tail, tail_start = self._tail.append(to_compress, old, num_new)
        self._compress(tail, tail_start, old, num_new, length, compress)
        self.lengths = tuple(a + n for a, n in zip(old, num_new, strict=True))
        return CacheView(
            *self._raw.view(), *self._compressed.view(), k_win, v_win, self.lengths, num_new, tuple(win_start)
        )

    @property
    def reads(self) -> Reads:
        """Tokens read by the last step, predicted by the geometry and counted from the blocks that were chosen."""
        if self.last_block_indices is None:
            raise ValueError("no decode step has run on this cache yet")
        block = self.geometry.select_block_size
        selected = []
        for s, rows in zip(self.lengths, self.last_block_indices[:, -1].tolist(), strict=True):
            tokens = [sum(min(block, s - j * block) for j in set(group) if j >= 0) for group in rows]
            selected.append(max(tokens))
        rows = [self.geometry.predicted_reads(s) for s in self.lengths]
        predicted = {branch: [row[branch] for row in rows] for branch in BRANCHES}
        return Reads(predicted, done=predicted | {"slc": selected})

    def reorder(self, index: Tensor) -> None:
        """Replace row b by row index[b], as beam search asks for; `index` may be of another length than the batch."""
        for buffer in (self._raw, self._compressed, self._window, self._tail):
            buffer.reorder(index)
        self.lengths = tuple(self.lengths[i] for i in index.tolist())
        self.last_block_indices = None

    def repeat(self, repeats: int) -> None:
        """Repeat every row `repeats` times, each row's copies together."""
        if self.lengths:
            self.reorder(torch.arange(len(self.lengths)).repeat_interleave(repeats))

    def check_new(self, x: Tensor, num_new: Sequence[int] | None) -> tuple[int, ...]:
        """The number of real tokens of each row of `x` `[B, T, ...]`, all T unless `num_new` tells.

        Raises:
            ValueError: as `append` does.
        """
        batch, length = x.shape[:2]
        num_new = (length,) * batch if num_new is None else tuple(int(n) for n in num_new)
        if self.lengths and batch != len(self.lengths):
            raise ValueError(
                f"the cache holds {len(self.lengths)} rows but {batch} were appended; use reorder() or a new cache"
            )
        if len(num_new) != batch or not all(0 <= n <= length for n in num_new):
            raise ValueError(f"num_new must give 0..{length} for each of {batch} rows, not {list(num_new)}")
        if torch.is_grad_enabled() and x.requires_grad:
            raise ValueError("the cache keeps no gradients: decode under torch.no_grad(), or train without a cache")
        return num_new

    def _compress(
        self,
        tail: Pair,
        start: list[int],
        old: tuple[int, ...],
        num_new: tuple[int, ...],
        max_new: int,
        compress: Compress,
    ) -> None:
        """Emit the compressed tokens whose blocks the new tokens complete; room for all of `max_new` is made."""
        count = self.geometry.num_compressed
        stride, size = self.geometry.compress_stride, self.geometry.compress_block_size
        first = [count(a) for a in old]
        emitted = [count(a + n) - f for a, n, f in zip(old, num_new, first, strict=True)]
        self._compressed.reserve(tail, count(max(old) + max_new))
        rows_by_shape: dict[tuple[int, int], list[int]] = {}
        for row, number in enumerate(emitted):
            if number:
                rows_by_shape.setdefault((first[row] * stride - start[row], number), []).append(row)
        for (offset, number), rows in rows_by_shape.items():
            end = offset + (number - 1) * stride + size
            whole = len(rows) == len(old)
            k, v = (x[:, offset:end] if whole else x[rows, offset:end] for x in tail)
            positions = [first[row] * stride for row in rows]
            self._compressed.write_rows(compress(k, v, rows, positions), rows, [first[row] for row in rows])


class GrowingBuffer:
    """Keys and values `[B, Hkv, S, D]` written at each row's end; the capacity S grows by doubling."""

    def __init__(self, multiple: int) -> None:
        self.multiple = multiple
        self.pair: Pair | None = None

    def view(self) -> Pair:
        assert self.pair is not None
        return self.pair[0].transpose(1, 2), self.pair[1].transpose(1, 2)

    def reserve(self, like: Pair, capacity: int) -> None:
        """Make room; `like` tells batch, heads, sizes and dtype."""
        held = 0 if self.pair is None else self.pair[0].shape[2]
        if self.pair is not None and capacity <= held:
            return
        capacity = max(capacity, 2 * held)
        capacity = -(-capacity // self.multiple) * self.multiple
        grown = []
        for i, x in enumerate(like):
            # Zeros, not empty: an entry that no query sees is multiplied by a weight of 0, which must give 0.
            buffer = x.new_zeros(x.shape[0], x.shape[2], capacity, x.shape[3])
            if self.pair is not None:
                buffer[:, :, :held] = self.pair[i]
            grown.append(buffer)
        self.pair = (grown[0], grown[1])

    def write(self, new: Pair, offsets: Sequence[int], counts: Sequence[int]) -> None:
        """Write the first counts[b] tokens of row b at offsets[b]."""
        self.reserve(new, max(o + c for o, c in zip(offsets, counts, strict=True)))
        assert self.pair is not None
        for buffer, x in zip(self.pair, new, strict=True):
            _write(buffer, x, offsets, counts)

    def write_rows(self, new: Pair, rows: list[int], offsets: list[int]) -> None:
        """Write all tokens of `new` into some rows of the buffer."""
        assert self.pair is not None
        for buffer, x in zip(self.pair, new, strict=True):
            if len(rows) == buffer.shape[0]:
                _write(buffer, x, offsets, [x.shape[1]] * len(rows))
            else:
                for i, row in enumerate(rows):
                    buffer[row, :, offsets[i] : offsets[i] + x.shape[1]] = x[i].transpose(0, 1)

    def reorder(self, index: Tensor) -> None:
        if self.pair is not None:
            k, v = (x.index_select(0, index.to(x.device)) for x in self.pair)
            self.pair = (k, v)


class RollingBuffer:
    """At least the newest `keep` tokens of each row; entry i of row b has position start[b] + i."""

    def __init__(self, keep: int) -> None:
        self.keep = keep
        self.capacity = max(16, 2 * keep)
        self.buffer = GrowingBuffer(multiple=1)
        self.start: list[int] = []

    def append(self, new: Pair, old: tuple[int, ...], num_new: tuple[int, ...]) -> tuple[Pair, list[int]]:
        """Add tokens at positions old[b]..; returns what is held, the newest `keep` before them included."""
        if not self.start:
            self.start = [0] * len(old)
            self.buffer.reserve(new, self.capacity)
        ends = [a + n - s for a, n, s in zip(old, num_new, self.start, strict=True)]
        if max(ends) > self.capacity:
            kept = [min(self.keep, a - s) for a, s in zip(old, self.start, strict=True)]
            if max(k + n for k, n in zip(kept, num_new, strict=True)) > self.capacity:
                return self._append_long(new, old, num_new, kept)
            self._move_to_front(old, kept)
        self.buffer.write(new, [a - s for a, s in zip(old, self.start, strict=True)], num_new)
        return self.buffer.view(), list(self.start)

    def reorder(self, index: Tensor) -> None:
        self.buffer.reorder(index)
        if self.start:
            self.start = [self.start[i] for i in index.tolist()]

    def _move_to_front(self, old: tuple[int, ...], kept: list[int]) -> None:
        assert self.buffer.pair is not None
        for row, (length, number) in enumerate(zip(old, kept, strict=True)):
            first = length - number - self.start[row]
            for x in self.buffer.pair:
                x[row, :, :number] = x[row, :, first : first + number].clone()
            self.start[row] = length - number

    def _append_long(
        self, new: Pair, old: tuple[int, ...], num_new: tuple[int, ...], kept: list[int]
    ) -> tuple[Pair, list[int]]:
        """A chunk beyond the capacity: show it behind the kept tokens, hold on to its newest ones only."""
        self._move_to_front(old, kept)
        whole = GrowingBuffer(multiple=1)
        whole.reserve(new, max(k + n for k, n in zip(kept, num_new, strict=True)))
        assert self.buffer.pair is not None
        whole.write((self.buffer.pair[0].transpose(1, 2), self.buffer.pair[1].transpose(1, 2)), [0] * len(old), kept)
        whole.write(new, kept, num_new)
        start = list(self.start)
        newest = [min(self.keep, k + n) for k, n in zip(kept, num_new, strict=True)]
        for row, number in enumerate(newest):
            end = kept[row] + num_new[row]
            assert whole.pair is not None
            for x, source in zip(self.buffer.pair, whole.pair, strict=True):
                x[row, :, :number] = source[row, :, end - number : end]
            self.start[row] = old[row] + num_new[row] - number
        return whole.view(), start


def _write(buffer: Tensor, new: Tensor, offsets: Sequence[int], counts: Sequence[int]) -> None:
    """`new` `[B, T, Hkv, D]` into `buffer` `[B, Hkv, S, D]`, row by row, or at once where the rows are alike."""
    new = new.transpose(1, 2)
    if len(set(offsets)) == 1 and len(set(counts)) == 1:
        buffer[:, :, offsets[0] : offsets[0] + counts[0]] = new[:, :, : counts[0]]
    else:
        for row, (offset, count) in enumerate(zip(offsets, counts, strict=True)):
            buffer[row, :, offset : offset + count] = new[row, :, :count]
