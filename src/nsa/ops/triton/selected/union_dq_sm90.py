"""dQ of the selected branch over unions of blocks on Hopper, in Gluon: two groups of rows share every load.

The rows, lists and skips of `union_sm90.py` with the steps of `dense/dq_sm90.py`; a tile has two groups of four warps.
Nothing waits across steps, so that a group skips every block that none of its tokens chose.
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

from nsa.geometry import BlockGeometry
from nsa.ops.triton.dense.dq_sm90 import KEYS, ROWS, STAGES, copy_query_rows, load_rows
from nsa.ops.triton.gpu import LOG2E
from nsa.ops.triton.selected.union_sm90 import list_of_tile, tokens_of_part
from nsa.ops.triton.sm90 import describe_box, describe_parts, make_barriers, num_rounds, row_offsets, tile_of_round

GROUPS = gl.constexpr(2)  # groups of four warps


def tile_tokens(group_size: int) -> int:
    """Tokens of a tile."""
    return GROUPS.value * (ROWS.value // group_size)


@gluon.jit
def _load_partition(
    q_desc, q_tail_desc, k_desc, k_tail_desc, v_desc, dout_desc, q_smem, q_tail_smem, dout_smem, k_smem, k_tail_smem,
    v_smem, q_full, q_empty, k_full, k_empty, v_full, v_empty, start_ptr, mask_ptr, count_ptr, num_tiles, heads,
    G: gl.constexpr, HKV: gl.constexpr, D: gl.constexpr, TAIL: gl.constexpr, TOKENS: gl.constexpr, COUNT: gl.constexpr,
    BUFFERS: gl.constexpr, BOXES: gl.constexpr,
):  # fmt: skip
    step = 0
    for turn in range(num_rounds(num_tiles * heads)):
        token, b, group = tile_of_round(turn, num_tiles, heads, HKV, GROUPS * TOKENS)
        starts, _masks, count = list_of_tile(
            token, b, group, start_ptr, mask_ptr, count_ptr, num_tiles, HKV, GROUPS * TOKENS, COUNT
        )
        key_start = gl.load(starts)
        for part in gl.static_range(GROUPS if BOXES else 0):
            place = turn % BUFFERS * GROUPS + part
            box = [b, token + part * TOKENS, group * G, 0]
            mbarrier.wait(q_empty.index(place), (turn // BUFFERS & 1) ^ 1)
            mbarrier.expect(q_full.index(place), 2 * ROWS * (2 * D + TAIL))
            tma.async_copy_global_to_shared(q_desc, box, q_full.index(place), q_smem.index(place))
            if TAIL > 0:
                tma.async_copy_global_to_shared(q_tail_desc, box, q_full.index(place), q_tail_smem.index(place))
            tma.async_copy_global_to_shared(dout_desc, box, q_full.index(place), dout_smem.index(place))
        for i in range(count):
            next_start = gl.load(starts + gl.minimum(i + 1, count - 1))  # long before it is needed
            slot = step % STAGES
            phase = (step // STAGES & 1) ^ 1
            box = [b, key_start, group, 0]
            mbarrier.wait(k_empty.index(slot), phase)
            mbarrier.expect(k_full.index(slot), 2 * KEYS * (D + TAIL))
            tma.async_copy_global_to_shared(k_desc, box, k_full.index(slot), k_smem.index(slot))
            if TAIL > 0:
                tma.async_copy_global_to_shared(k_tail_desc, box, k_full.index(slot), k_tail_smem.index(slot))
            mbarrier.wait(v_empty.index(slot), phase)
            mbarrier.expect(v_full.index(slot), 2 * KEYS * D)
            tma.async_copy_global_to_shared(v_desc, box, v_full.index(slot), v_smem.index(slot))
            step += 1
            key_start = next_start


@gluon.jit
def _row_partition(
    PART: gl.constexpr, q_ptr, dout_ptr, dq_desc, dq_tail_desc, dq_ptr, lse_ptr, delta_ptr, q_smem, q_tail_smem,
    dout_smem, k_smem, k_tail_smem, v_smem, q_full, q_empty, k_full, k_empty, v_full, v_empty, start_ptr, mask_ptr,
    count_ptr, scale, scale_log2, log2e, T, q_start, num_tiles, heads,
    G: gl.constexpr, HKV: gl.constexpr, D: gl.constexpr, TAIL: gl.constexpr, TOKENS: gl.constexpr, COUNT: gl.constexpr,
    ADD: gl.constexpr, BUFFERS: gl.constexpr, BOXES: gl.constexpr,
):  # fmt: skip
    S_LAYOUT: gl.constexpr = gl.NVMMADistributedLayout([3, 0], [4, 1], [16, KEYS, 16])
    Q_LAYOUT: gl.constexpr = gl.NVMMADistributedLayout([3, 0], [4, 1], [16, D, 16])
    ROW_LAYOUT: gl.constexpr = gl.BlockedLayout([1, 8], [256 // D, D // 8], [4, 1], [1, 0])
    TAIL_LAYOUT: gl.constexpr = gl.BlockedLayout([1, 8], [4, 8], [4, 1], [1, 0])
    TILE: gl.constexpr = GROUPS * TOKENS
    dtype: gl.constexpr = q_smem.dtype
    none = gl.zeros([ROWS, KEYS], gl.float32, S_LAYOUT)
    step = 0
    rounds = num_rounds(num_tiles * heads)
    if not BOXES and BUFFERS == 2:
        first, first_b, first_group = tile_of_round(0, num_tiles, heads, HKV, TILE)
        first_row = (first + PART * TOKENS) * G
        copy_query_rows(
            q_ptr, dout_ptr, q_smem, q_tail_smem, dout_smem, PART, first_row, first_b, first_group, T, G, HKV, D, TAIL
        )
    for turn in range(rounds):
        tile, b, group = tile_of_round(turn, num_tiles, heads, HKV, TILE)
        starts, masks, count = list_of_tile(
            tile, b, group, start_ptr, mask_ptr, count_ptr, num_tiles, HKV, TILE, COUNT
        )  # fmt: skip
        next_start, next_mask = gl.load(starts), gl.load(masks)
        low = tile + PART * TOKENS
        row = gl.arange(0, ROWS, gl.SliceLayout(1, S_LAYOUT))
        bit = row // G
        end = low + bit + q_start + 1
        live = (bit < TOKENS) & (low + bit < T)
        row_64 = (b.to(gl.int64) * T + gl.minimum(low + bit, T - 1)) * (G * HKV) + group * G + row % G
        lse = gl.load(lse_ptr + row_64) * log2e
        delta = gl.load(delta_ptr + row_64)
        place = turn % BUFFERS * GROUPS + PART
        q_tile = q_smem.index(place).reshape([ROWS, D])
        dout_tile = dout_smem.index(place).reshape([ROWS, D])
        dq = gl.zeros([ROWS, D], gl.float32, Q_LAYOUT)
        dq_tail = dq
        before = dq.to(dtype)
        before_tail = before
        q_tail = q_tile
        if TAIL > 0:
            q_tail = q_tail_smem.index(place).reshape([ROWS, TAIL])
            dq_tail = gl.zeros([ROWS, TAIL], gl.float32, S_LAYOUT)
            before_tail = dq_tail.to(dtype)
        if ADD:  # read long before it is needed
            before = load_rows(dq_ptr, row_64, live, D, D + TAIL, Q_LAYOUT)
            if TAIL > 0:
                before_tail = load_rows(dq_ptr + D, row_64, live, TAIL, D + TAIL, S_LAYOUT)
        if BOXES:
            mbarrier.wait(q_full.index(place), turn // BUFFERS & 1)
        else:
            if BUFFERS == 1:
                copy_query_rows(
                    q_ptr, dout_ptr, q_smem, q_tail_smem, dout_smem, PART, low * G, b, group, T, G, HKV, D, TAIL
                )
            async_copy.wait_group(0)
            fence_async_shared()  # rows were written by threads, the products read them as TMA does
            if BUFFERS == 2 and turn + 1 < rounds:
                next_tile, next_b, next_group = tile_of_round(turn + 1, num_tiles, heads, HKV, TILE)
                next_row = (next_tile + PART * TOKENS) * G
                copy_query_rows(
                    q_ptr, dout_ptr, q_smem, q_tail_smem, dout_smem, (turn + 1) % 2 * GROUPS + PART, next_row, next_b,
                    next_group, T, G, HKV, D, TAIL,
                )  # fmt: skip
        for i in range(count):
            key_start = next_start
            mine = tokens_of_part(next_mask, PART, TOKENS)
            ahead = gl.minimum(i + 1, count - 1)
            next_start, next_mask = gl.load(starts + ahead), gl.load(masks + ahead)
            slot = step % STAGES
            phase = step // STAGES & 1
            mbarrier.wait(k_full.index(slot), phase)
            if mine != 0:
                k = k_smem.index(slot).reshape([KEYS, D])
                v = v_smem.index(slot).reshape([KEYS, D])
                s = warpgroup_mma(q_tile, k.permute([1, 0]), none, use_acc=False, is_async=True)
                k_tail = k
                if TAIL > 0:
                    k_tail = k_tail_smem.index(slot).reshape([KEYS, TAIL])
                    s = warpgroup_mma(q_tail, k_tail.permute([1, 0]), s, is_async=True)
                mbarrier.wait(v_full.index(slot), phase)
                dp = warpgroup_mma(dout_tile, v.permute([1, 0]), none, use_acc=False, is_async=True)
                s = warpgroup_mma_wait(1, deps=[s])
                p = gl.exp2(s * scale_log2 - gl.where((mine >> bit & 1) != 0, lse, float("inf"))[:, None])
                if key_start + KEYS > low + q_start + 1:
                    key = key_start + gl.arange(0, KEYS, gl.SliceLayout(0, S_LAYOUT))
                    p = gl.where(key[None, :] < end[:, None], p, 0.0)
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
            else:  # the other group chose the block, and waits for its values before the slot is filled again
                mbarrier.arrive(v_empty.index(slot), count=1)
            mbarrier.arrive(k_empty.index(slot), count=1)
            step += 1
        # The queries are done with: their place holds the result until it is written.
        q_tile.store((dq * scale + before.to(gl.float32)).to(dtype))
        if TAIL > 0:
            q_tail.store((dq_tail * scale + before_tail.to(gl.float32)).to(dtype))
        if BOXES:
            fence_async_shared()
            box = [b, low, group * G, 0]
            tma.async_copy_shared_to_global(dq_desc, box, q_smem.index(place))
            if TAIL > 0:
                tma.async_copy_shared_to_global(dq_tail_desc, box, q_tail_smem.index(place))
            tma.store_wait(0)
            mbarrier.arrive(q_empty.index(place), count=1)
        else:
            offsets, live_row = row_offsets(low * G, b, group, T, G, HKV, D, D + TAIL, ROWS, ROW_LAYOUT)
            whole = gl.arange(0, ROWS, gl.SliceLayout(1, ROW_LAYOUT)) < TOKENS * G
            gl.store(dq_ptr + offsets, q_tile.load(ROW_LAYOUT), mask=live_row & whole[:, None])
            if TAIL > 0:
                offsets, live_row = row_offsets(low * G, b, group, T, G, HKV, TAIL, D + TAIL, ROWS, TAIL_LAYOUT)
                whole = gl.arange(0, ROWS, gl.SliceLayout(1, TAIL_LAYOUT)) < TOKENS * G
                gl.store(dq_ptr + D + offsets, q_tail.load(TAIL_LAYOUT), mask=live_row & whole[:, None])


@gluon.jit(do_not_specialize=["T", "q_start", "num_tiles", "heads"])
def union_dq_sm90_kernel(
    q_desc, q_tail_desc, k_desc, k_tail_desc, v_desc, dout_desc, dq_desc, dq_tail_desc, q_ptr, dout_ptr, dq_ptr,
    lse_ptr, delta_ptr, start_ptr, mask_ptr, count_ptr, scale, scale_log2, log2e, T, q_start, num_tiles, heads,
    G: gl.constexpr, HKV: gl.constexpr, D: gl.constexpr, TAIL: gl.constexpr, TOKENS: gl.constexpr, COUNT: gl.constexpr,
    ADD: gl.constexpr, BUFFERS: gl.constexpr, BOXES: gl.constexpr,
):  # fmt: skip
    q_smem = gl.allocate_shared_memory(q_desc.dtype, [GROUPS * BUFFERS] + q_desc.block_shape, q_desc.layout)
    dout_smem = gl.allocate_shared_memory(
        dout_desc.dtype, [GROUPS * BUFFERS] + dout_desc.block_shape, dout_desc.layout
    )  # fmt: skip
    k_smem = gl.allocate_shared_memory(k_desc.dtype, [STAGES] + k_desc.block_shape, k_desc.layout)
    v_smem = gl.allocate_shared_memory(v_desc.dtype, [STAGES] + v_desc.block_shape, v_desc.layout)
    q_tail_smem, k_tail_smem = q_smem, k_smem
    if TAIL > 0:
        q_box: gl.constexpr = [GROUPS * BUFFERS] + q_tail_desc.block_shape
        k_box: gl.constexpr = [STAGES] + k_tail_desc.block_shape
        q_tail_smem = gl.allocate_shared_memory(q_desc.dtype, q_box, q_tail_desc.layout)
        k_tail_smem = gl.allocate_shared_memory(k_desc.dtype, k_box, k_tail_desc.layout)
    q_full = make_barriers(GROUPS * BUFFERS, 1)
    q_empty = make_barriers(GROUPS * BUFFERS, 1)
    k_full = make_barriers(STAGES, 1)
    k_empty = make_barriers(STAGES, GROUPS)
    v_full = make_barriers(STAGES, 1)
    v_empty = make_barriers(STAGES, GROUPS)
    fence_async_shared()
    gl.warp_specialize([
        (_row_partition, (
            0, q_ptr, dout_ptr, dq_desc, dq_tail_desc, dq_ptr, lse_ptr, delta_ptr, q_smem, q_tail_smem, dout_smem,
            k_smem, k_tail_smem, v_smem, q_full, q_empty, k_full, k_empty, v_full, v_empty, start_ptr, mask_ptr,
            count_ptr, scale, scale_log2, log2e, T, q_start, num_tiles, heads, G, HKV, D, TAIL, TOKENS, COUNT, ADD,
            BUFFERS, BOXES,
        )),
        (_row_partition, (
            1, q_ptr, dout_ptr, dq_desc, dq_tail_desc, dq_ptr, lse_ptr, delta_ptr, q_smem, q_tail_smem, dout_smem,
            k_smem, k_tail_smem, v_smem, q_full, q_empty, k_full, k_empty, v_full, v_empty, start_ptr, mask_ptr,
            count_ptr, scale, scale_log2, log2e, T, q_start, num_tiles, heads, G, HKV, D, TAIL, TOKENS, COUNT, ADD,
            BUFFERS, BOXES,
        )),
        (_load_partition, (
            q_desc, q_tail_desc, k_desc, k_tail_desc, v_desc, dout_desc, q_smem, q_tail_smem, dout_smem, k_smem,
            k_tail_smem, v_smem, q_full, q_empty, k_full, k_empty, v_full, v_empty, start_ptr, mask_ptr, count_ptr,
            num_tiles, heads, G, HKV, D, TAIL, TOKENS, COUNT, BUFFERS, BOXES,
        )),
    ], [4, 1], [240, 24])  # fmt: skip


def union_dq_sm90(
    dout: Tensor, q: Tensor, k: Tensor, v: Tensor, lse: Tensor, delta: Tensor, dq: Tensor, starts: Tensor,
    masks: Tensor, counts: Tensor, geometry: BlockGeometry, q_start: int, scale: float, add: bool, programs: int,
) -> None:  # fmt: skip
    """Write dq, or add to it.

    Args:
        starts, masks, counts: `Unions` of `tile_tokens` tokens.
        programs: at most, one for each multiprocessor.
    """
    B, T, H, Dk = q.shape
    Hkv, D = k.shape[2], v.shape[3]
    G, tail = H // Hkv, Dk - D
    boxes = ROWS.value % G == 0
    box = (ROWS.value // G, G) if boxes else (ROWS.value, 1)
    num_tiles = counts.shape[1]
    union_dq_sm90_kernel[(min(programs, num_tiles * B * Hkv),)](
        *describe_parts(q, D, *box), *describe_parts(k, D, KEYS.value, 1), describe_box(v, KEYS.value, 1),
        describe_box(dout, *box), *describe_parts(dq, D, *box), q, dout, dq, lse, delta, starts, masks, counts,
        scale, scale * LOG2E, LOG2E, T, q_start, num_tiles, B * Hkv,
        G=G, HKV=Hkv, D=D, TAIL=tail, TOKENS=ROWS.value // G, COUNT=geometry.num_selected_blocks, ADD=add,
        BUFFERS=1 if tail else 2, BOXES=boxes, num_warps=4,
    )  # fmt: skip
