"""Paged caches of random tokens, and what a step on them must give by the reference.

Everything past a row's length is NaN, in pages, compressed tokens and ring, so that a read of it shows.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from nsa.geometry import BlockGeometry
from nsa.ops import reference
from nsa.ops.cache_view import PagedView

SMALL = BlockGeometry(8, 4, 16, 4, 1, 2, 24)


@dataclass(frozen=True)
class PagedCase:
    """A step: `queries` new tokens for rows of these lengths; `ring` gives the window keys of its own."""

    lengths: tuple[int, ...]
    queries: int = 1
    heads: int = 4
    groups: int = 2
    head_dim: int = 16
    value_head_dim: int = 16
    geometry: BlockGeometry = SMALL
    ring: bool = False
    dtype: torch.dtype = torch.float32


@dataclass
class PagedProblem:
    """Inputs of a step, and the reference's results in fp64 and, `plain`, in the inputs' own precision; on the CPU."""

    q: Tensor
    gates: Tensor
    view: PagedView
    out: Tensor
    plain: Tensor
    blocks: Tensor

    def to(self, device: str) -> tuple[Tensor, PagedView, Tensor]:
        """Queries, view and gates there."""
        view = PagedView(*(None if x is None else x.to(device) for x in self.view))  # pyright: ignore[reportArgumentType]
        return self.q.to(device), view, self.gates.to(device)


def make_problem(case: PagedCase, spare_pages: int = 2, seed: int = 0) -> PagedProblem:
    """Random rows in pages that lie in random order, with `spare_pages` more than the longest row needs."""
    torch.manual_seed(seed)
    geometry, batch, hkv = case.geometry, len(case.lengths), case.groups
    page, each = geometry.select_block_size, geometry.strides_per_select
    num_pages = -(-max(case.lengths) // page) + spare_pages
    pool = batch * num_pages + 3
    table = torch.randperm(pool)[: batch * num_pages].view(batch, num_pages).int()
    sizes = (case.head_dim, case.value_head_dim)
    k, v = (torch.full((pool, hkv, page, size), torch.nan, dtype=case.dtype) for size in sizes)
    k_cmp, v_cmp = (torch.full((pool, hkv, each, size), torch.nan, dtype=case.dtype) for size in sizes)
    ring = geometry.window_size + case.queries + 2
    rings = [torch.full((batch, hkv, ring, size), torch.nan, dtype=case.dtype) for size in sizes]
    q = torch.randn(batch, case.queries, case.heads, case.head_dim).to(case.dtype)
    gates = torch.rand(batch, case.queries, case.heads, 3).to(case.dtype)
    out = torch.zeros(batch, case.queries, case.heads, case.value_head_dim, dtype=torch.float64)
    plain = torch.zeros_like(out)
    blocks = torch.full((batch, case.queries, hkv, geometry.num_selected_blocks), -1, dtype=torch.int32)
    for row, length in enumerate(case.lengths):
        count, new = geometry.num_compressed(length), min(case.queries, length)
        tokens = [torch.randn(length, hkv, size).to(case.dtype) for size in sizes]
        compressed = [torch.randn(count, hkv, size).to(case.dtype) for size in sizes]
        window = [torch.randn(length, hkv, size).to(case.dtype) for size in sizes] if case.ring else tokens
        for store, x, width in zip((k, v, k_cmp, v_cmp), (*tokens, *compressed), (page, page, each, each), strict=True):
            _scatter(store, x, table[row], width)
        for store, x in zip(rings, window, strict=True):
            for position in range(max(0, length - ring), length):
                store[row, :, position % ring] = x[position]
        if new:
            inputs = (q[row, -new:], gates[row, -new:], *tokens, *compressed, *window)
            exact = [x.double() for x in inputs]
            out[row, -new:], blocks[row, -new:] = _expected(geometry, length - new, exact)
            plain[row, -new:] = _expected(geometry, length - new, inputs, blocks[row, -new:])[0].double()
    lengths = torch.tensor(case.lengths, dtype=torch.int32)
    view = PagedView(k, v, k_cmp, v_cmp, table, lengths, *(rings if case.ring else ()))
    return PagedProblem(q, gates, view, out, plain, blocks)


def _scatter(store: Tensor, x: Tensor, pages: Tensor, width: int) -> None:
    for first in range(0, x.shape[0], width):
        part = x[first : first + width]
        store[pages[first // width], :, : part.shape[0]] = part.transpose(0, 1)


def _expected(
    geometry: BlockGeometry, q_start: int, inputs: Sequence[Tensor], blocks: Tensor | None = None
) -> tuple[Tensor, Tensor]:
    """One row by the reference in the inputs' precision, with its own choice of blocks unless they are given."""
    q, gates, k, v, k_cmp, v_cmp, k_win, v_win = (x.unsqueeze(0) for x in inputs)
    scale = q.shape[-1] ** -0.5
    out_cmp, lse = reference.compressed_attention(q, k_cmp, v_cmp, geometry, None, q_start, scale)
    chosen = reference.select_blocks(q, k_cmp, lse, geometry, None, q_start, scale) if blocks is None else blocks[None]
    out_slc, _ = reference.selected_attention(q, k, v, chosen, geometry, None, q_start, scale)
    out_win, _ = reference.window_attention(q, k_win, v_win, geometry, None, q_start, 0, scale)
    branches = (out_cmp, out_slc, out_win)
    return sum(gates[..., i, None] * x for i, x in enumerate(branches))[0], chosen[0]  # pyright: ignore


def relative_error(x: Tensor, expected: Tensor) -> float:
    """The error's norm over that of what is expected; infinite where `x` is not a number."""
    error = float((x.double().cpu() - expected).norm() / expected.norm().clamp(min=1e-9))
    return error if error == error else float("inf")


# Small enough for Triton's interpreter.
CASES = {
    "two lengths": PagedCase((150, 37)),
    "idle and short rows, own window": PagedCase((7, 0, 200), heads=3, groups=1, value_head_dim=32, ring=True),
    "more queries than tokens": PagedCase((3, 130), queries=4, heads=6, ring=True),
    "compressed tokens that reach two blocks on": PagedCase(
        (133,), queries=2, heads=32, groups=1, geometry=BlockGeometry(24, 4, 8, 5, 1, 1, 7)
    ),
    "sizes that fit no tile": PagedCase(
        (111,), heads=2, head_dim=20, value_head_dim=12, geometry=BlockGeometry(8, 4, 12, 3, 0, 1, 9)
    ),
    "large blocks": PagedCase((300,), heads=2, groups=1, geometry=BlockGeometry(16, 16, 144, 2, 0, 1, 9)),
    "a block's border": PagedCase((64, 65, 63), queries=2),
    "fp16": PagedCase((90,), queries=2, dtype=torch.float16),
}
