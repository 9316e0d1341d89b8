"""Packed documents as batches: cut them out, run a kernel that knows batches only, put the results back.

Documents of similar length share one batch, padded on the right with zeros; causality makes that padding harmless.
Documents of one length that stand next to each other are a view, without a copy.

Legend: x `[1, total, ...]` is packed, `[docs, width, ...]` is a batch.
"""

from __future__ import annotations

import enum
import itertools
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import lru_cache
from typing import Any

import torch
from torch import Tensor

from nsa.geometry import BlockGeometry


class Side(enum.Enum):
    """What the rows of a packed tensor are: tokens, or the compressed tokens of all documents one after another."""

    TOKENS = "tokens"
    COMPRESSED = "compressed"


@dataclass(frozen=True)
class Rows:
    """Where the rows of some documents stand in a packed tensor: document i has starts[i] .. starts[i]+lengths[i]-1."""

    starts: tuple[int, ...]
    lengths: tuple[int, ...]
    width: int

    @property
    def span(self) -> slice | None:
        """The rows of all documents where each has exactly `width` rows and they stand without gaps."""
        first = self.starts[0]
        places = zip(self.starts, self.lengths, strict=True)
        if all(start == first + i * self.width and n == self.width for i, (start, n) in enumerate(places)):
            return slice(first, first + len(self.starts) * self.width)
        return None

    def _places(self, device: torch.device) -> tuple[Tensor, Tensor]:
        """Rows in the packed tensor, and the same rows' places in the flattened batch."""
        packed = [torch.arange(s, s + n) for s, n in zip(self.starts, self.lengths, strict=True)]
        batch = [torch.arange(i * self.width, i * self.width + n) for i, n in enumerate(self.lengths)]
        return torch.cat(packed).to(device), torch.cat(batch).to(device)

    def gather(self, x: Tensor) -> Tensor:
        """`[1, total, ...] -> [docs, width, ...]`, zeros after the end of a document."""
        if self.span is not None:
            return x[0, self.span].unflatten(0, (len(self.starts), self.width))
        packed, batch = self._places(x.device)
        out = x.new_zeros(len(self.starts) * self.width, *x.shape[2:])
        return out.index_copy_(0, batch, x[0].index_select(0, packed)).unflatten(0, (len(self.starts), self.width))

    def scatter(self, y: Tensor, out: Tensor) -> None:
        """Write the batch's real rows into the packed `out`."""
        if self.span is not None:
            out[0, self.span] = y.flatten(0, 1)
            return
        packed, batch = self._places(out.device)
        out[0].index_copy_(0, packed, y.flatten(0, 1).index_select(0, batch))


@dataclass(frozen=True)
class Bucket:
    """Documents that run as one batch."""

    tokens: Rows
    compressed: Rows

    def rows(self, side: Side) -> Rows:
        return self.tokens if side is Side.TOKENS else self.compressed


def _bucket_width(length: int) -> int:
    """Lengths that share a batch: the next of 8, 10, 12, 14, 16, 20, ... (at most a quarter of padding)."""
    step = max(2, 1 << max(0, (length - 1).bit_length() - 3))
    return -(-length // step) * step


@lru_cache(maxsize=64)
def cut(bounds: tuple[int, ...], geometry: BlockGeometry) -> tuple[Bucket, ...]:
    """Group the documents between `bounds` into buckets; empty documents are left out."""
    groups: dict[int, list[tuple[int, int, int]]] = {}
    first = 0
    for start, end in itertools.pairwise(bounds):
        if end > start:
            groups.setdefault(_bucket_width(end - start), []).append((start, end - start, first))
            first += geometry.num_compressed(end - start)
    if not groups:
        return (Bucket(Rows((0,), (0,), 0), Rows((0,), (0,), 0)),)
    buckets = []
    for group in groups.values():
        starts, lengths, firsts = (tuple(column) for column in zip(*group, strict=True))
        counts = tuple(geometry.num_compressed(n) for n in lengths)
        width = max(lengths)
        buckets.append(Bucket(Rows(starts, lengths, width), Rows(firsts, counts, geometry.num_compressed(width))))
    return tuple(buckets)


def by_document(
    kernel: Callable[..., tuple[Tensor, ...]],
    cu_seqlens: Tensor | None,
    geometry: BlockGeometry,
    inputs: Sequence[tuple[Tensor | None, Side]],
    outputs: Sequence[tuple[int, Side]],
    *,
    give_width: bool = False,
) -> Any:
    """Run `kernel` on the batch, or on each bucket of packed documents, and pack its results.

    Args:
        inputs: the kernel's tensors and what their rows are; None passes through.
        outputs: rows of each packed result, and what they are. Rows of no document are zero.
        give_width: also give the kernel the number of tokens of the (padded) documents.
    """
    if cu_seqlens is None:
        return kernel(*(x for x, _ in inputs), *([outputs[0][0]] if give_width else []))
    buckets = cut(tuple(cu_seqlens.tolist()), geometry)
    packed: list[Tensor] = []
    for bucket in buckets:
        batch = (None if x is None else bucket.rows(side).gather(x) for x, side in inputs)
        results = kernel(*batch, *([bucket.tokens.width] if give_width else []))
        if not packed:
            packed = [y.new_zeros(1, total, *y.shape[2:]) for y, (total, _) in zip(results, outputs, strict=True)]
        for y, out, (_, side) in zip(results, packed, outputs, strict=True):
            bucket.rows(side).scatter(y, out)
    return tuple(packed)
