"""Backward of the selected branch on Hopper, in Gluon: rows are gathered ahead of their products.

As in `select_bwd`, keys and values of an item stay while the rows of the tokens that chose its block pass by: dK and dV
grow in registers, each row's part of dQ goes to a scratch. Four warps gather the queries and output gradients of coming
tiles; two groups of four warps take turns at the tiles, each with a dK and dV of its own, which count as two parts of
the item. Programs are persistent.

Shapes are those of `select_bwd`.
"""

# Kernels are typed by Triton, not by Python.
# pyright: reportArgumentType=false, reportCallIssue=false, reportAttributeAccessIssue=false, reportReturnType=false
# pyright: reportGeneralTypeIssues=false, reportPossiblyUnboundVariable=false
# pyright: reportAssignmentType=false, reportOperatorIssue=false
# Lists in kernels are added, not unpacked.
# ruff: noqa: RUF005
from __future__ import annotations

from torch import Tensor
from triton.experimental import gluon
from triton.experimental.gluon import language as gl
from triton.experimental.gluon.language.nvidia.ampere import async_copy
from triton.experimental.gluon.language.nvidia.hopper import (
    fence_async_shared,
    mbarrier,
    tma,
    warpgroup_mma,
    warpgroup_mma_wait,
)

from nsa.ops.triton.common import LOG2E, Layout, num_multiprocessors
from nsa.ops.triton.dense_bwd import Rows
from nsa.ops.triton.hopper_fwd import describe_box, describe_parts, make_barriers
from nsa.ops.triton.hopper_select_fwd import items_of_unit
from nsa.ops.triton.invert import Chunk, Inversion, Items, item_keys

ROWS = gl.constexpr(64)  # rows of a tile
PARTS = gl.constexpr(2)  # groups of four warps
BLOCK = gl.constexpr(64)  # keys of a block
STAGES = gl.constexpr(4)  # tiles in flight; a multiple of PARTS, so that a group waits for every use of its places


@gluon.jit
def _row_places(start, item_entries_ptr, num_rows, G: gl.constexpr, LAYOUT: gl.constexpr):
    """Numbers of an item's rows from `start` on, their entries, and which rows exist."""
    row = start + gl.arange(0, ROWS, LAYOUT)
    live = row < num_rows
    return row, gl.load(item_entries_ptr + row // G, mask=live, other=0), live


@gluon.jit
def _gather_partition(
    q_ptr, k_desc, k_tail_desc, v_desc, dout_ptr, lse_ptr, delta_ptr, key_ptr, q_smem, q_tail_smem, k_smem, k_tail_smem,
    v_smem, dout_smem, lse_smem, delta_smem, place_smem, q_full, q_empty, k_full, k_empty, entries_ptr, item_ptr,
    first_ptr, doc_ptr, doc_end_ptr, base_ptr, T, S, head_start, num_heads, range_start, num_units, bound, J,
    G: gl.constexpr, HKV: gl.constexpr, D: gl.constexpr, TAIL: gl.constexpr, RATIO: gl.constexpr, SLOTS: gl.constexpr,
    PACKED: gl.constexpr, BUFFERS: gl.constexpr,
):  # fmt: skip
    LAYOUT: gl.constexpr = gl.BlockedLayout([1, 8], [256 // D, D // 8], [4, 1], [1, 0])
    ROW: gl.constexpr = gl.SliceLayout(1, LAYOUT)
    TAIL_LAYOUT: gl.constexpr = gl.BlockedLayout([1, 8], [4, 8], [4, 1], [1, 0])
    TAIL_ROW: gl.constexpr = gl.SliceLayout(1, TAIL_LAYOUT)
    LINE: gl.constexpr = gl.BlockedLayout([1], [32], [4], [0])
    column = gl.arange(0, D, gl.SliceLayout(0, LAYOUT))
    tail_column = gl.arange(0, 64, gl.SliceLayout(0, TAIL_LAYOUT))
    done = 0
    turn = 0
    step = 0
    for unit in range(num_units):
        unit_ptr, first, num_items = items_of_unit(
            unit, done, item_ptr, first_ptr, head_start, num_heads, range_start, 1, bound, J
        )
        head = head_start + unit
        b = head // HKV
        group = head % HKV
        unit_row = b.to(gl.int64) * T * (G * HKV) + group * G
        for item in range(first, num_items, gl.num_programs(0)):
            block = gl.load(unit_ptr + item * 3)
            entry = gl.load(unit_ptr + item * 3 + 1)
            num_rows = (gl.load(unit_ptr + item * 3 + 2) - entry) * G
            key_start = item_keys(entries_ptr, entry, block, doc_ptr, base_ptr, SLOTS, RATIO, BLOCK, PACKED)
            key_end = gl.minimum(key_start + BLOCK, S)
            if PACKED:
                key_end = gl.minimum(key_end, gl.load(doc_end_ptr + gl.load(entries_ptr + entry) // SLOTS))
            gl.store(key_ptr + (unit * bound + item) * 2, key_start)
            gl.store(key_ptr + (unit * bound + item) * 2 + 1, key_end)
            buffer = turn % BUFFERS
            mbarrier.wait(k_empty.index(buffer), (turn // BUFFERS & 1) ^ 1)
            mbarrier.expect(k_full.index(buffer), 2 * BLOCK * (2 * D + TAIL))
            box = [b, key_start, group, 0]
            tma.async_copy_global_to_shared(k_desc, box, k_full.index(buffer), k_smem.index(buffer))
            if TAIL > 0:
                tma.async_copy_global_to_shared(k_tail_desc, box, k_full.index(buffer), k_tail_smem.index(buffer))
            tma.async_copy_global_to_shared(v_desc, box, k_full.index(buffer), v_smem.index(buffer))
            turn += 1

            # The next tile's tokens are read long before they are needed.
            row, place, live = _row_places(0, entries_ptr + entry, num_rows, G, ROW)
            line, line_place, line_live = _row_places(0, entries_ptr + entry, num_rows, G, LINE)
            tail_row, tail_place, tail_live = row, place, live
            if TAIL > 0:
                tail_row, tail_place, tail_live = _row_places(0, entries_ptr + entry, num_rows, G, TAIL_ROW)
            for start in range(0, num_rows, ROWS):
                next_row, next_place, next_live = _row_places(start + ROWS, entries_ptr + entry, num_rows, G, ROW)
                next_line, next_line_place, next_line_live = _row_places(
                    start + ROWS, entries_ptr + entry, num_rows, G, LINE
                )
                source = unit_row + place // SLOTS * (G * HKV) + row % G
                line_source = unit_row + line_place // SLOTS * (G * HKV) + line % G
                slot = step % STAGES
                mbarrier.wait(q_empty.index(slot), (step // STAGES & 1) ^ 1)
                # Rows beyond the last are zeros and add nothing.
                q_place = source[:, None] * (D + TAIL) + column[None, :]
                async_copy.async_copy_global_to_shared(q_smem.index(slot), q_ptr + q_place, mask=live[:, None])
                dout_place = source[:, None] * D + column[None, :]
                async_copy.async_copy_global_to_shared(dout_smem.index(slot), dout_ptr + dout_place, mask=live[:, None])
                if TAIL > 0:
                    next_tail_row, next_tail_place, next_tail_live = _row_places(
                        start + ROWS, entries_ptr + entry, num_rows, G, TAIL_ROW
                    )
                    source = unit_row + tail_place // SLOTS * (G * HKV) + tail_row % G
                    tail = source[:, None] * (D + TAIL) + D + tail_column[None, :]
                    async_copy.async_copy_global_to_shared(
                        q_tail_smem.index(slot), q_ptr + tail, mask=tail_live[:, None]
                    )
                    tail_row, tail_place, tail_live = next_tail_row, next_tail_place, next_tail_live
                async_copy.async_copy_global_to_shared(lse_smem.index(slot), lse_ptr + line_source, mask=line_live)
                async_copy.async_copy_global_to_shared(delta_smem.index(slot), delta_ptr + line_source, mask=line_live)
                async_copy.async_copy_global_to_shared(
                    place_smem.index(slot), entries_ptr + entry + line // G, mask=line_live
                )
                async_copy.mbarrier_arrive(q_full.index(slot), increment_count=False)
                step += 1
                row, place, live = next_row, next_place, next_live
                line, line_place, line_live = next_line, next_line_place, next_line_live
        done += num_items


@gluon.jit
def _store_part(x_ptr, x, item, D: gl.constexpr, WIDTH: gl.constexpr, LAYOUT: gl.constexpr):
    row = item.to(gl.int64) * BLOCK + gl.arange(0, BLOCK, gl.SliceLayout(1, LAYOUT))
    gl.store(x_ptr + row[:, None] * WIDTH + gl.arange(0, D, gl.SliceLayout(0, LAYOUT))[None, :], x)


@gluon.jit
def _rows_to_store(
    part_ptr, tile, place, row, num_rows, token_start, G: gl.constexpr, D: gl.constexpr, WIDTH: gl.constexpr,
    SLOTS: gl.constexpr,
):  # fmt: skip
    """Where the rows of a tile of dQ go, by token and slot, their values, and which rows exist."""
    LAYOUT: gl.constexpr = gl.BlockedLayout([1, 8], [256 // D, D // 8], [4, 1], [1, 0])
    row += gl.arange(0, ROWS, gl.SliceLayout(1, LAYOUT))
    place = place.load(gl.SliceLayout(1, LAYOUT)) - token_start * SLOTS
    part = (place * G + row % G)[:, None] * WIDTH + gl.arange(0, D, gl.SliceLayout(0, LAYOUT))[None, :]
    return part_ptr + part, tile.load(LAYOUT), (row < num_rows)[:, None]


@gluon.jit
def _row_partition(
    PART: gl.constexpr, part_ptr, dk_ptr, dv_ptr, q_smem, q_tail_smem, k_smem, k_tail_smem, v_smem, dout_smem, lse_smem,
    delta_smem, place_smem, ds_smem, q_full, q_empty, k_full, k_empty, entries_ptr, item_ptr, first_ptr, doc_ptr,
    base_ptr, scale_log2, log2e, S, q_start, head_start, token_start, num_tokens, num_heads, range_start, num_units,
    bound, J,
    G: gl.constexpr, D: gl.constexpr, TAIL: gl.constexpr, RATIO: gl.constexpr, SLOTS: gl.constexpr,
    PACKED: gl.constexpr, BUFFERS: gl.constexpr,
):  # fmt: skip
    PIECE: gl.constexpr = 32 if TAIL > 0 else ROWS  # rows of which scores are held at a time
    S_LAYOUT: gl.constexpr = gl.NVMMADistributedLayout([3, 0], [4, 1], [16, PIECE, 16])
    K_LAYOUT: gl.constexpr = gl.NVMMADistributedLayout([3, 0], [4, 1], [16, D, 16])
    C_LAYOUT: gl.constexpr = gl.NVMMADistributedLayout([3, 0], [4, 1], [16, 64, 16])
    ROW: gl.constexpr = gl.SliceLayout(0, S_LAYOUT)
    dtype: gl.constexpr = q_smem.dtype
    none = gl.zeros([BLOCK, PIECE], gl.float32, S_LAYOUT)
    zero = gl.zeros([ROWS, 64], gl.float32, C_LAYOUT)
    ds_tile = ds_smem.index(PART)
    done = 0
    turn = 0
    step = 0
    for unit in range(num_units):
        unit_ptr, first, num_items = items_of_unit(
            unit, done, item_ptr, first_ptr, head_start, num_heads, range_start, 1, bound, J
        )
        unit_part_ptr = part_ptr + unit.to(gl.int64) * num_tokens * (SLOTS * G * (D + TAIL))
        for item in range(first, num_items, gl.num_programs(0)):
            block = gl.load(unit_ptr + item * 3)
            entry = gl.load(unit_ptr + item * 3 + 1)
            num_rows = (gl.load(unit_ptr + item * 3 + 2) - entry) * G
            num_tiles = gl.cdiv(num_rows, ROWS)
            key_start = item_keys(entries_ptr, entry, block, doc_ptr, base_ptr, SLOTS, RATIO, BLOCK, PACKED)
            key = key_start + gl.arange(0, BLOCK, gl.SliceLayout(1, S_LAYOUT))
            position = gl.minimum(key, S) - q_start
            buffer = turn % BUFFERS
            k = k_smem.index(buffer).reshape([BLOCK, D])
            v = v_smem.index(buffer).reshape([BLOCK, D])
            dk = gl.zeros([BLOCK, D], gl.float32, K_LAYOUT)
            dv = gl.zeros([BLOCK, D], gl.float32, K_LAYOUT)
            k_tail, dk_tail = k, dk
            if TAIL > 0:
                k_tail = k_tail_smem.index(buffer).reshape([BLOCK, TAIL])
                dk_tail = gl.zeros([BLOCK, TAIL], gl.float32, C_LAYOUT)
            mbarrier.wait(k_full.index(buffer), turn // BUFFERS & 1)
            for tile in range((PART + step) % PARTS, num_tiles, PARTS):
                slot = (step + tile) % STAGES
                q_tile = q_smem.index(slot)
                mbarrier.wait(q_full.index(slot), (step + tile) // STAGES & 1)
                fence_async_shared()  # rows were written by threads, the products read them as TMA does
                for piece in gl.static_range(ROWS // PIECE):
                    q = q_tile.slice(piece * PIECE, PIECE)
                    dout = dout_smem.index(slot).slice(piece * PIECE, PIECE)
                    s = warpgroup_mma(k, q.permute([1, 0]), none, use_acc=False, is_async=True)
                    q_tail = q
                    if TAIL > 0:
                        q_tail = q_tail_smem.index(slot).slice(piece * PIECE, PIECE)
                        s = warpgroup_mma(k_tail, q_tail.permute([1, 0]), s, is_async=True)
                    dp = warpgroup_mma(v, dout.permute([1, 0]), none, use_acc=False, is_async=True)
                    lse = lse_smem.index(slot).slice(piece * PIECE, PIECE).load(ROW) * log2e
                    t = place_smem.index(slot).slice(piece * PIECE, PIECE).load(ROW) // SLOTS
                    s = warpgroup_mma_wait(1, deps=[s])
                    p = gl.where(position[:, None] <= t[None, :], gl.exp2(s * scale_log2 - lse[None, :]), 0.0)
                    p_operand = gl.convert_layout(p.to(dtype), gl.DotOperandLayout(0, K_LAYOUT, 2))
                    dv = warpgroup_mma(p_operand, dout, dv, is_async=True)
                    dp = warpgroup_mma_wait(1, deps=[dp])
                    delta = delta_smem.index(slot).slice(piece * PIECE, PIECE).load(ROW)
                    ds = (p * (dp - delta[None, :])).to(dtype)
                    dk = warpgroup_mma(
                        gl.convert_layout(ds, gl.DotOperandLayout(0, K_LAYOUT, 2)), q, dk, is_async=True
                    )  # fmt: skip
                    if TAIL > 0:
                        ds_operand = gl.convert_layout(ds, gl.DotOperandLayout(0, C_LAYOUT, 2))
                        dk_tail = warpgroup_mma(ds_operand, q_tail, dk_tail, is_async=True)
                    ds_tile.slice(piece * PIECE, PIECE).permute([1, 0]).store(ds)
                    dv = warpgroup_mma_wait(2 if TAIL > 0 else 1, deps=[dv])
                    dk = warpgroup_mma_wait(1 if TAIL > 0 else 0, deps=[dk])
                    if TAIL > 0:
                        dk_tail = warpgroup_mma_wait(0, deps=[dk_tail])
                fence_async_shared()
                # Columns of dQ, 64 at a time to save registers, get their layout for whole rows in the place of the
                # queries, which are done with.
                for part in gl.static_range(D // 64):
                    dq = warpgroup_mma(ds_tile, k.slice(part * 64, 64, 1), zero, use_acc=False, is_async=True)
                    dq = warpgroup_mma_wait(0, deps=[dq])
                    q_tile.slice(part * 64, 64, 1).store(dq.to(dtype))
                if TAIL > 0:
                    dq = warpgroup_mma(ds_tile, k_tail, zero, use_acc=False, is_async=True)
                    dq = warpgroup_mma_wait(0, deps=[dq])
                    q_tail_smem.index(slot).store(dq.to(dtype))
                places = place_smem.index(slot)
                target, out, live = _rows_to_store(
                    unit_part_ptr, q_tile, places, tile * ROWS, num_rows, token_start, G, D, D + TAIL, SLOTS
                )
                if TAIL > 0:
                    tail_target, tail_out, tail_live = _rows_to_store(
                        unit_part_ptr + D, q_tail_smem.index(slot), places, tile * ROWS, num_rows, token_start, G, TAIL,
                        D + TAIL, SLOTS,
                    )  # fmt: skip
                mbarrier.arrive(q_empty.index(slot), count=1)
                gl.store(target, out, mask=live)
                if TAIL > 0:
                    gl.store(tail_target, tail_out, mask=tail_live)
            mbarrier.arrive(k_empty.index(buffer), count=1)
            place = (unit * bound + item) * PARTS + PART
            _store_part(dk_ptr, dk, place, D, D + TAIL, K_LAYOUT)
            if TAIL > 0:
                _store_part(dk_ptr + D, dk_tail, place, TAIL, D + TAIL, C_LAYOUT)
            _store_part(dv_ptr, dv, place, D, D, K_LAYOUT)
            step += num_tiles
            turn += 1
        done += num_items


@gluon.jit(
    do_not_specialize=[
        "T", "S", "q_start", "head_start", "token_start", "num_tokens", "num_heads", "range_start", "num_units",
        "bound", "J",
    ]
)  # fmt: skip
def hopper_select_backward_kernel(
    q_ptr, k_desc, k_tail_desc, v_desc, dout_ptr, lse_ptr, delta_ptr, part_ptr, dk_ptr, dv_ptr, key_ptr,
    entries_ptr, item_ptr, first_ptr, doc_ptr, doc_end_ptr, base_ptr, scale_log2, log2e,
    T, S, q_start, head_start, token_start, num_tokens, num_heads, range_start, num_units, bound, J,
    G: gl.constexpr, HKV: gl.constexpr, D: gl.constexpr, TAIL: gl.constexpr, RATIO: gl.constexpr, SLOTS: gl.constexpr,
    PACKED: gl.constexpr, BUFFERS: gl.constexpr,
):  # fmt: skip
    dtype: gl.constexpr = k_desc.dtype
    tile: gl.constexpr = gl.NVMMASharedLayout.get_default_for([ROWS, D], dtype)
    line: gl.constexpr = gl.SwizzledSharedLayout(1, 1, 1, order=[0])
    q_smem = gl.allocate_shared_memory(dtype, [STAGES, ROWS, D], tile)
    dout_smem = gl.allocate_shared_memory(dtype, [STAGES, ROWS, D], tile)
    k_smem = gl.allocate_shared_memory(dtype, [BUFFERS] + k_desc.block_shape, k_desc.layout)
    v_smem = gl.allocate_shared_memory(dtype, [BUFFERS] + v_desc.block_shape, v_desc.layout)
    q_tail_smem, k_tail_smem = q_smem, k_smem
    if TAIL > 0:
        tail: gl.constexpr = gl.NVMMASharedLayout.get_default_for([ROWS, TAIL], dtype)
        q_tail_smem = gl.allocate_shared_memory(dtype, [STAGES, ROWS, TAIL], tail)
        k_tail_smem = gl.allocate_shared_memory(dtype, [BUFFERS] + k_tail_desc.block_shape, k_tail_desc.layout)
    ds_smem = gl.allocate_shared_memory(
        dtype, [PARTS, ROWS, BLOCK], gl.NVMMASharedLayout.get_default_for([ROWS, BLOCK], dtype)
    )
    lse_smem = gl.allocate_shared_memory(gl.float32, [STAGES, ROWS], line)
    delta_smem = gl.allocate_shared_memory(gl.float32, [STAGES, ROWS], line)
    place_smem = gl.allocate_shared_memory(gl.int32, [STAGES, ROWS], line)
    q_full = make_barriers(STAGES, 128)  # every thread that gathers
    q_empty = make_barriers(STAGES, 1)
    k_full = make_barriers(BUFFERS, 1)
    k_empty = make_barriers(BUFFERS, PARTS)
    fence_async_shared()
    gl.warp_specialize([
        (_row_partition, (
            0, part_ptr, dk_ptr, dv_ptr, q_smem, q_tail_smem, k_smem, k_tail_smem, v_smem, dout_smem, lse_smem,
            delta_smem, place_smem, ds_smem, q_full, q_empty, k_full, k_empty, entries_ptr, item_ptr, first_ptr,
            doc_ptr, base_ptr, scale_log2, log2e, S, q_start, head_start, token_start, num_tokens, num_heads,
            range_start, num_units, bound, J, G, D, TAIL, RATIO, SLOTS, PACKED, BUFFERS,
        )),
        (_row_partition, (
            1, part_ptr, dk_ptr, dv_ptr, q_smem, q_tail_smem, k_smem, k_tail_smem, v_smem, dout_smem, lse_smem,
            delta_smem, place_smem, ds_smem, q_full, q_empty, k_full, k_empty, entries_ptr, item_ptr, first_ptr,
            doc_ptr, base_ptr, scale_log2, log2e, S, q_start, head_start, token_start, num_tokens, num_heads,
            range_start, num_units, bound, J, G, D, TAIL, RATIO, SLOTS, PACKED, BUFFERS,
        )),
        (_gather_partition, (
            q_ptr, k_desc, k_tail_desc, v_desc, dout_ptr, lse_ptr, delta_ptr, key_ptr, q_smem, q_tail_smem, k_smem,
            k_tail_smem, v_smem, dout_smem, lse_smem, delta_smem, place_smem, q_full, q_empty, k_full, k_empty,
            entries_ptr, item_ptr, first_ptr, doc_ptr, doc_end_ptr, base_ptr, T, S, head_start, num_heads, range_start,
            num_units, bound, J, G, HKV, D, TAIL, RATIO, SLOTS, PACKED, BUFFERS,
        )),
    ], [4, 4], [232, 40])  # fmt: skip


def hopper_select_backward(
    q: Tensor, k: Tensor, v: Tensor, dout: Tensor, rows: Rows, part: Tensor, dk: Tensor, dv: Tensor, item_key: Tensor,
    inversion: Inversion, items: Items, chunk: Chunk, layout: Layout | None, q_start: int, scale: float,
) -> None:  # fmt: skip
    """Write what `select_backward_kernel` gives for tensors that `hopper_gathers` takes, in PARTS parts an item."""
    B, T, H, Dk = q.shape
    S, Hkv, D = k.shape[1], k.shape[2], v.shape[3]
    documents = (q, q, q) if layout is None else (layout.doc_start, layout.doc_end, layout.block_base)
    hopper_select_backward_kernel[(num_multiprocessors(q),)](
        q, *describe_parts(k, D, BLOCK.value, 1), describe_box(v, BLOCK.value, 1), dout, rows.lse, rows.delta, part,
        dk, dv, item_key, inversion.entries, items.table, items.first, *documents, scale * LOG2E, LOG2E,
        T, S, q_start, chunk.head, chunk.token, chunk.token_end - chunk.token, B * Hkv,
        chunk.token // items.range_tokens, chunk.head_end - chunk.head, items.table.shape[2], items.first.shape[2] - 1,
        G=H // Hkv, HKV=Hkv, D=D, TAIL=Dk - D, RATIO=inversion.ratio, SLOTS=inversion.slots, PACKED=layout is not None,
        BUFFERS=1 if Dk > D else 2, num_warps=4,
    )  # fmt: skip
