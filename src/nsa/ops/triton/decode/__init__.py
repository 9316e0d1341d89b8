"""Decoding on the GPU: one step of 1 to 8 queries for each row of a paged cache, at lengths that only the device knows.

Five launches: `compressed.py` (compressed attention, split over the context), `choice.py` (importance), then in
`attend.py` the choice together with the window, whose reads it leaves time for, the chosen blocks, and the sum of the
branches. Their grids follow from the shapes
alone, so one CUDA graph serves every length; each program reads its row's length and ends at once when there is nothing
for it.

Arguments and shapes are those of `nsa.ops.paged`.
"""

# Kernels are typed by Triton, not by Python.
# pyright: reportArgumentType=false, reportCallIssue=false, reportAttributeAccessIssue=false, reportReturnType=false
from __future__ import annotations

from typing import NamedTuple

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
    k, v, k_cmp, v_cmp, block_table, lengths, k_win, v_win = view
    (batch, queries, heads, dk), dv, hkv, num_pages = q.shape, v.shape[3], k.shape[1], block_table.shape[1]
    if max(dk, dv) > VALUE_SIZES[-1]:
        raise ValueError(f"backend 'triton' takes head sizes up to {VALUE_SIZES[-1]}, not {max(dk, dv)}; use 'torch'")
    q, gates = q.contiguous(), gates.contiguous()
    k, v, k_cmp, v_cmp = (_rows_together(x) for x in (k, v, k_cmp, v_cmp))
    # Without a ring the window reads the pages.
    ring, v_ring = (k, v) if k_win is None or v_win is None else (_rows_together(k_win), _rows_together(v_win))
    block_table = block_table if block_table.stride(1) == 1 else block_table.contiguous()
    lengths = lengths.contiguous()
    plan = plan_decode(q, hkv, dv, num_pages, geometry) if plan is None else plan
    group, units = heads // hkv, batch * queries * heads
    num_tiles, spans, n = triton.cdiv(num_pages, plan.tile), num_spans(geometry), geometry.num_selected_blocks
    selected = triton.cdiv(n, plan.blocks)
    num_window_blocks = triton.cdiv(geometry.window_size - 1, geometry.select_block_size) + 1
    items = selected + triton.cdiv(num_window_blocks, plan.window_blocks)

    def scratch(*sizes: int) -> Tensor:
        return torch.empty(sizes, dtype=torch.float32, device=q.device)

    out_cmp, stat_cmp = scratch(units, plan.splits, dv), scratch(units, plan.splits, 2)
    mass, top = scratch(units, spans, num_pages), scratch(units, num_tiles)
    score = scratch(batch, queries, hkv, num_pages)
    part, stat = scratch(units, items, dv), scratch(units, items, 2)
    indices = torch.empty(batch, queries, hkv, n, dtype=torch.int32, device=q.device)
    out = torch.empty(batch, queries, heads, dv, dtype=v.dtype, device=q.device)

    launch = {"PDL": True, "launch_pdl": True} if plan.overlaps else {"PDL": False}
    sizes = {"Q": queries, "G": group, "HKV": hkv}
    cells = {"SIZE": geometry.compress_block_size, "STRIDE": geometry.compress_stride}
    cells |= {"PER_BLOCK": geometry.strides_per_select, "TILE": plan.tile, "NUM_SPLITS": plan.splits}
    features = {"DK": dk, "DV": dv, "DK_PADDED": max(16, triton.next_power_of_2(dk))}
    features |= {"DV_PADDED": max(16, triton.next_power_of_2(dv)), "PRECISION": dot_precision(q)}
    attend = {"ROWS": max(16, triton.next_power_of_2(group)), "STEP": plan.step}
    attend |= {"SELECTED": selected, "ITEMS": items, "SELECT": geometry.select_block_size, "N": n, "STAGES": 3}
    padded_splits, scale_log2 = triton.next_power_of_2(plan.splits), scale * LOG2E

    decode_compressed_kernel[(plan.splits, hkv * triton.cdiv(queries * group, plan.rows), batch)](
        q, k_cmp, v_cmp, block_table, lengths, out_cmp, stat_cmp, mass, top, scale_log2, block_table.stride(0),
        k_cmp.stride(0), k_cmp.stride(1), v_cmp.stride(0), v_cmp.stride(1), num_pages, num_tiles, ROWS=plan.rows,
        SELECT=geometry.select_block_size, PADDED=triton.next_power_of_2(geometry.strides_per_select), SPANS=spans,
        STAGES=plan.stages, num_warps=8 if plan.rows * features["DV_PADDED"] > 4096 else 4, **sizes, **features,
        **cells,
    )  # fmt: skip
    chunk = max(plan.chunk, plan.tile)
    decode_importance_kernel[(triton.cdiv(num_pages, chunk), hkv, batch * queries)](
        stat_cmp, mass, top, lengths, score, num_pages, num_tiles, HEADS=triton.next_power_of_2(group),
        SPLITS_PADDED=padded_splits, SPANS=spans, CHUNK=chunk, num_warps=4, **sizes, **cells, **launch,
    )  # fmt: skip
    candidates, windows = triton.next_power_of_2(num_pages), queries * (items - selected)
    few = min(1024, candidates)
    decode_choice_window_kernel[(hkv, batch, queries + windows)](
        q, ring, v_ring, block_table, lengths, score, indices, part, stat, scale_log2, block_table.stride(0),
        ring.stride(0), ring.stride(1), v_ring.stride(0), v_ring.stride(1), ring.shape[2], num_pages,
        BLOCKS=plan.window_blocks, WINDOW=geometry.window_size, RING=ring is not k, SIZE=cells["SIZE"],
        STRIDE=cells["STRIDE"], PER_BLOCK=cells["PER_BLOCK"], SPANS=spans, INIT=geometry.num_init_blocks,
        LOCAL=geometry.num_local_blocks, N_PADDED=triton.next_power_of_2(n), FEW=few, CANDIDATES=candidates,
        num_warps=4 if candidates <= 4096 else 16, **sizes, **features, **attend, **launch,
    )  # fmt: skip
    decode_selected_kernel[(selected, hkv, batch * queries)](
        q, k, v, block_table, lengths, indices, part, stat, scale_log2, block_table.stride(0), k.stride(0),
        k.stride(1), v.stride(0), v.stride(1), BLOCKS=plan.blocks, num_warps=4, **sizes, **features, **attend,
        **launch,
    )  # fmt: skip
    parts = max(plan.splits, items)
    decode_merge_kernel[(heads, batch * queries)](
        out_cmp, stat_cmp, part, stat, gates, lengths, out, DV=dv, DV_PADDED=features["DV_PADDED"],
        SPLITS_PADDED=padded_splits, SELECTED=selected, ITEMS=items, ITEMS_PADDED=triton.next_power_of_2(items),
        num_warps=1 if parts <= 8 else 2 if parts <= 32 else 4, **sizes, **cells, **launch,
    )  # fmt: skip
    return out, indices


def _rows_together(x: Tensor) -> Tensor:
    """`x` with the tokens of a page and head one after another; a copy where they are not."""
    return x if x.stride(3) == 1 and x.stride(2) == x.shape[3] else x.contiguous()
