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
from nsa.ops.triton.hopper_fwd import describe_box, make_barriers
from nsa.ops.triton.hopper_select_fwd import items_of_unit
from nsa.ops.triton.invert import Chunk, Inversion, Items, item_keys

ROWS = gl.constexpr(64)  # rows of a tile
PARTS = gl.constexpr(2)  # groups of four warps
BLOCK = gl.constexpr(64)  # keys of a block
STAGES = gl.constexpr(4)  # tiles in flight; a multiple of PARTS, so that a group waits for every use of its places


@gluon.jit
def _gather_partition(
    q_ptr, k_desc, v_desc, dout_ptr, lse_ptr, delta_ptr, key_ptr, q_smem, k_smem, v_smem, dout_smem, lse_smem,
    delta_smem, place_smem, q_full, q_empty, k_full, k_empty, entries_ptr, item_ptr, first_ptr, doc_ptr, doc_end_ptr,
    base_ptr, T, S, head_start, num_heads, range_start, num_units, bound, J,
    G: gl.constexpr, HKV: gl.constexpr, D: gl.constexpr, RATIO: gl.constexpr, SLOTS: gl.constexpr,
    PACKED: gl.constexpr,
):  # fmt: skip
    LAYOUT: gl.constexpr = gl.BlockedLayout([1, 8], [256 // D, D // 8], [4, 1], [1, 0])
    ROW: gl.constexpr = gl.SliceLayout(1, LAYOUT)
    LINE: gl.constexpr = gl.BlockedLayout([1], [32], [4], [0])
    column = gl.arange(0, D, gl.SliceLayout(0, LAYOUT))
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
            buffer = turn % 2
            mbarrier.wait(k_empty.index(buffer), (turn // 2 & 1) ^ 1)
            mbarrier.expect(k_full.index(buffer), 4 * BLOCK * D)
            box = [b, key_start, group, 0]
            tma.async_copy_global_to_shared(k_desc, box, k_full.index(buffer), k_smem.index(buffer))
            tma.async_copy_global_to_shared(v_desc, box, k_full.index(buffer), v_smem.index(buffer))
            turn += 1

            row = gl.arange(0, ROWS, ROW)
            line = gl.arange(0, ROWS, LINE)
            t = gl.load(entries_ptr + entry + row // G, mask=row < num_rows, other=0) // SLOTS
            line_place = gl.load(entries_ptr + entry + line // G, mask=line < num_rows, other=0)
            for start in range(0, num_rows, ROWS):
                # The next tile's tokens are read long before they are needed.
                next_row = start + ROWS + gl.arange(0, ROWS, ROW)
                next_line = start + ROWS + gl.arange(0, ROWS, LINE)
                next_place = gl.load(entries_ptr + entry + next_row // G, mask=next_row < num_rows, other=0)
                next_line_place = gl.load(entries_ptr + entry + next_line // G, mask=next_line < num_rows, other=0)
                offset = (unit_row + t * (G * HKV) + row % G) * D
                line_offset = unit_row + line_place // SLOTS * (G * HKV) + line % G
                slot = step % STAGES
                # Rows beyond the last are zeros and add nothing.
                live = (row < num_rows)[:, None]
                line_live = line < num_rows
                mbarrier.wait(q_empty.index(slot), (step // STAGES & 1) ^ 1)
                source = offset[:, None] + column[None, :]
                async_copy.async_copy_global_to_shared(q_smem.index(slot), q_ptr + source, mask=live)
                async_copy.async_copy_global_to_shared(dout_smem.index(slot), dout_ptr + source, mask=live)
                async_copy.async_copy_global_to_shared(lse_smem.index(slot), lse_ptr + line_offset, mask=line_live)
                async_copy.async_copy_global_to_shared(delta_smem.index(slot), delta_ptr + line_offset, mask=line_live)
                async_copy.async_copy_global_to_shared(
                    place_smem.index(slot), entries_ptr + entry + line // G, mask=line_live
                )
                async_copy.mbarrier_arrive(q_full.index(slot), increment_count=False)
                step += 1
                row = next_row
                line = next_line
                t = next_place // SLOTS
                line_place = next_line_place
        done += num_items


@gluon.jit
def _store_part(x_ptr, x, item, D: gl.constexpr, LAYOUT: gl.constexpr):
    row = item.to(gl.int64) * BLOCK + gl.arange(0, BLOCK, gl.SliceLayout(1, LAYOUT))
    gl.store(x_ptr + row[:, None] * D + gl.arange(0, D, gl.SliceLayout(0, LAYOUT))[None, :], x)


@gluon.jit
def _row_partition(
    PART: gl.constexpr, part_ptr, dk_ptr, dv_ptr, q_smem, k_smem, v_smem, dout_smem, lse_smem, delta_smem, place_smem,
    ds_smem, q_full, q_empty, k_full, k_empty, entries_ptr, item_ptr, first_ptr, doc_ptr, base_ptr, scale_log2, log2e,
    S, q_start, head_start, token_start, num_tokens, num_heads, range_start, num_units, bound, J,
    G: gl.constexpr, D: gl.constexpr, RATIO: gl.constexpr, SLOTS: gl.constexpr, PACKED: gl.constexpr,
):  # fmt: skip
    S_LAYOUT: gl.constexpr = gl.NVMMADistributedLayout([3, 0], [4, 1], [16, ROWS, 16])
    K_LAYOUT: gl.constexpr = gl.NVMMADistributedLayout([3, 0], [4, 1], [16, D, 16])
    P_LAYOUT: gl.constexpr = gl.DotOperandLayout(0, K_LAYOUT, 2)
    ROW: gl.constexpr = gl.SliceLayout(0, S_LAYOUT)
    STORE: gl.constexpr = gl.BlockedLayout([1, 8], [256 // D, D // 8], [4, 1], [1, 0])
    STORE_ROW: gl.constexpr = gl.SliceLayout(1, STORE)
    dtype: gl.constexpr = q_smem.dtype
    column = gl.arange(0, D, gl.SliceLayout(0, STORE))
    none = gl.zeros([BLOCK, ROWS], gl.float32, S_LAYOUT)
    zero = gl.zeros([ROWS, 64], gl.float32, S_LAYOUT)
    ds_tile = ds_smem.index(PART)
    done = 0
    turn = 0
    step = 0
    for unit in range(num_units):
        unit_ptr, first, num_items = items_of_unit(
            unit, done, item_ptr, first_ptr, head_start, num_heads, range_start, 1, bound, J
        )
        unit_part_ptr = part_ptr + unit.to(gl.int64) * num_tokens * (SLOTS * G * D)
        for item in range(first, num_items, gl.num_programs(0)):
            block = gl.load(unit_ptr + item * 3)
            entry = gl.load(unit_ptr + item * 3 + 1)
            num_rows = (gl.load(unit_ptr + item * 3 + 2) - entry) * G
            num_tiles = gl.cdiv(num_rows, ROWS)
            key_start = item_keys(entries_ptr, entry, block, doc_ptr, base_ptr, SLOTS, RATIO, BLOCK, PACKED)
            key = key_start + gl.arange(0, BLOCK, gl.SliceLayout(1, S_LAYOUT))
            position = gl.minimum(key, S) - q_start
            buffer = turn % 2
            k = k_smem.index(buffer).reshape([BLOCK, D])
            v = v_smem.index(buffer).reshape([BLOCK, D])
            dk = gl.zeros([BLOCK, D], gl.float32, K_LAYOUT)
            dv = gl.zeros([BLOCK, D], gl.float32, K_LAYOUT)
            mbarrier.wait(k_full.index(buffer), turn // 2 & 1)
            for tile in range((PART + step) % PARTS, num_tiles, PARTS):
                slot = (step + tile) % STAGES
                q = q_smem.index(slot)
                dout = dout_smem.index(slot)
                mbarrier.wait(q_full.index(slot), (step + tile) // STAGES & 1)
                fence_async_shared()  # rows were written by threads, the products read them as TMA does
                s = warpgroup_mma(k, q.permute([1, 0]), none, use_acc=False, is_async=True)
                dp = warpgroup_mma(v, dout.permute([1, 0]), none, use_acc=False, is_async=True)
                lse = lse_smem.index(slot).load(ROW) * log2e
                t = place_smem.index(slot).load(ROW) // SLOTS
                s = warpgroup_mma_wait(1, deps=[s])
                p = gl.where(position[:, None] <= t[None, :], gl.exp2(s * scale_log2 - lse[None, :]), 0.0)
                dv = warpgroup_mma(gl.convert_layout(p.to(dtype), P_LAYOUT), dout, dv, is_async=True)
                dp = warpgroup_mma_wait(1, deps=[dp])
                delta = delta_smem.index(slot).load(ROW)
                ds = (p * (dp - delta[None, :])).to(dtype)
                dk = warpgroup_mma(gl.convert_layout(ds, P_LAYOUT), q, dk, is_async=True)
                ds_tile.store(ds)
                fence_async_shared()
                dv = warpgroup_mma_wait(1, deps=[dv])
                dk = warpgroup_mma_wait(0, deps=[dk])
                # Columns of dQ, a half at a time to save registers, get their layout for whole rows in the place of the
                # queries, which are done with.
                for half in gl.static_range(D // 64):
                    dq = warpgroup_mma(
                        ds_tile.permute([1, 0]), k.slice(half * 64, 64, 1), zero, use_acc=False, is_async=True
                    )
                    dq = warpgroup_mma_wait(0, deps=[dq])
                    q.slice(half * 64, 64, 1).store(dq.to(dtype))
                out = q.load(STORE)
                place = place_smem.index(slot).load(STORE_ROW)
                mbarrier.arrive(q_empty.index(slot), count=1)
                row = tile * ROWS + gl.arange(0, ROWS, STORE_ROW)
                part = ((place - token_start * SLOTS) * G + row % G)[:, None] * D + column[None, :]
                gl.store(unit_part_ptr + part, out, mask=(row < num_rows)[:, None])
            mbarrier.arrive(k_empty.index(buffer), count=1)
            _store_part(dk_ptr, dk, (unit * bound + item) * PARTS + PART, D, K_LAYOUT)
            _store_part(dv_ptr, dv, (unit * bound + item) * PARTS + PART, D, K_LAYOUT)
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
    q_ptr, k_desc, v_desc, dout_ptr, lse_ptr, delta_ptr, part_ptr, dk_ptr, dv_ptr, key_ptr,
    entries_ptr, item_ptr, first_ptr, doc_ptr, doc_end_ptr, base_ptr, scale_log2, log2e,
    T, S, q_start, head_start, token_start, num_tokens, num_heads, range_start, num_units, bound, J,
    G: gl.constexpr, HKV: gl.constexpr, D: gl.constexpr, RATIO: gl.constexpr, SLOTS: gl.constexpr,
    PACKED: gl.constexpr,
):  # fmt: skip
    dtype: gl.constexpr = k_desc.dtype
    tile: gl.constexpr = gl.NVMMASharedLayout.get_default_for([ROWS, D], dtype)
    line: gl.constexpr = gl.SwizzledSharedLayout(1, 1, 1, order=[0])
    q_smem = gl.allocate_shared_memory(dtype, [STAGES, ROWS, D], tile)
    dout_smem = gl.allocate_shared_memory(dtype, [STAGES, ROWS, D], tile)
    k_smem = gl.allocate_shared_memory(dtype, [2] + k_desc.block_shape, k_desc.layout)
    v_smem = gl.allocate_shared_memory(dtype, [2] + v_desc.block_shape, v_desc.layout)
    ds_smem = gl.allocate_shared_memory(
        dtype, [PARTS, BLOCK, ROWS], gl.NVMMASharedLayout.get_default_for([BLOCK, ROWS], dtype)
    )
    lse_smem = gl.allocate_shared_memory(gl.float32, [STAGES, ROWS], line)
    delta_smem = gl.allocate_shared_memory(gl.float32, [STAGES, ROWS], line)
    place_smem = gl.allocate_shared_memory(gl.int32, [STAGES, ROWS], line)
    q_full = make_barriers(STAGES, 128)  # every thread that gathers
    q_empty = make_barriers(STAGES, 1)
    k_full = make_barriers(2, 1)
    k_empty = make_barriers(2, PARTS)
    fence_async_shared()
    gl.warp_specialize([
        (_row_partition, (
            0, part_ptr, dk_ptr, dv_ptr, q_smem, k_smem, v_smem, dout_smem, lse_smem, delta_smem, place_smem, ds_smem,
            q_full, q_empty, k_full, k_empty, entries_ptr, item_ptr, first_ptr, doc_ptr, base_ptr, scale_log2, log2e,
            S, q_start, head_start, token_start, num_tokens, num_heads, range_start, num_units, bound, J,
            G, D, RATIO, SLOTS, PACKED,
        )),
        (_row_partition, (
            1, part_ptr, dk_ptr, dv_ptr, q_smem, k_smem, v_smem, dout_smem, lse_smem, delta_smem, place_smem, ds_smem,
            q_full, q_empty, k_full, k_empty, entries_ptr, item_ptr, first_ptr, doc_ptr, base_ptr, scale_log2, log2e,
            S, q_start, head_start, token_start, num_tokens, num_heads, range_start, num_units, bound, J,
            G, D, RATIO, SLOTS, PACKED,
        )),
        (_gather_partition, (
            q_ptr, k_desc, v_desc, dout_ptr, lse_ptr, delta_ptr, key_ptr, q_smem, k_smem, v_smem, dout_smem, lse_smem,
            delta_smem, place_smem, q_full, q_empty, k_full, k_empty, entries_ptr, item_ptr, first_ptr, doc_ptr,
            doc_end_ptr, base_ptr, T, S, head_start, num_heads, range_start, num_units, bound, J,
            G, HKV, D, RATIO, SLOTS, PACKED,
        )),
    ], [4, 4], [232, 40])  # fmt: skip


def hopper_select_backward(
    q: Tensor, k: Tensor, v: Tensor, dout: Tensor, rows: Rows, part: Tensor, dk: Tensor, dv: Tensor, item_key: Tensor,
    inversion: Inversion, items: Items, chunk: Chunk, layout: Layout | None, q_start: int, scale: float,
) -> None:  # fmt: skip
    """Write what `select_backward_kernel` gives for tensors that `hopper_gathers` takes, in PARTS parts an item."""
    B, T, H, D = q.shape
    S, Hkv = k.shape[1:3]
    documents = (q, q, q) if layout is None else (layout.doc_start, layout.doc_end, layout.block_base)
    hopper_select_backward_kernel[(num_multiprocessors(q),)](
        q, describe_box(k, BLOCK.value, 1), describe_box(v, BLOCK.value, 1), dout, rows.lse, rows.delta, part, dk, dv,
        item_key, inversion.entries, items.table, items.first, *documents, scale * LOG2E, LOG2E,
        T, S, q_start, chunk.head, chunk.token, chunk.token_end - chunk.token, B * Hkv,
        chunk.token // items.range_tokens, chunk.head_end - chunk.head, items.table.shape[2], items.first.shape[2] - 1,
        G=H // Hkv, HKV=Hkv, D=D, RATIO=inversion.ratio, SLOTS=inversion.slots, PACKED=layout is not None, num_warps=4,
    )  # fmt: skip
