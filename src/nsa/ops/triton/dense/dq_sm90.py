"""dQ of the compressed and the window branch on Hopper, in Gluon: loads beside products.

As in `backward.py`, a program holds rows and runs over their keys. One warp loads by TMA; two groups of four warps hold
64 rows each, which they copy themselves where whole tokens do not fill a tile (BOXES).

Shapes and intervals are those of `backward.py`.
"""

# Kernels are typed by Triton, not by Python.
# pyright: reportArgumentType=false, reportCallIssue=false, reportAttributeAccessIssue=false, reportReturnType=false
# pyright: reportGeneralTypeIssues=false, reportPossiblyUnboundVariable=false
# pyright: reportAssignmentType=false, reportOperatorIssue=false
# Lists in kernels are added, not unpacked.
# ruff: noqa: RUF005
from __future__ import annotations

import triton
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

from nsa.geometry import BlockGeometry
from nsa.ops.triton.dense.forward_sm90 import tile_keys
from nsa.ops.triton.gpu import LOG2E
from nsa.ops.triton.layout import Layout, document_pointers, key_interval
from nsa.ops.triton.sm90 import (
    copy_rows,
    describe_box,
    describe_parts,
    make_barriers,
    num_rounds,
    row_offsets,
    tile_of_round,
)

ROWS = gl.constexpr(64)  # rows of a group of four warps
KEYS = gl.constexpr(64)  # keys of a step
STAGES = gl.constexpr(3)  # steps in flight


@gluon.jit
def _query_load_partition(
    q_desc, q_tail_desc, k_desc, k_tail_desc, v_desc, dout_desc, q_smem, q_tail_smem, dout_smem, k_smem, k_tail_smem,
    v_smem, q_full, q_empty, k_full, k_empty, v_full, v_empty, doc_ptr, cmp_ptr, T, S, q_start, k_start, num_tiles,
    heads,
    G: gl.constexpr, HKV: gl.constexpr, D: gl.constexpr, TAIL: gl.constexpr, SIZE: gl.constexpr, STRIDE: gl.constexpr,
    WINDOW: gl.constexpr, PACKED: gl.constexpr, BUFFERS: gl.constexpr, BOXES: gl.constexpr,
):  # fmt: skip
    step = 0
    for turn in range(num_rounds(num_tiles * heads)):
        row, b, group = tile_of_round(turn, num_tiles, heads, HKV, 2 * ROWS)
        first, _from, _to, end = tile_keys(
            row, 2 * ROWS, doc_ptr, cmp_ptr, T, S, q_start, k_start, G, SIZE, STRIDE, WINDOW, PACKED
        )
        for half in gl.static_range(2 if BOXES else 0):
            place = turn % BUFFERS * 2 + half
            box = [b, row // G + half * (ROWS // G), group * G, 0]
            mbarrier.wait(q_empty.index(place), (turn // BUFFERS & 1) ^ 1)
            mbarrier.expect(q_full.index(place), 2 * ROWS * (2 * D + TAIL))
            tma.async_copy_global_to_shared(q_desc, box, q_full.index(place), q_smem.index(place))
            if TAIL > 0:
                tma.async_copy_global_to_shared(q_tail_desc, box, q_full.index(place), q_tail_smem.index(place))
            tma.async_copy_global_to_shared(dout_desc, box, q_full.index(place), dout_smem.index(place))
        for key in range(first, end, KEYS):
            slot = step % STAGES
            phase = (step // STAGES & 1) ^ 1
            mbarrier.wait(k_empty.index(slot), phase)
            mbarrier.expect(k_full.index(slot), 2 * KEYS * (D + TAIL))
            box = [b, key, group, 0]
            tma.async_copy_global_to_shared(k_desc, box, k_full.index(slot), k_smem.index(slot))
            if TAIL > 0:
                tma.async_copy_global_to_shared(k_tail_desc, box, k_full.index(slot), k_tail_smem.index(slot))
            mbarrier.wait(v_empty.index(slot), phase)
            mbarrier.expect(v_full.index(slot), 2 * KEYS * D)
            tma.async_copy_global_to_shared(v_desc, box, v_full.index(slot), v_smem.index(slot))
            step += 1


@gluon.jit
def copy_query_rows(
    q_ptr, dout_ptr, q_smem, q_tail_smem, dout_smem, place, low, b, group, T, G: gl.constexpr, HKV: gl.constexpr,
    D: gl.constexpr, TAIL: gl.constexpr,
):  # fmt: skip
    copy_rows(q_ptr, q_smem.index(place), low, b, group, T, G, HKV, D, D + TAIL, ROWS)
    if TAIL > 0:
        copy_rows(q_ptr + D, q_tail_smem.index(place), low, b, group, T, G, HKV, TAIL, D + TAIL, ROWS)
    copy_rows(dout_ptr, dout_smem.index(place), low, b, group, T, G, HKV, D, D, ROWS)
    async_copy.commit_group()


@gluon.jit
def load_rows(x_ptr, row, live, D: gl.constexpr, WIDTH: gl.constexpr, LAYOUT: gl.constexpr):
    place = gl.convert_layout(row, gl.SliceLayout(1, LAYOUT))[:, None] * WIDTH
    place += gl.arange(0, D, gl.SliceLayout(0, LAYOUT))[None, :]
    return gl.load(x_ptr + place, mask=gl.convert_layout(live, gl.SliceLayout(1, LAYOUT))[:, None], other=0.0)


@gluon.jit
def _query_partition(
    HALF: gl.constexpr, q_ptr, dout_ptr, dq_desc, dq_tail_desc, dq_ptr, lse_ptr, delta_ptr, q_smem, q_tail_smem,
    dout_smem, k_smem, k_tail_smem, v_smem, q_full, q_empty, k_full, k_empty, v_full, v_empty, doc_ptr, cmp_ptr,
    scale, scale_log2, log2e, T, S, q_start, k_start, num_tiles, heads,
    G: gl.constexpr, HKV: gl.constexpr, D: gl.constexpr, TAIL: gl.constexpr, SIZE: gl.constexpr, STRIDE: gl.constexpr,
    WINDOW: gl.constexpr, PACKED: gl.constexpr, ADD: gl.constexpr, BUFFERS: gl.constexpr, BOXES: gl.constexpr,
):  # fmt: skip
    S_LAYOUT: gl.constexpr = gl.NVMMADistributedLayout([3, 0], [4, 1], [16, KEYS, 16])
    Q_LAYOUT: gl.constexpr = gl.NVMMADistributedLayout([3, 0], [4, 1], [16, D, 16])
    ROW: gl.constexpr = gl.SliceLayout(1, S_LAYOUT)
    dtype: gl.constexpr = q_smem.dtype
    ROW_LAYOUT: gl.constexpr = gl.BlockedLayout([1, 8], [256 // D, D // 8], [4, 1], [1, 0])
    TAIL_LAYOUT: gl.constexpr = gl.BlockedLayout([1, 8], [4, 8], [4, 1], [1, 0])
    none = gl.zeros([ROWS, KEYS], gl.float32, S_LAYOUT)
    step = 0
    rounds = num_rounds(num_tiles * heads)
    if not BOXES and BUFFERS == 2:
        first_row, first_b, first_group = tile_of_round(0, num_tiles, heads, HKV, 2 * ROWS)
        first_row += HALF * ROWS
        copy_query_rows(
            q_ptr, dout_ptr, q_smem, q_tail_smem, dout_smem, HALF, first_row, first_b, first_group, T, G, HKV, D, TAIL
        )
    for turn in range(rounds):
        tile_row, b, group = tile_of_round(turn, num_tiles, heads, HKV, 2 * ROWS)
        tile_first, _from, _to, tile_end = tile_keys(
            tile_row, 2 * ROWS, doc_ptr, cmp_ptr, T, S, q_start, k_start, G, SIZE, STRIDE, WINDOW, PACKED
        )
        low = tile_row + HALF * ROWS
        _first, plain_first, plain_end, _end = tile_keys(
            low, ROWS, doc_ptr, cmp_ptr, T, S, q_start, k_start, G, SIZE, STRIDE, WINDOW, PACKED
        )
        row = low + gl.arange(0, ROWS, ROW)
        t = gl.minimum(row // G, T - 1)
        first, end = key_interval(t, doc_ptr, cmp_ptr, S, q_start, k_start, SIZE, STRIDE, WINDOW, PACKED)
        row_64 = (b.to(gl.int64) * T + t) * (G * HKV) + group * G + row % G
        lse = gl.load(lse_ptr + row_64) * log2e
        delta = gl.load(delta_ptr + row_64)
        place = turn % BUFFERS * 2 + HALF
        q_tile = q_smem.index(place).reshape([ROWS, D])
        dout_tile = dout_smem.index(place).reshape([ROWS, D])
        dq = gl.zeros([ROWS, D], gl.float32, Q_LAYOUT)
        dq_tail = dq
        before = dq.to(dtype)
        before_tail = before
        live = row < T * G
        if TAIL > 0:
            dq_tail = gl.zeros([ROWS, TAIL], gl.float32, S_LAYOUT)
            before_tail = dq_tail.to(dtype)
        if ADD:  # read long before it is needed
            before = load_rows(dq_ptr, row_64, live, D, D + TAIL, Q_LAYOUT)
            if TAIL > 0:
                before_tail = load_rows(dq_ptr + D, row_64, live, TAIL, D + TAIL, S_LAYOUT)
        q_tail = q_tile
        if TAIL > 0:
            q_tail = q_tail_smem.index(place).reshape([ROWS, TAIL])
        if BOXES:
            mbarrier.wait(q_full.index(place), turn // BUFFERS & 1)
        else:
            if BUFFERS == 1:
                copy_query_rows(
                    q_ptr, dout_ptr, q_smem, q_tail_smem, dout_smem, HALF, low, b, group, T, G, HKV, D, TAIL
                )
            async_copy.wait_group(0)
            fence_async_shared()  # rows were written by threads, the products read them as TMA does
            if BUFFERS == 2 and turn + 1 < rounds:
                next_row, next_b, next_group = tile_of_round(turn + 1, num_tiles, heads, HKV, 2 * ROWS)
                next_row += HALF * ROWS
                copy_query_rows(
                    q_ptr, dout_ptr, q_smem, q_tail_smem, dout_smem, (turn + 1) % 2 * 2 + HALF, next_row, next_b,
                    next_group, T, G, HKV, D, TAIL,
                )  # fmt: skip
        for key_start in range(tile_first, tile_end, KEYS):
            slot = step % STAGES
            phase = step // STAGES & 1
            k = k_smem.index(slot).reshape([KEYS, D])
            v = v_smem.index(slot).reshape([KEYS, D])
            mbarrier.wait(k_full.index(slot), phase)
            s = warpgroup_mma(q_tile, k.permute([1, 0]), none, use_acc=False, is_async=True)
            k_tail = k
            if TAIL > 0:
                k_tail = k_tail_smem.index(slot).reshape([KEYS, TAIL])
                s = warpgroup_mma(q_tail, k_tail.permute([1, 0]), s, is_async=True)
            mbarrier.wait(v_full.index(slot), phase)
            dp = warpgroup_mma(dout_tile, v.permute([1, 0]), none, use_acc=False, is_async=True)
            s = warpgroup_mma_wait(1, deps=[s])
            p = gl.exp2(s * scale_log2 - lse[:, None])
            if (key_start < plain_first) | (key_start + KEYS > plain_end):
                key = key_start + gl.arange(0, KEYS, gl.SliceLayout(0, S_LAYOUT))
                p = gl.where((key[None, :] >= first[:, None]) & (key[None, :] < end[:, None]), p, 0.0)
            dp = warpgroup_mma_wait(0, deps=[dp])
            mbarrier.arrive(v_empty.index(slot), count=1)
            ds = (p * (dp - delta[:, None])).to(dtype)
            dq = warpgroup_mma(gl.convert_layout(ds, gl.DotOperandLayout(0, Q_LAYOUT, 2)), k, dq, is_async=True)
            if TAIL > 0:
                ds = gl.convert_layout(ds, gl.DotOperandLayout(0, S_LAYOUT, 2))
                dq_tail = warpgroup_mma(ds, k_tail, dq_tail, is_async=True)
                dq = warpgroup_mma_wait(1, deps=[dq])
                dq_tail = warpgroup_mma_wait(0, deps=[dq_tail])
            else:
                dq = warpgroup_mma_wait(0, deps=[dq])
            mbarrier.arrive(k_empty.index(slot), count=1)
            step += 1
        # The queries are done with: their place holds the result until it is written.
        q_tile.store((dq * scale + before.to(gl.float32)).to(dtype))
        if TAIL > 0:
            q_tail.store((dq_tail * scale + before_tail.to(gl.float32)).to(dtype))
        if BOXES:
            fence_async_shared()
            box = [b, low // G, group * G, 0]
            tma.async_copy_shared_to_global(dq_desc, box, q_smem.index(place))
            if TAIL > 0:
                tma.async_copy_shared_to_global(dq_tail_desc, box, q_tail_smem.index(place))
            tma.store_wait(0)
            mbarrier.arrive(q_empty.index(place), count=1)
        else:
            offsets, live_row = row_offsets(low, b, group, T, G, HKV, D, D + TAIL, ROWS, ROW_LAYOUT)
            gl.store(dq_ptr + offsets, q_tile.load(ROW_LAYOUT), mask=live_row)
            if TAIL > 0:
                offsets, live_row = row_offsets(low, b, group, T, G, HKV, TAIL, D + TAIL, ROWS, TAIL_LAYOUT)
                gl.store(dq_ptr + D + offsets, q_tail.load(TAIL_LAYOUT), mask=live_row)


@gluon.jit(do_not_specialize=["T", "S", "q_start", "k_start", "num_tiles", "heads"])
def dense_dq_sm90_kernel(
    q_desc, q_tail_desc, k_desc, k_tail_desc, v_desc, dout_desc, dq_desc, dq_tail_desc, q_ptr, dout_ptr, dq_ptr,
    lse_ptr, delta_ptr, doc_ptr, cmp_ptr, scale, scale_log2, log2e, T, S, q_start, k_start, num_tiles, heads,
    G: gl.constexpr, HKV: gl.constexpr, D: gl.constexpr, TAIL: gl.constexpr, SIZE: gl.constexpr, STRIDE: gl.constexpr,
    WINDOW: gl.constexpr, PACKED: gl.constexpr, ADD: gl.constexpr, BUFFERS: gl.constexpr, BOXES: gl.constexpr,
):  # fmt: skip
    q_smem = gl.allocate_shared_memory(q_desc.dtype, [2 * BUFFERS] + q_desc.block_shape, q_desc.layout)
    dout_smem = gl.allocate_shared_memory(dout_desc.dtype, [2 * BUFFERS] + dout_desc.block_shape, dout_desc.layout)
    k_smem = gl.allocate_shared_memory(k_desc.dtype, [STAGES] + k_desc.block_shape, k_desc.layout)
    v_smem = gl.allocate_shared_memory(v_desc.dtype, [STAGES] + v_desc.block_shape, v_desc.layout)
    q_tail_smem, k_tail_smem = q_smem, k_smem
    if TAIL > 0:
        q_box: gl.constexpr = [2 * BUFFERS] + q_tail_desc.block_shape
        k_box: gl.constexpr = [STAGES] + k_tail_desc.block_shape
        q_tail_smem = gl.allocate_shared_memory(q_desc.dtype, q_box, q_tail_desc.layout)
        k_tail_smem = gl.allocate_shared_memory(k_desc.dtype, k_box, k_tail_desc.layout)
    q_full = make_barriers(2 * BUFFERS, 1)
    q_empty = make_barriers(2 * BUFFERS, 1)
    k_full = make_barriers(STAGES, 1)
    k_empty = make_barriers(STAGES, 2)
    v_full = make_barriers(STAGES, 1)
    v_empty = make_barriers(STAGES, 2)
    fence_async_shared()
    gl.warp_specialize([
        (_query_partition, (
            0, q_ptr, dout_ptr, dq_desc, dq_tail_desc, dq_ptr, lse_ptr, delta_ptr, q_smem, q_tail_smem, dout_smem,
            k_smem, k_tail_smem, v_smem, q_full, q_empty, k_full, k_empty, v_full, v_empty, doc_ptr, cmp_ptr, scale,
            scale_log2, log2e, T, S, q_start, k_start, num_tiles, heads, G, HKV, D, TAIL, SIZE, STRIDE, WINDOW, PACKED,
            ADD, BUFFERS, BOXES,
        )),
        (_query_partition, (
            1, q_ptr, dout_ptr, dq_desc, dq_tail_desc, dq_ptr, lse_ptr, delta_ptr, q_smem, q_tail_smem, dout_smem,
            k_smem, k_tail_smem, v_smem, q_full, q_empty, k_full, k_empty, v_full, v_empty, doc_ptr, cmp_ptr, scale,
            scale_log2, log2e, T, S, q_start, k_start, num_tiles, heads, G, HKV, D, TAIL, SIZE, STRIDE, WINDOW, PACKED,
            ADD, BUFFERS, BOXES,
        )),
        (_query_load_partition, (
            q_desc, q_tail_desc, k_desc, k_tail_desc, v_desc, dout_desc, q_smem, q_tail_smem, dout_smem, k_smem,
            k_tail_smem, v_smem, q_full, q_empty, k_full, k_empty, v_full, v_empty, doc_ptr, cmp_ptr, T, S, q_start,
            k_start, num_tiles, heads, G, HKV, D, TAIL, SIZE, STRIDE, WINDOW, PACKED, BUFFERS, BOXES,
        )),
    ], [4, 1], [240, 24])  # fmt: skip


def dense_dq_sm90(
    dout: Tensor, q: Tensor, k: Tensor, v: Tensor, lse: Tensor, delta: Tensor, dq: Tensor,
    geometry: BlockGeometry, layout: Layout | None, window: int, q_start: int, k_start: int, scale: float,
    add: bool, programs: int,
) -> None:  # fmt: skip
    """Write dq, or add to it, with so many programs at most."""
    B, T, H, Dk = q.shape
    S, Hkv, D = k.shape[1], k.shape[2], v.shape[3]
    G, tail = H // Hkv, Dk - D
    boxes = ROWS.value % G == 0
    box = (ROWS.value // G, G) if boxes else (ROWS.value, 1)
    documents = document_pointers(layout, q, "doc_start", "cmp_start")
    num_tiles = triton.cdiv(T * G, 2 * ROWS.value)
    dense_dq_sm90_kernel[(min(programs, num_tiles * B * Hkv),)](
        *describe_parts(q, D, *box), *describe_parts(k, D, KEYS.value, 1), describe_box(v, KEYS.value, 1),
        describe_box(dout, *box), *describe_parts(dq, D, *box), q, dout, dq, lse, delta, *documents,
        scale, scale * LOG2E, LOG2E, T, S, q_start, k_start, num_tiles, B * Hkv,
        G=G, HKV=Hkv, D=D, TAIL=tail, SIZE=geometry.compress_block_size, STRIDE=geometry.compress_stride,
        WINDOW=window, PACKED=layout is not None, ADD=add,
        BUFFERS=1 if tail else 2, BOXES=boxes, num_warps=4,
    )  # fmt: skip
