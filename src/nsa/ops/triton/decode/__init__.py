"""Decoding on the GPU: one step of 1 to 8 queries for each row of a paged cache, at lengths that only the device knows.

Reading order: `compressed.py` (compressed attention, split over the context), `choice.py` (importance), then
`attend.py`: the choice together with the window, whose reads it leaves time for, the chosen blocks, and the sum of the
branches. These are the five launches. Their grids follow from the shapes alone, so one CUDA graph serves every length;
each program reads its row's length and ends at once when there is nothing for it.

Legend: a pair is a batch row and a group of heads; a row of a tile is one query head of one query.
Arguments and shapes are those of `nsa.ops.paged`.
"""

# Kernels are typed by Triton, not by Python.
# pyright: reportArgumentType=false, reportCallIssue=false, reportAttributeAccessIssue=false, reportReturnType=false
from __future__ import annotations

from typing import Any, NamedTuple

import torch
import triton
from torch import Tensor

from nsa.geometry import BlockGeometry
from nsa.ops.cache_view import PagedView
from nsa.ops.triton.decode.attend import decode_choice_window_kernel, decode_merge_kernel, decode_selected_kernel
from nsa.ops.triton.decode.choice import decode_importance_kernel
from nsa.ops.triton.decode.compressed import decode_compressed_kernel
from nsa.ops.triton.gpu import LOG2E, VALUE_SIZES, dot_precision, read_device


class Plan(NamedTuple):
    """How a step is cut, by shapes and device.

    Attributes:
        rows: heads and queries that a program of the compressed branch holds.
        tile, stages: selection blocks of the compressed branch's inner step, and how many steps are in flight.
        splits: shares of the context in the compressed branch.
        chunk: selection blocks whose importance a program adds up.
        blocks, window_blocks: selection blocks of an item of the selected branch and of the window.
        step: keys of their inner step.
        overlaps: whether a launch may begin while the one before it ends (programmatic launch, Hopper and newer).
    """

    rows: int
    tile: int
    stages: int
    splits: int
    chunk: int
    blocks: int
    window_blocks: int
    step: int
    overlaps: bool


def num_spans(geometry: BlockGeometry) -> int:
    """Selection blocks that the compressed tokens of one block reach, counted from that block."""
    reach = geometry.select_block_size - geometry.compress_stride + geometry.compress_block_size
    return (reach - 1) // geometry.select_block_size + 1


def plan_decode(q: Tensor, num_kv_heads: int, value_head_dim: int, num_pages: int, geometry: BlockGeometry) -> Plan:
    """Tiles, splits and items that fill the multiprocessors whatever the batch.

    Args:
        q: `[B, Q, H, Dk]`.
        num_pages: M, pages that a row can have.
    """
    batch, queries, heads, head_dim = q.shape
    narrow = q.dtype != torch.float32
    num_rows = queries * heads // num_kv_heads
    rows = min(64 if narrow else 16, max(16, triton.next_power_of_2(num_rows)))
    row_bytes = (triton.next_power_of_2(head_dim) + triton.next_power_of_2(value_head_dim)) * q.element_size()
    keys = min(64, max(16, 2 ** ((32768 // row_bytes).bit_length() - 1)))  # 32 KiB of keys and values a buffer
    units = batch * queries * num_kv_heads
    many = units >= 64  # enough to fill the device: longer steps of fewer programs
    tile = max(1, max(16, keys if many else keys // 2) // triton.next_power_of_2(geometry.strides_per_select))
    tile = max(tile, triton.next_power_of_2(num_spans(geometry) - 1))
    programs = batch * num_kv_heads * triton.cdiv(num_rows, rows)
    device = read_device(q.device)
    splits = max(2, min(64, round(3 * device.num_multiprocessors / programs)))
    block = triton.next_power_of_2(geometry.select_block_size)
    items = (512, 256) if units >= 128 else (256, 128) if units >= 64 else (64, 64)  # keys, selected and window
    overlaps = device.capability >= (9, 0)
    blocks, window_blocks = (max(1, item // block, keys // block) for item in items)
    splits = min(splits, triton.cdiv(num_pages, tile))
    chunk = min(256, 4096 // triton.next_power_of_2(heads // num_kv_heads)) if many else 64  # what registers hold
    return Plan(rows, tile, 3 if many else 5, splits, chunk, blocks, window_blocks, keys, overlaps)


class Step(NamedTuple):
    """One step as its launches share it: tensors laid out as kernels read them, the softmax scale in base 2."""

    q: Tensor
    gates: Tensor
    view: PagedView
    geometry: BlockGeometry
    plan: Plan
    scale_log2: float

    @property
    def group_size(self) -> int:
        """Query heads of a group."""
        return self.q.shape[2] // self.view.k.shape[1]

    @property
    def num_pages(self) -> int:
        """M, pages that a row can have; a page is a selection block."""
        return self.view.block_table.shape[1]

    @property
    def num_tiles(self) -> int:
        """Tiles of blocks of the compressed branch in a row's pages."""
        return triton.cdiv(self.num_pages, self.plan.tile)

    @property
    def num_chosen_items(self) -> int:
        """Items of the chosen blocks."""
        return triton.cdiv(self.geometry.num_selected_blocks, self.plan.blocks)

    @property
    def num_items(self) -> int:
        """Items of the chosen blocks and of the window, which may begin and end within a block."""
        window_blocks = triton.cdiv(self.geometry.window_size - 1, self.geometry.select_block_size) + 1
        return self.num_chosen_items + triton.cdiv(window_blocks, self.plan.window_blocks)

    def heads(self) -> dict[str, int]:
        """Constants of every launch: queries of a row, heads of a group, groups."""
        return {"Q": self.q.shape[1], "G": self.group_size, "HKV": self.view.k.shape[1]}

    def tokens(self) -> dict[str, int]:
        """Constants of the compressed tokens."""
        geometry = self.geometry
        return {
            "SIZE": geometry.compress_block_size, "STRIDE": geometry.compress_stride,
            "PER_BLOCK": geometry.strides_per_select,
        }  # fmt: skip

    def splits(self) -> dict[str, int]:
        """Constants of the compressed tokens, and of their splits and tiles."""
        return {**self.tokens(), "TILE": self.plan.tile, "NUM_SPLITS": self.plan.splits}

    def products(self) -> dict[str, Any]:
        """Constants of the products: head sizes, and the tiles of at least 16 that tensor cores take."""
        dk, dv = self.q.shape[3], self.view.v.shape[3]
        padded = {"DK_PADDED": max(16, triton.next_power_of_2(dk)), "DV_PADDED": max(16, triton.next_power_of_2(dv))}
        return {"DK": dk, "DV": dv, **padded, "PRECISION": dot_precision(self.q)}

    def items(self) -> dict[str, int]:
        """Constants of an item."""
        return {
            "ROWS": max(16, triton.next_power_of_2(self.group_size)), "STEP": self.plan.step, "ITEMS": self.num_items,
            "SELECT": self.geometry.select_block_size, "N": self.geometry.num_selected_blocks, "STAGES": 3,
        }  # fmt: skip

    def launch(self) -> dict[str, bool]:
        """Options of the launches after the first, which may begin while the one before ends."""
        return {"PDL": True, "launch_pdl": True} if self.plan.overlaps else {"PDL": False}


class Scratch(NamedTuple):
    """What launches hand on, fp32, for B*Q*H rows; what a short row does not need is undefined.

    Attributes:
        out_cmp, stat_cmp: `[rows, splits, Dv]`, `[rows, splits, 2]`, unscaled outputs and their row_max and row_sum.
        importance: `[rows, spans, M]`, what a block has from the compressed tokens `spans` blocks before it.
        tile_max: `[rows, tiles]`, the maximum that a tile's importance was taken with.
        score: `[B, Q, Hkv, M]`.
        out_items, stat_items: of the selected branch and the window, as `out_cmp` and `stat_cmp`.
    """

    out_cmp: Tensor
    stat_cmp: Tensor
    importance: Tensor
    tile_max: Tensor
    score: Tensor
    out_items: Tensor
    stat_items: Tensor


def paged_decode_forward(
    q: Tensor,
    gates: Tensor,
    view: PagedView,
    geometry: BlockGeometry,
    scale: float,
    plan: Plan | None = None,
) -> tuple[Tensor, Tensor]:
    """Outputs `[B, Q, H, Dv]` and chosen blocks int32 `[B, Q, Hkv, n]`.

    Raises:
        ValueError: a head size beyond the largest tile.
    """
    (batch, queries, heads, dk), hkv, dv = q.shape, view.k.shape[1], view.v.shape[3]
    if max(dk, dv) > VALUE_SIZES[-1]:
        raise ValueError(f"backend 'triton' takes head sizes up to {VALUE_SIZES[-1]}, not {max(dk, dv)}; use 'torch'")
    plan = plan_decode(q, hkv, dv, view.block_table.shape[1], geometry) if plan is None else plan
    step = Step(q.contiguous(), gates.contiguous(), _fit_view(view), geometry, plan, scale * LOG2E)
    scratch = _make_scratch(step)
    n = geometry.num_selected_blocks
    indices = torch.empty(batch, queries, hkv, n, dtype=torch.int32, device=q.device)
    out = torch.empty(batch, queries, heads, dv, dtype=view.v.dtype, device=q.device)
    _launch_compressed(step, scratch)
    _launch_importance(step, scratch)
    _launch_choice_window(step, scratch, indices)
    _launch_selected(step, scratch, indices)
    _launch_merge(step, scratch, out)
    return out, indices


def _make_scratch(step: Step) -> Scratch:
    (batch, queries, heads, _), dv, hkv = step.q.shape, step.view.v.shape[3], step.view.k.shape[1]
    rows, splits, items, pages = batch * queries * heads, step.plan.splits, step.num_items, step.num_pages
    shapes = (
        (rows, splits, dv), (rows, splits, 2), (rows, num_spans(step.geometry), pages), (rows, step.num_tiles),
        (batch, queries, hkv, pages), (rows, items, dv), (rows, items, 2),
    )  # fmt: skip
    return Scratch(*(torch.empty(shape, dtype=torch.float32, device=step.q.device) for shape in shapes))


def _launch_compressed(step: Step, scratch: Scratch) -> None:
    q, view, plan, geometry = step.q, step.view, step.plan, step.geometry
    k, v, table, products = view.k_cmp, view.v_cmp, view.block_table, step.products()
    row_tiles = triton.cdiv(q.shape[1] * step.group_size, plan.rows)
    decode_compressed_kernel[(plan.splits, k.shape[1] * row_tiles, q.shape[0])](
        q, k, v, table, view.lengths, scratch.out_cmp, scratch.stat_cmp, scratch.importance, scratch.tile_max,
        step.scale_log2, table.stride(0), k.stride(0), k.stride(1), v.stride(0), v.stride(1), step.num_pages,
        step.num_tiles, ROWS=plan.rows, SELECT=geometry.select_block_size,
        PADDED=triton.next_power_of_2(geometry.strides_per_select), SPANS=num_spans(geometry), STAGES=plan.stages,
        num_warps=8 if plan.rows * products["DV_PADDED"] > 4096 else 4, **step.heads(), **products, **step.splits(),
    )  # fmt: skip


def _launch_importance(step: Step, scratch: Scratch) -> None:
    plan, (batch, queries, _, _) = step.plan, step.q.shape
    chunk = max(plan.chunk, plan.tile)  # whole tiles
    decode_importance_kernel[(triton.cdiv(step.num_pages, chunk), step.view.k.shape[1], batch * queries)](
        scratch.stat_cmp, scratch.importance, scratch.tile_max, step.view.lengths, scratch.score, step.num_pages,
        step.num_tiles, HEADS=triton.next_power_of_2(step.group_size),
        SPLITS_PADDED=triton.next_power_of_2(plan.splits), SPANS=num_spans(step.geometry), CHUNK=chunk, num_warps=4,
        **step.heads(), **step.splits(), **step.launch(),
    )  # fmt: skip


def _launch_choice_window(step: Step, scratch: Scratch, indices: Tensor) -> None:
    (batch, queries, _, _), view, geometry = step.q.shape, step.view, step.geometry
    # Without a ring the window reads the pages.
    k, v = (view.k, view.v) if view.k_win is None or view.v_win is None else (view.k_win, view.v_win)
    table, candidates = view.block_table, triton.next_power_of_2(step.num_pages)
    few = min(1024, candidates)  # a table has room for the longest row, most are far shorter
    windows = queries * (step.num_items - step.num_chosen_items)
    decode_choice_window_kernel[(view.k.shape[1], batch, queries + windows)](
        step.q, k, v, table, view.lengths, scratch.score, indices, scratch.out_items, scratch.stat_items,
        step.scale_log2, table.stride(0), k.stride(0), k.stride(1), v.stride(0), v.stride(1), k.shape[2],
        step.num_pages, BLOCKS=step.plan.window_blocks, SELECTED=step.num_chosen_items, WINDOW=geometry.window_size,
        RING=k is not view.k, SPANS=num_spans(geometry), INIT=geometry.num_init_blocks, LOCAL=geometry.num_local_blocks,
        N_PADDED=triton.next_power_of_2(geometry.num_selected_blocks), FEW=few,
        CANDIDATES=candidates, num_warps=4 if candidates <= 4096 else 16, **step.heads(), **step.products(),
        **step.items(), **step.tokens(), **step.launch(),
    )  # fmt: skip


def _launch_selected(step: Step, scratch: Scratch, indices: Tensor) -> None:
    (batch, queries, _, _), view, k, v = step.q.shape, step.view, step.view.k, step.view.v
    decode_selected_kernel[(step.num_chosen_items, k.shape[1], batch * queries)](
        step.q, k, v, view.block_table, view.lengths, indices, scratch.out_items, scratch.stat_items, step.scale_log2,
        view.block_table.stride(0), k.stride(0), k.stride(1), v.stride(0), v.stride(1), BLOCKS=step.plan.blocks,
        num_warps=4, **step.heads(), **step.products(), **step.items(), **step.launch(),
    )  # fmt: skip


def _launch_merge(step: Step, scratch: Scratch, out: Tensor) -> None:
    (batch, queries, heads, _), products, plan = step.q.shape, step.products(), step.plan
    parts = max(plan.splits, step.num_items)  # few: one warp a head is much faster than four
    decode_merge_kernel[(heads, batch * queries)](
        scratch.out_cmp, scratch.stat_cmp, scratch.out_items, scratch.stat_items, step.gates, step.view.lengths, out,
        DV=products["DV"], DV_PADDED=products["DV_PADDED"], SPLITS_PADDED=triton.next_power_of_2(plan.splits),
        SELECTED=step.num_chosen_items, ITEMS=step.num_items, ITEMS_PADDED=triton.next_power_of_2(step.num_items),
        num_warps=1 if parts <= 8 else 2 if parts <= 32 else 4, **step.heads(), **step.splits(), **step.launch(),
    )  # fmt: skip


def _fit_view(view: PagedView) -> PagedView:
    """The view with contiguous rows of tokens, table and lengths."""
    k, v, k_cmp, v_cmp = (_rows_together(x) for x in view[:4])
    k_win, v_win = (None if x is None else _rows_together(x) for x in (view.k_win, view.v_win))
    table = view.block_table if view.block_table.stride(1) == 1 else view.block_table.contiguous()
    return PagedView(k, v, k_cmp, v_cmp, table, view.lengths.contiguous(), k_win, v_win)


def _rows_together(x: Tensor) -> Tensor:
    """`x` with the tokens of a page and head one after another; a copy where they are not."""
    return x if x.stride(3) == 1 and x.stride(2) == x.shape[3] else x.contiguous()
