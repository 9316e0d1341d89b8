"""Forward of the selected branch over unions of blocks on Hopper, in Gluon: three groups of rows share every load.

As in `dense/forward_sm90.py`, a program is persistent, one warp loads by TMA, and groups of four warps hold 64 rows
(token, head) each: TOKENS whole tokens, so that a tile and its union have three times as many. A group skips the blocks
that none of its own tokens chose; of the others each row takes those of its token. A block that all rows lie behind
needs no mask by key.

Shapes and unions are those of `union.py`.
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
from nsa.ops.triton.dense.forward_sm90 import GROUPS, STAGES, TAIL_STAGES, scores
from nsa.ops.triton.gates import Gated, add_branches, gate_pointers
from nsa.ops.triton.gpu import LN2, LOG2E
from nsa.ops.triton.sm90 import (
    KEYS,
    ROWS,
    copy_queries,
    describe_box,
    describe_parts,
    load_keys,
    load_queries,
    make_barriers,
    num_rounds,
    row_offsets,
    tile_of_round,
)

MIN_HEADS = 3  # of a group: a tile's tokens are then no more than a mask has bits


def tile_tokens(group_size: int) -> int:
    """Tokens of a tile."""
    return GROUPS.value * (ROWS.value // group_size)


@gluon.jit
def list_of_tile(
    token, b, group, start_ptr, mask_ptr, count_ptr, num_tiles, HKV: gl.constexpr, TILE: gl.constexpr,
    COUNT: gl.constexpr,
):  # fmt: skip
    """The blocks and masks of the tile that begins at a token, and how many there are."""
    number = (b * HKV + group).to(gl.int64) * num_tiles + token // TILE
    offset = number * (TILE * COUNT)
    return start_ptr + offset, mask_ptr + offset, gl.load(count_ptr + number)


@gluon.jit
def _load_partition(
    q_desc, q_tail_desc, k_desc, k_tail_desc, v_desc, q_smem, q_tail_smem, k_smem, k_tail_smem, v_smem, q_full, q_empty,
    k_full, k_empty, v_full, v_empty, start_ptr, mask_ptr, count_ptr, num_tiles, heads,
    G: gl.constexpr, HKV: gl.constexpr, D: gl.constexpr, TAIL: gl.constexpr, TOKENS: gl.constexpr, COUNT: gl.constexpr,
    STAGES: gl.constexpr, BOXES: gl.constexpr,
):  # fmt: skip
    step = 0
    for turn in range(num_rounds(num_tiles * heads)):
        token, b, group = tile_of_round(turn, num_tiles, heads, HKV, GROUPS * TOKENS)
        starts, _masks, count = list_of_tile(
            token, b, group, start_ptr, mask_ptr, count_ptr, num_tiles, HKV, GROUPS * TOKENS, COUNT
        )
        # Tiles without any block take one step, all of it masked.
        key_start = gl.where(count > 0, gl.load(starts), 0)
        for part in gl.static_range(GROUPS if BOXES else 0):
            box = [b, token + part * TOKENS, group * G, 0]
            load_queries(
                q_desc, q_tail_desc, q_smem, q_tail_smem, q_full, q_empty, turn % 2 * GROUPS + part,
                (turn // 2 & 1) ^ 1, box, D, TAIL,
            )  # fmt: skip
        for i in range(gl.maximum(count, 1)):
            next_start = gl.load(starts + gl.maximum(gl.minimum(i + 1, count - 1), 0))  # long before it is needed
            load_keys(
                k_desc, k_tail_desc, v_desc, k_smem, k_tail_smem, v_smem, k_full, k_empty, v_full, v_empty, step,
                [b, key_start, group, 0], D, TAIL, STAGES,
            )  # fmt: skip
            step += 1
            key_start = next_start


@gluon.jit
def _soften(s, best, total, chosen, key_start, end, plain_end, scale_log2, LAYOUT: gl.constexpr):
    """One step of the online softmax, in base 2, and by how much the previous steps' results fade."""
    if key_start + KEYS > plain_end:
        key = key_start + gl.arange(0, KEYS, gl.SliceLayout(0, LAYOUT))
        s = gl.where(key[None, :] < end[:, None], s, float("-inf"))
    new_best = gl.where(chosen, gl.maximum(best, gl.max(s, 1) * scale_log2), best)
    safe = gl.where(new_best == float("-inf"), 0.0, new_best)
    p = gl.exp2(s * scale_log2 - gl.where(chosen, safe, float("inf"))[:, None])
    decay = gl.exp2(best - safe)
    return p, new_best, total * decay + gl.sum(p, 1), decay


@gluon.jit
def tokens_of_part(mask, PART: gl.constexpr, TOKENS: gl.constexpr):
    """Bits of the tokens that a group of warps holds."""
    return ((mask >> (PART * TOKENS)) & ((1 << TOKENS) - 1)).to(gl.int32)


@gluon.jit
def _attend(
    q_tile, q_tail, k_smem, k_tail_smem, v_smem, k_full, k_empty, v_full, v_empty, step, starts, masks, count, bit,
    end, plain_end, scale_log2, PART: gl.constexpr, D: gl.constexpr, TAIL: gl.constexpr, TOKENS: gl.constexpr,
    S_LAYOUT: gl.constexpr, O_LAYOUT: gl.constexpr, STAGES: gl.constexpr,
):  # fmt: skip
    """Sum of values, running maximum and sum of a group's rows, and the number of the next step."""
    P_LAYOUT: gl.constexpr = gl.DotOperandLayout(0, O_LAYOUT, 2)
    dtype: gl.constexpr = q_tile.dtype
    none = gl.zeros([ROWS, KEYS], gl.float32, S_LAYOUT)
    acc = gl.zeros([ROWS, D], gl.float32, O_LAYOUT)
    best = gl.full([ROWS], float("-inf"), gl.float32, gl.SliceLayout(1, S_LAYOUT))
    total = gl.zeros([ROWS], gl.float32, gl.SliceLayout(1, S_LAYOUT))
    key_start = gl.where(count > 0, gl.load(starts), 0)
    mine = tokens_of_part(gl.load(masks), PART, TOKENS)
    next_start, next_mask = gl.load(starts + 1), gl.load(masks + 1)  # long before they are needed
    held = step  # the step whose values are still to be multiplied
    slot = step % STAGES
    mbarrier.wait(k_full.index(slot), step // STAGES & 1)
    s = scores(q_tile, q_tail, k_smem, k_tail_smem, slot, none, D, TAIL)
    s = warpgroup_mma_wait(0, deps=[s])
    mbarrier.arrive(k_empty.index(slot), count=1)
    p, best, total, _fading = _soften(
        s, best, total, (mine >> bit & 1) != 0, key_start, end, plain_end, scale_log2, S_LAYOUT
    )
    p = gl.convert_layout(p.to(dtype), P_LAYOUT)
    for i in range(1, count):
        key_start = next_start
        mine = tokens_of_part(next_mask, PART, TOKENS)
        ahead = gl.minimum(i + 1, count - 1)
        next_start, next_mask = gl.load(starts + ahead), gl.load(masks + ahead)
        step += 1
        slot = step % STAGES
        phase = step // STAGES & 1
        mbarrier.wait(k_full.index(slot), phase)
        # Held values keep their slot: the loads come no further than to this step.
        if (mine != 0) | (step - held == STAGES):
            old_slot = held % STAGES
            s = scores(q_tile, q_tail, k_smem, k_tail_smem, slot, none, D, TAIL)
            mbarrier.wait(v_full.index(old_slot), held // STAGES & 1)
            acc = warpgroup_mma(p, v_smem.index(old_slot).reshape([KEYS, D]), acc, is_async=True)
            s = warpgroup_mma_wait(1, deps=[s])
            mbarrier.arrive(k_empty.index(slot), count=1)
            fresh, best, total, decay = _soften(
                s, best, total, (mine >> bit & 1) != 0, key_start, end, plain_end, scale_log2, S_LAYOUT
            )
            acc = warpgroup_mma_wait(0, deps=[acc])
            mbarrier.arrive(v_empty.index(old_slot), count=1)
            acc = acc * gl.convert_layout(decay, gl.SliceLayout(1, O_LAYOUT))[:, None]
            p = gl.convert_layout(fresh.to(dtype), P_LAYOUT)
            held = step
        else:
            mbarrier.wait(v_full.index(slot), phase)  # else this might count for the slot's step before
            mbarrier.arrive(k_empty.index(slot), count=1)
            mbarrier.arrive(v_empty.index(slot), count=1)
    slot = held % STAGES
    mbarrier.wait(v_full.index(slot), held // STAGES & 1)
    acc = warpgroup_mma(p, v_smem.index(slot).reshape([KEYS, D]), acc, is_async=True)
    acc = warpgroup_mma_wait(0, deps=[acc])
    mbarrier.arrive(v_empty.index(slot), count=1)
    return acc, best, total, step + 1


@gluon.jit
def _row_partition(
    PART: gl.constexpr, q_ptr, out_ptr, out_desc, sum_desc, lse_ptr, cmp_ptr, win_ptr, gate_ptr, sum_ptr, q_smem,
    q_tail_smem, k_smem, k_tail_smem, v_smem, q_full, q_empty, k_full, k_empty, v_full, v_empty, start_ptr, mask_ptr,
    count_ptr, scale_log2, T, q_start, num_tiles, heads,
    G: gl.constexpr, HKV: gl.constexpr, D: gl.constexpr, TAIL: gl.constexpr, TOKENS: gl.constexpr, COUNT: gl.constexpr,
    GATED: gl.constexpr, LN2: gl.constexpr, STAGES: gl.constexpr, BOXES: gl.constexpr,
):  # fmt: skip
    S_LAYOUT: gl.constexpr = gl.NVMMADistributedLayout([3, 0], [4, 1], [16, KEYS, 16])
    O_LAYOUT: gl.constexpr = gl.NVMMADistributedLayout([3, 0], [4, 1], [16, D, 16])
    ROW_LAYOUT: gl.constexpr = gl.BlockedLayout([1, 8], [256 // D, D // 8], [4, 1], [1, 0])
    TILE: gl.constexpr = GROUPS * TOKENS
    step = 0
    rounds = num_rounds(num_tiles * heads)
    if not BOXES:
        first, first_b, first_group = tile_of_round(0, num_tiles, heads, HKV, TILE)
        first_row = (first + PART * TOKENS) * G
        copy_queries(q_ptr, q_smem, q_tail_smem, PART, first_row, first_b, first_group, T, G, HKV, D, TAIL)
    for turn in range(rounds):
        tile, b, group = tile_of_round(turn, num_tiles, heads, HKV, TILE)
        starts, masks, count = list_of_tile(
            tile, b, group, start_ptr, mask_ptr, count_ptr, num_tiles, HKV, TILE, COUNT
        )  # fmt: skip
        low = tile + PART * TOKENS
        row = gl.arange(0, ROWS, gl.SliceLayout(1, S_LAYOUT))
        bit = row // G
        place = turn % 2 * GROUPS + PART
        q = q_smem.index(place).reshape([ROWS, D])
        q_tail = q
        if TAIL > 0:
            q_tail = q_tail_smem.index(place).reshape([ROWS, TAIL])
        if BOXES:
            mbarrier.wait(q_full.index(place), turn // 2 & 1)
        else:
            async_copy.wait_group(0)
            fence_async_shared()  # rows were written by threads, the products read them as TMA does
            if turn + 1 < rounds:
                next_tile, next_b, next_group = tile_of_round(turn + 1, num_tiles, heads, HKV, TILE)
                next_place = (turn + 1) % 2 * GROUPS + PART
                next_row = (next_tile + PART * TOKENS) * G
                copy_queries(q_ptr, q_smem, q_tail_smem, next_place, next_row, next_b, next_group, T, G, HKV, D, TAIL)
        acc, best, total, step = _attend(
            q, q_tail, k_smem, k_tail_smem, v_smem, k_full, k_empty, v_full, v_empty, step, starts, masks, count, bit,
            low + bit + q_start + 1, low + q_start + 1, scale_log2, PART, D, TAIL, TOKENS, S_LAYOUT, O_LAYOUT, STAGES,
        )  # fmt: skip

        share = 1.0 / gl.where(total == 0.0, 1.0, total)
        lse = gl.where(total == 0.0, float("-inf"), (best + gl.log2(total)) * LN2)
        live = (bit < TOKENS) & (low + bit < T)
        row_64 = (b.to(gl.int64) * T + gl.minimum(low + bit, T - 1)) * (G * HKV) + group * G + row % G
        gl.store(lse_ptr + row_64, lse, mask=live)
        acc = acc * gl.convert_layout(share, gl.SliceLayout(1, O_LAYOUT))[:, None]
        # The queries are done with: their place holds the result until it is written.
        q.store(acc.to(q.dtype))
        offsets, live_row = row_offsets(low * G, b, group, T, G, HKV, D, D, ROWS, ROW_LAYOUT)
        live_row = live_row & (gl.arange(0, ROWS, gl.SliceLayout(1, ROW_LAYOUT)) < TOKENS * G)[:, None]
        if BOXES:
            fence_async_shared()
            tma.async_copy_shared_to_global(out_desc, [b, low, group * G, 0], q_smem.index(place))
        else:
            gl.store(out_ptr + offsets, q.load(ROW_LAYOUT), mask=live_row)
        if GATED:
            row_64 = gl.convert_layout(row_64, gl.SliceLayout(1, O_LAYOUT))
            live = gl.convert_layout(live, gl.SliceLayout(1, O_LAYOUT))
            column = row_64[:, None] * D + gl.arange(0, D, gl.SliceLayout(0, O_LAYOUT))[None, :]
            acc = add_branches(acc, cmp_ptr, win_ptr, gate_ptr, row_64, column, live)
            if BOXES:
                tma.store_wait(0)
            q.store(acc.to(q.dtype))
            if BOXES:
                fence_async_shared()
                tma.async_copy_shared_to_global(sum_desc, [b, low, group * G, 0], q_smem.index(place))
            else:
                gl.store(sum_ptr + offsets, q.load(ROW_LAYOUT), mask=live_row)
        if BOXES:
            tma.store_wait(0)
            mbarrier.arrive(q_empty.index(place), count=1)


@gluon.jit(do_not_specialize=["T", "q_start", "num_tiles", "heads"])
def union_forward_sm90_kernel(
    q_desc, q_tail_desc, k_desc, k_tail_desc, v_desc, out_desc, sum_desc, q_ptr, out_ptr, lse_ptr, cmp_ptr, win_ptr,
    gate_ptr, sum_ptr, start_ptr, mask_ptr, count_ptr, scale_log2, T, q_start, num_tiles, heads,
    G: gl.constexpr, HKV: gl.constexpr, D: gl.constexpr, TAIL: gl.constexpr, TOKENS: gl.constexpr, COUNT: gl.constexpr,
    GATED: gl.constexpr, LN2: gl.constexpr, STAGES: gl.constexpr, BOXES: gl.constexpr,
):  # fmt: skip
    q_smem = gl.allocate_shared_memory(q_desc.dtype, [2 * GROUPS] + q_desc.block_shape, q_desc.layout)
    k_smem = gl.allocate_shared_memory(k_desc.dtype, [STAGES] + k_desc.block_shape, k_desc.layout)
    v_smem = gl.allocate_shared_memory(v_desc.dtype, [STAGES] + v_desc.block_shape, v_desc.layout)
    q_tail_smem, k_tail_smem = q_smem, k_smem
    if TAIL > 0:
        q_box: gl.constexpr = [2 * GROUPS] + q_tail_desc.block_shape
        k_box: gl.constexpr = [STAGES] + k_tail_desc.block_shape
        q_tail_smem = gl.allocate_shared_memory(q_desc.dtype, q_box, q_tail_desc.layout)
        k_tail_smem = gl.allocate_shared_memory(k_desc.dtype, k_box, k_tail_desc.layout)
    q_full = make_barriers(2 * GROUPS, 1)
    q_empty = make_barriers(2 * GROUPS, 1)
    k_full = make_barriers(STAGES, 1)
    k_empty = make_barriers(STAGES, GROUPS)
    v_full = make_barriers(STAGES, 1)
    v_empty = make_barriers(STAGES, GROUPS)
    fence_async_shared()
    gl.warp_specialize([
        (_row_partition, (
            0, q_ptr, out_ptr, out_desc, sum_desc, lse_ptr, cmp_ptr, win_ptr, gate_ptr, sum_ptr, q_smem, q_tail_smem,
            k_smem, k_tail_smem, v_smem, q_full, q_empty, k_full, k_empty, v_full, v_empty, start_ptr, mask_ptr,
            count_ptr, scale_log2, T, q_start, num_tiles, heads, G, HKV, D, TAIL, TOKENS, COUNT, GATED, LN2, STAGES,
            BOXES,
        )),
        (_row_partition, (
            1, q_ptr, out_ptr, out_desc, sum_desc, lse_ptr, cmp_ptr, win_ptr, gate_ptr, sum_ptr, q_smem, q_tail_smem,
            k_smem, k_tail_smem, v_smem, q_full, q_empty, k_full, k_empty, v_full, v_empty, start_ptr, mask_ptr,
            count_ptr, scale_log2, T, q_start, num_tiles, heads, G, HKV, D, TAIL, TOKENS, COUNT, GATED, LN2, STAGES,
            BOXES,
        )),
        (_row_partition, (
            2, q_ptr, out_ptr, out_desc, sum_desc, lse_ptr, cmp_ptr, win_ptr, gate_ptr, sum_ptr, q_smem, q_tail_smem,
            k_smem, k_tail_smem, v_smem, q_full, q_empty, k_full, k_empty, v_full, v_empty, start_ptr, mask_ptr,
            count_ptr, scale_log2, T, q_start, num_tiles, heads, G, HKV, D, TAIL, TOKENS, COUNT, GATED, LN2, STAGES,
            BOXES,
        )),
        (_load_partition, (
            q_desc, q_tail_desc, k_desc, k_tail_desc, v_desc, q_smem, q_tail_smem, k_smem, k_tail_smem, v_smem,
            q_full, q_empty, k_full, k_empty, v_full, v_empty, start_ptr, mask_ptr, count_ptr, num_tiles, heads,
            G, HKV, D, TAIL, TOKENS, COUNT, STAGES, BOXES,
        )),
    ], [4, 4, 1], [160, 160, 24])  # fmt: skip


def union_forward_sm90(
    q: Tensor, k: Tensor, v: Tensor, out: Tensor, lse: Tensor, starts: Tensor, masks: Tensor, counts: Tensor,
    geometry: BlockGeometry, q_start: int, scale: float, gated: Gated | None, programs: int,
) -> None:  # fmt: skip
    """Write what `union_forward` gives, and the gated sum.

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
    branches = gate_pointers(gated, out)
    union_forward_sm90_kernel[(min(programs, num_tiles * B * Hkv),)](
        *describe_parts(q, D, *box), *describe_parts(k, D, KEYS.value, 1), describe_box(v, KEYS.value, 1),
        describe_box(out, *box), describe_box(branches.out, *box), q, out, lse, *branches, starts, masks, counts,
        scale * LOG2E, T, q_start, num_tiles, B * Hkv,
        G=G, HKV=Hkv, D=D, TAIL=tail, TOKENS=ROWS.value // G, COUNT=geometry.num_selected_blocks,
        GATED=gated is not None, LN2=LN2, STAGES=TAIL_STAGES if tail else STAGES, BOXES=boxes, num_warps=4,
    )  # fmt: skip
