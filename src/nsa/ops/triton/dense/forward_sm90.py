"""Forward of the compressed and the window branch and of the forced blocks on Hopper, in Gluon.

Loads and the parts of a tile run side by side.

One warp loads keys and values by TMA, and queries where whole tokens fill a tile (BOXES); rows of other group sizes are
copied by those who need them. Groups of four warps hold 64 rows (token, head) each and drift apart, so that one
computes exponentials while others multiply; each issues the next scores and the present values' product together (Shah
et al., FlashAttention-3, arXiv 2407.08608, section 3). Programs are persistent, one for each multiprocessor: the next
tile's queries arrive under the present tile.

Shapes and intervals are those of `forward.py`, for forced blocks those of `forced_sm90.py`; `nsa.ops.triton.plan`
says which shapes come here.
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
from nsa.ops.triton.dense.forced_sm90 import forced_keys_of_rows, forced_keys_of_tile
from nsa.ops.triton.gpu import LN2, LOG2E
from nsa.ops.triton.layout import Layout, document_pointers, key_interval
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

GROUPS = gl.constexpr(3)  # groups of four warps
STAGES, TAIL_STAGES = 4, 2  # steps in flight; where keys have a tail, 192 = 128 + 64, there is room for fewer


@gluon.jit
def tile_keys(
    low, rows, doc_ptr, cmp_ptr, T, S, q_start, k_start, G: gl.constexpr, SIZE: gl.constexpr, STRIDE: gl.constexpr,
    WINDOW: gl.constexpr, PACKED: gl.constexpr,
):  # fmt: skip
    """Of `rows` rows from `low` on: first key of any, from which key all see, to which all see, end of any."""
    t_low = gl.minimum(low // G, T - 1)
    t_high = gl.minimum((low + rows - 1) // G, T - 1)
    first_low, end_low = key_interval(t_low, doc_ptr, cmp_ptr, S, q_start, k_start, SIZE, STRIDE, WINDOW, PACKED)
    first_high, end_high = key_interval(t_high, doc_ptr, cmp_ptr, S, q_start, k_start, SIZE, STRIDE, WINDOW, PACKED)
    return first_low, first_high, end_low, end_high


@gluon.jit
def _load_partition(
    q_desc, q_tail_desc, k_desc, k_tail_desc, v_desc, q_smem, q_tail_smem, k_smem, k_tail_smem, v_smem, q_full, q_empty,
    k_full, k_empty, v_full, v_empty, doc_ptr, cmp_ptr, T, S, q_start, k_start, num_tiles, heads,
    G: gl.constexpr, HKV: gl.constexpr, D: gl.constexpr, TAIL: gl.constexpr, SIZE: gl.constexpr, STRIDE: gl.constexpr,
    WINDOW: gl.constexpr, BLOCK: gl.constexpr, INIT: gl.constexpr, LOCAL: gl.constexpr, PACKED: gl.constexpr,
    STAGES: gl.constexpr, BOXES: gl.constexpr,
):  # fmt: skip
    step = 0
    for turn in range(num_rounds(num_tiles * heads)):
        row, b, group = tile_of_round(turn, num_tiles, heads, HKV, GROUPS * ROWS)
        if LOCAL > 0:
            first = 0
            doc, early, local, end = forced_keys_of_tile(
                row, GROUPS * ROWS, doc_ptr, T, S, q_start, G, BLOCK, INIT, LOCAL, PACKED, KEYS
            )
        else:
            first, _from, _to, end = tile_keys(
                row, GROUPS * ROWS, doc_ptr, cmp_ptr, T, S, q_start, k_start, G, SIZE, STRIDE, WINDOW, PACKED
            )
        for part in gl.static_range(GROUPS if BOXES else 0):
            box = [b, row // G + part * (ROWS // G), group * G, 0]
            load_queries(
                q_desc, q_tail_desc, q_smem, q_tail_smem, q_full, q_empty, turn % 2 * GROUPS + part,
                (turn // 2 & 1) ^ 1, box, D, TAIL,
            )  # fmt: skip
        # Tiles without any key take one step, all of it masked.
        for i in range(gl.maximum(gl.cdiv(end - first, KEYS), 1)):
            key_start = first + i * KEYS
            if LOCAL > 0:
                key_start = gl.where(key_start < early, doc + key_start, local + (key_start - early))
            box = [b, key_start, group, 0]
            load_keys(
                k_desc, k_tail_desc, v_desc, k_smem, k_tail_smem, v_smem, k_full, k_empty, v_full, v_empty, step, box,
                D, TAIL, STAGES,
            )  # fmt: skip
            step += 1


@gluon.jit
def _soften(
    s, best, total, key_start, first, end, early, early_end, plain_first, plain_end, scale_log2, LEFT: gl.constexpr,
    EARLY: gl.constexpr, LAYOUT: gl.constexpr,
):  # fmt: skip
    """One step of the online softmax, in base 2, and by how much the previous steps' results fade."""
    if (key_start < plain_first) | (key_start + KEYS > plain_end):
        key = key_start + gl.arange(0, KEYS, gl.SliceLayout(0, LAYOUT))
        seen = key[None, :] < end[:, None]
        if LEFT:
            seen = seen & (key[None, :] >= first[:, None])
        if EARLY:
            seen = seen | ((key[None, :] >= early[:, None]) & (key[None, :] < early_end[:, None]))
        s = gl.where(seen, s, float("-inf"))
    new_best = gl.maximum(best, gl.max(s, 1) * scale_log2)
    safe = gl.where(new_best == float("-inf"), 0.0, new_best)
    p = gl.exp2(s * scale_log2 - safe[:, None])
    decay = gl.exp2(best - safe)
    return p, new_best, total * decay + gl.sum(p, 1), decay


@gluon.jit
def scores(q_tile, q_tail, k_smem, k_tail_smem, slot, none, D: gl.constexpr, TAIL: gl.constexpr):
    s = warpgroup_mma(
        q_tile, k_smem.index(slot).reshape([KEYS, D]).permute([1, 0]), none, use_acc=False, is_async=True
    )  # fmt: skip
    if TAIL > 0:
        s = warpgroup_mma(q_tail, k_tail_smem.index(slot).reshape([KEYS, TAIL]).permute([1, 0]), s, is_async=True)
    return s


@gluon.jit
def _attend(
    q_tile, q_tail, k_smem, k_tail_smem, v_smem, k_full, k_empty, v_full, v_empty, step, tile_first, tile_end,
    first, end, early, early_end, plain_first, plain_end, scale_log2, D: gl.constexpr, TAIL: gl.constexpr,
    LEFT: gl.constexpr, EARLY: gl.constexpr, S_LAYOUT: gl.constexpr, O_LAYOUT: gl.constexpr, STAGES: gl.constexpr,
):  # fmt: skip
    """Sum of values, running maximum and sum of a group's rows, and the number of the next step.

    Args:
        first, end: keys that a row sees; with EARLY also those from `early` to `early_end`.
        plain_first, plain_end: keys that all rows see.
    """
    P_LAYOUT: gl.constexpr = gl.DotOperandLayout(0, O_LAYOUT, 2)
    dtype: gl.constexpr = q_tile.dtype
    none = gl.zeros([ROWS, KEYS], gl.float32, S_LAYOUT)
    acc = gl.zeros([ROWS, D], gl.float32, O_LAYOUT)
    best = gl.full([ROWS], float("-inf"), gl.float32, gl.SliceLayout(1, S_LAYOUT))
    total = gl.zeros([ROWS], gl.float32, gl.SliceLayout(1, S_LAYOUT))
    slot = step % STAGES
    mbarrier.wait(k_full.index(slot), step // STAGES & 1)
    s = scores(q_tile, q_tail, k_smem, k_tail_smem, slot, none, D, TAIL)
    s = warpgroup_mma_wait(0, deps=[s])
    mbarrier.arrive(k_empty.index(slot), count=1)
    p, best, total, _fading = _soften(
        s, best, total, tile_first, first, end, early, early_end, plain_first, plain_end, scale_log2, LEFT, EARLY,
        S_LAYOUT,
    )  # fmt: skip
    p = gl.convert_layout(p.to(dtype), P_LAYOUT)
    for key_start in range(tile_first + KEYS, tile_end, KEYS):
        old_slot = slot
        old_phase = step // STAGES & 1
        step += 1
        slot = step % STAGES
        mbarrier.wait(k_full.index(slot), step // STAGES & 1)
        s = scores(q_tile, q_tail, k_smem, k_tail_smem, slot, none, D, TAIL)
        mbarrier.wait(v_full.index(old_slot), old_phase)
        acc = warpgroup_mma(p, v_smem.index(old_slot).reshape([KEYS, D]), acc, is_async=True)
        s = warpgroup_mma_wait(1, deps=[s])
        mbarrier.arrive(k_empty.index(slot), count=1)
        fresh, best, total, decay = _soften(
            s, best, total, key_start, first, end, early, early_end, plain_first, plain_end, scale_log2, LEFT, EARLY,
            S_LAYOUT,
        )  # fmt: skip
        acc = warpgroup_mma_wait(0, deps=[acc])
        mbarrier.arrive(v_empty.index(old_slot), count=1)
        acc = acc * gl.convert_layout(decay, gl.SliceLayout(1, O_LAYOUT))[:, None]
        p = gl.convert_layout(fresh.to(dtype), P_LAYOUT)
    mbarrier.wait(v_full.index(slot), step // STAGES & 1)
    acc = warpgroup_mma(p, v_smem.index(slot).reshape([KEYS, D]), acc, is_async=True)
    acc = warpgroup_mma_wait(0, deps=[acc])
    mbarrier.arrive(v_empty.index(slot), count=1)
    return acc, best, total, step + 1


@gluon.jit
def _row_partition(
    PART: gl.constexpr, q_ptr, out_ptr, out_desc, lse_ptr, q_smem, q_tail_smem, k_smem, k_tail_smem, v_smem, q_full,
    q_empty, k_full, k_empty, v_full, v_empty, doc_ptr, cmp_ptr, scale_log2, T, S, q_start, k_start, num_tiles, heads,
    G: gl.constexpr, HKV: gl.constexpr, D: gl.constexpr, TAIL: gl.constexpr, SIZE: gl.constexpr, STRIDE: gl.constexpr,
    WINDOW: gl.constexpr, BLOCK: gl.constexpr, INIT: gl.constexpr, LOCAL: gl.constexpr, PACKED: gl.constexpr,
    LN2: gl.constexpr, STAGES: gl.constexpr, BOXES: gl.constexpr,
):  # fmt: skip
    S_LAYOUT: gl.constexpr = gl.NVMMADistributedLayout([3, 0], [4, 1], [16, KEYS, 16])
    O_LAYOUT: gl.constexpr = gl.NVMMADistributedLayout([3, 0], [4, 1], [16, D, 16])
    ROW_LAYOUT: gl.constexpr = gl.BlockedLayout([1, 8], [256 // D, D // 8], [4, 1], [1, 0])
    step = 0
    rounds = num_rounds(num_tiles * heads)
    if not BOXES:
        first_row, first_b, first_group = tile_of_round(0, num_tiles, heads, HKV, GROUPS * ROWS)
        copy_queries(
            q_ptr, q_smem, q_tail_smem, PART, first_row + PART * ROWS, first_b, first_group, T, G, HKV, D, TAIL
        )
    for turn in range(rounds):
        tile_row, b, group = tile_of_round(turn, num_tiles, heads, HKV, GROUPS * ROWS)
        low = tile_row + PART * ROWS
        row = low + gl.arange(0, ROWS, gl.SliceLayout(1, S_LAYOUT))
        t = gl.minimum(row // G, T - 1)
        if LOCAL > 0:
            tile_first = 0
            doc, early, local, tile_end = forced_keys_of_tile(
                tile_row, GROUPS * ROWS, doc_ptr, T, S, q_start, G, BLOCK, INIT, LOCAL, PACKED, KEYS
            )
            first, end, row_early, early_end, plain_first, plain_end = forced_keys_of_rows(
                t, low, ROWS, doc, early, local, doc_ptr, T, S, q_start, G, BLOCK, INIT, LOCAL, PACKED
            )
        else:
            tile_first, _from, _to, tile_end = tile_keys(
                tile_row, GROUPS * ROWS, doc_ptr, cmp_ptr, T, S, q_start, k_start, G, SIZE, STRIDE, WINDOW, PACKED
            )
            _first, plain_first, plain_end, _end = tile_keys(
                low, ROWS, doc_ptr, cmp_ptr, T, S, q_start, k_start, G, SIZE, STRIDE, WINDOW, PACKED
            )
            first, end = key_interval(t, doc_ptr, cmp_ptr, S, q_start, k_start, SIZE, STRIDE, WINDOW, PACKED)
            row_early, early_end = first, first
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
                next_row, next_b, next_group = tile_of_round(turn + 1, num_tiles, heads, HKV, GROUPS * ROWS)
                next_place = (turn + 1) % 2 * GROUPS + PART
                next_row += PART * ROWS
                copy_queries(q_ptr, q_smem, q_tail_smem, next_place, next_row, next_b, next_group, T, G, HKV, D, TAIL)
        acc, best, total, step = _attend(
            q, q_tail, k_smem, k_tail_smem, v_smem, k_full, k_empty, v_full, v_empty, step, tile_first, tile_end,
            first, end, row_early, early_end, plain_first, plain_end, scale_log2, D, TAIL,
            PACKED or WINDOW > 0 or LOCAL > 0, LOCAL > 0, S_LAYOUT, O_LAYOUT, STAGES,
        )  # fmt: skip

        share = 1.0 / gl.where(total == 0.0, 1.0, total)
        lse = gl.where(total == 0.0, float("-inf"), (best + gl.log2(total)) * LN2)
        row_64 = (b.to(gl.int64) * T + t) * (G * HKV) + group * G + row % G
        gl.store(lse_ptr + row_64, lse, mask=row < T * G)
        # The queries are done with: their place holds the result until it is written.
        q.store((acc * gl.convert_layout(share, gl.SliceLayout(1, O_LAYOUT))[:, None]).to(q.dtype))
        if BOXES:
            fence_async_shared()
            tma.async_copy_shared_to_global(out_desc, [b, low // G, group * G, 0], q_smem.index(place))
            tma.store_wait(0)
            mbarrier.arrive(q_empty.index(place), count=1)
        else:
            offsets, live = row_offsets(low, b, group, T, G, HKV, D, D, ROWS, ROW_LAYOUT)
            gl.store(out_ptr + offsets, q.load(ROW_LAYOUT), mask=live)


@gluon.jit(do_not_specialize=["T", "S", "q_start", "k_start", "num_tiles", "heads"])
def dense_forward_sm90_kernel(
    q_desc, q_tail_desc, k_desc, k_tail_desc, v_desc, out_desc, q_ptr, out_ptr, lse_ptr, doc_ptr, cmp_ptr, scale_log2,
    T, S, q_start, k_start, num_tiles, heads,
    G: gl.constexpr, HKV: gl.constexpr, D: gl.constexpr, TAIL: gl.constexpr, SIZE: gl.constexpr, STRIDE: gl.constexpr,
    WINDOW: gl.constexpr, BLOCK: gl.constexpr, INIT: gl.constexpr, LOCAL: gl.constexpr, PACKED: gl.constexpr,
    LN2: gl.constexpr, STAGES: gl.constexpr, BOXES: gl.constexpr,
):  # fmt: skip
    q_smem = gl.allocate_shared_memory(q_desc.dtype, [2 * GROUPS] + q_desc.block_shape, q_desc.layout)
    k_smem = gl.allocate_shared_memory(k_desc.dtype, [STAGES] + k_desc.block_shape, k_desc.layout)
    v_smem = gl.allocate_shared_memory(v_desc.dtype, [STAGES] + v_desc.block_shape, v_desc.layout)
    q_tail_smem, k_tail_smem = q_smem, k_smem
    if TAIL > 0:
        q_tail_smem = gl.allocate_shared_memory(
            q_desc.dtype, [2 * GROUPS] + q_tail_desc.block_shape, q_tail_desc.layout
        )
        k_tail_smem = gl.allocate_shared_memory(k_desc.dtype, [STAGES] + k_tail_desc.block_shape, k_tail_desc.layout)
    q_full = make_barriers(2 * GROUPS, 1)
    q_empty = make_barriers(2 * GROUPS, 1)
    k_full = make_barriers(STAGES, 1)
    k_empty = make_barriers(STAGES, GROUPS)
    v_full = make_barriers(STAGES, 1)
    v_empty = make_barriers(STAGES, GROUPS)
    fence_async_shared()
    gl.warp_specialize([
        (_row_partition, (
            0, q_ptr, out_ptr, out_desc, lse_ptr, q_smem, q_tail_smem, k_smem, k_tail_smem, v_smem, q_full, q_empty,
            k_full, k_empty, v_full, v_empty, doc_ptr, cmp_ptr, scale_log2, T, S, q_start, k_start, num_tiles,
            heads, G, HKV, D, TAIL, SIZE, STRIDE, WINDOW, BLOCK, INIT, LOCAL, PACKED, LN2, STAGES, BOXES,
        )),
        (_row_partition, (
            1, q_ptr, out_ptr, out_desc, lse_ptr, q_smem, q_tail_smem, k_smem, k_tail_smem, v_smem, q_full, q_empty,
            k_full, k_empty, v_full, v_empty, doc_ptr, cmp_ptr, scale_log2, T, S, q_start, k_start, num_tiles,
            heads, G, HKV, D, TAIL, SIZE, STRIDE, WINDOW, BLOCK, INIT, LOCAL, PACKED, LN2, STAGES, BOXES,
        )),
        (_row_partition, (
            2, q_ptr, out_ptr, out_desc, lse_ptr, q_smem, q_tail_smem, k_smem, k_tail_smem, v_smem, q_full, q_empty,
            k_full, k_empty, v_full, v_empty, doc_ptr, cmp_ptr, scale_log2, T, S, q_start, k_start, num_tiles,
            heads, G, HKV, D, TAIL, SIZE, STRIDE, WINDOW, BLOCK, INIT, LOCAL, PACKED, LN2, STAGES, BOXES,
        )),
        (_load_partition, (
            q_desc, q_tail_desc, k_desc, k_tail_desc, v_desc, q_smem, q_tail_smem, k_smem, k_tail_smem, v_smem,
            q_full, q_empty, k_full, k_empty, v_full, v_empty, doc_ptr, cmp_ptr, T, S, q_start, k_start, num_tiles,
            heads, G, HKV, D, TAIL, SIZE, STRIDE, WINDOW, BLOCK, INIT, LOCAL, PACKED, STAGES, BOXES,
        )),
    ], [4, 4, 1], [160, 160, 24])  # fmt: skip


def dense_forward_sm90(
    q: Tensor, k: Tensor, v: Tensor, out: Tensor, lse: Tensor, geometry: BlockGeometry, layout: Layout | None,
    window: int, q_start: int, k_start: int, scale: float, programs: int, forced: bool = False,
) -> None:  # fmt: skip
    """Write what `dense_forward`, or with `forced` `forced_forward`, gives.

    Args:
        programs: at most, one for each multiprocessor.
    """
    B, T, H, Dk = q.shape
    S, Hkv, D = k.shape[1], k.shape[2], v.shape[3]
    G, tail = H // Hkv, Dk - D
    boxes = ROWS.value % G == 0
    box = (ROWS.value // G, G) if boxes else (ROWS.value, 1)
    documents = document_pointers(layout, q, "doc_start", "cmp_start")
    num_tiles = triton.cdiv(T * G, GROUPS.value * ROWS.value)
    dense_forward_sm90_kernel[(min(programs, num_tiles * B * Hkv),)](
        *describe_parts(q, D, *box), *describe_parts(k, D, KEYS.value, 1), describe_box(v, KEYS.value, 1),
        describe_box(out, *box), q, out, lse, *documents, scale * LOG2E, T, S, q_start, k_start, num_tiles, B * Hkv,
        G=G, HKV=Hkv, D=D, TAIL=tail, SIZE=geometry.compress_block_size, STRIDE=geometry.compress_stride,
        WINDOW=window, BLOCK=geometry.select_block_size if forced else 0,
        INIT=geometry.num_init_blocks if forced else 0, LOCAL=geometry.num_local_blocks if forced else 0,
        PACKED=layout is not None, LN2=LN2, STAGES=TAIL_STAGES if tail else STAGES, BOXES=boxes, num_warps=4,
    )  # fmt: skip
