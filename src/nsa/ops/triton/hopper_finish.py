"""End of the forward on Hopper, in Gluon: window branch, forced blocks, sum over slots and gates in one kernel.

The sum over slots waits for DRAM, the window branch and the forced blocks for the tensor cores; here they run side by
side, and what one hands the other stays in shared memory. Two groups of four warps hold 64 rows each and attend to the
forced blocks, then to the window, as in `hopper_fwd`. A third takes the parts that `hopper_select_fwd` left, slot by
slot, adds the forced blocks and the gated branches, and writes. Two more warps load: keys, values and queries; parts.

Forced keys are numbered from 0 on: first the initial blocks of the tile's first document, in whole steps, then what
lies from its first row's local blocks on. What later documents of the tile see lies there too, as they begin within it.

Shapes are those of `select_fwd`; a group's heads fill tiles of 64 rows with whole tokens, blocks have 64 tokens.
"""

# Kernels are typed by Triton, not by Python.
# pyright: reportArgumentType=false, reportCallIssue=false, reportAttributeAccessIssue=false, reportReturnType=false
# pyright: reportGeneralTypeIssues=false, reportPossiblyUnboundVariable=false
# pyright: reportAssignmentType=false, reportOperatorIssue=false
# Lists in kernels are added, not unpacked.
# ruff: noqa: RUF005
from __future__ import annotations

from typing import NamedTuple

import triton
from torch import Tensor
from triton.experimental import gluon
from triton.experimental.gluon import language as gl
from triton.experimental.gluon.language.nvidia.hopper import fence_async_shared, mbarrier, tma
from triton.experimental.gluon.nvidia.hopper import TensorDescriptor

from nsa.geometry import BlockGeometry
from nsa.ops.triton.common import LN2, LOG2E, Layout, hopper_serves, key_interval, num_multiprocessors
from nsa.ops.triton.hopper_fwd import (
    KEYS,
    ROWS,
    attend,
    describe_box,
    describe_parts,
    load_keys,
    load_queries,
    make_barriers,
    num_rounds,
    tile_keys,
    tile_of_round,
)
from nsa.ops.triton.invert import Chunk, lse_stride

GROUPS = gl.constexpr(2)  # groups of four warps that attend
TILE = gl.constexpr(128)  # rows of both
STAGES = 2  # steps of keys in flight
PART_STAGES = 3  # parts of 64 rows in flight
MAX_FREE = 32  # free slots of a token for which there is room
QUERY_BUFFERS, TAIL_QUERY_BUFFERS = 2, 1  # where keys have a tail, there is no room for the next tile's queries


class Window(NamedTuple):
    """Keys and values of the window branch, and where its log-sum-exp goes."""

    k: Tensor
    v: Tensor
    lse: Tensor


def hopper_finish_serves(q: Tensor, v: Tensor, group_size: int, geometry: BlockGeometry) -> bool:
    """Whether the kernel takes these fitting tensors, after `hopper_select_forward`."""
    free = geometry.num_selected_blocks - geometry.num_init_blocks - geometry.num_local_blocks
    fits = ROWS.value % group_size == 0 and geometry.select_block_size == KEYS.value
    return fits and 0 < free <= MAX_FREE and hopper_serves(q, v)


@gluon.jit
def _place_of_tile(
    turn, num_tiles, heads, head_start, token_start, G: gl.constexpr, HKV: gl.constexpr
):  # fmt: skip
    """A program's tile in a round: its head among the chunk's, sequence, group, first token of the chunk's, and row."""
    tile_row, head, _group = tile_of_round(turn, num_tiles, heads, 1, TILE)
    pair = head_start + head
    return head, pair // HKV, pair % HKV, tile_row // G, token_start * G + tile_row


@gluon.jit
def _document(t, doc_ptr, PACKED: gl.constexpr):
    doc = t * 0
    if PACKED:
        doc = gl.load(doc_ptr + t)
    return doc


@gluon.jit
def _local_start(t, doc, BLOCK: gl.constexpr, LOCAL: gl.constexpr):
    """First key of a token's local blocks."""
    return gl.maximum(doc, doc + ((t - doc) // BLOCK - (LOCAL - 1)) * BLOCK)


@gluon.jit
def _num_early(t, doc, BLOCK: gl.constexpr, INIT: gl.constexpr, LOCAL: gl.constexpr):
    """Keys of a token's initial blocks that lie before its local ones."""
    return gl.minimum(_local_start(t, doc, BLOCK, LOCAL) - doc, INIT * BLOCK)


@gluon.jit
def _forced_keys(
    row, doc_ptr, T, G: gl.constexpr, BLOCK: gl.constexpr, INIT: gl.constexpr, LOCAL: gl.constexpr,
    PACKED: gl.constexpr,
):  # fmt: skip
    """Of a tile's forced keys: the first document, number of the first local key, what it is, and where they end."""
    t_low = gl.minimum(row // G, T - 1)
    t_high = gl.minimum((row + TILE - 1) // G, T - 1)
    doc = _document(t_low, doc_ptr, PACKED)
    early = gl.cdiv(_num_early(t_high, doc, BLOCK, INIT, LOCAL), KEYS) * KEYS
    local = _local_start(t_low, doc, BLOCK, LOCAL)
    return doc, early, local, early + gl.maximum(t_high + 1 - local, 0)


@gluon.jit
def _load_partition(
    q_desc, q_tail_desc, k_desc, k_tail_desc, v_desc, k_win_desc, k_win_tail_desc, v_win_desc, q_smem, q_tail_smem,
    k_smem, k_tail_smem, v_smem, q_full, q_empty, k_full, k_empty, v_full, v_empty, doc_ptr, T, head_start, token_start,
    num_tiles, heads,
    G: gl.constexpr, HKV: gl.constexpr, D: gl.constexpr, TAIL: gl.constexpr, BLOCK: gl.constexpr, INIT: gl.constexpr,
    LOCAL: gl.constexpr, WINDOW: gl.constexpr, PACKED: gl.constexpr, STAGES: gl.constexpr, BUFFERS: gl.constexpr,
):  # fmt: skip
    step = 0
    for turn in range(num_rounds(num_tiles * heads)):
        _head, b, group, _token, row = _place_of_tile(turn, num_tiles, heads, head_start, token_start, G, HKV)
        for part in gl.static_range(GROUPS):
            place = turn % BUFFERS * GROUPS + part
            box = [b, row // G + part * (ROWS // G), group * G, 0]
            load_queries(
                q_desc, q_tail_desc, q_smem, q_tail_smem, q_full, q_empty, place, (turn // BUFFERS & 1) ^ 1, box, D,
                TAIL,
            )  # fmt: skip
        doc, early, local, end = _forced_keys(row, doc_ptr, T, G, BLOCK, INIT, LOCAL, PACKED)
        # Without any key there is one step, all of it masked.
        for i in range(gl.maximum(gl.cdiv(end, KEYS), 1)):
            key = i * KEYS
            start = gl.where(key < early, doc + key, local + (key - early))
            load_keys(
                k_desc, k_tail_desc, v_desc, k_smem, k_tail_smem, v_smem, k_full, k_empty, v_full, v_empty, step,
                [b, start, group, 0], D, TAIL, STAGES,
            )  # fmt: skip
            step += 1
        first, _from, _to, end = tile_keys(row, TILE, doc_ptr, doc_ptr, T, T, 0, 0, G, 1, 1, WINDOW, PACKED)
        for i in range(gl.maximum(gl.cdiv(end - first, KEYS), 1)):
            load_keys(
                k_win_desc, k_win_tail_desc, v_win_desc, k_smem, k_tail_smem, v_smem, k_full, k_empty, v_full, v_empty,
                step, [b, first + i * KEYS, group, 0], D, TAIL, STAGES,
            )  # fmt: skip
            step += 1


@gluon.jit
def _part_partition(
    part_desc, part_lse_desc, cmp_desc, part_smem, lse_smem, part_full, part_empty, lse_full, lse_empty, head_start,
    token_start, num_tokens, num_tiles, heads,
    G: gl.constexpr, HKV: gl.constexpr, D: gl.constexpr, FREE: gl.constexpr, PADDED: gl.constexpr, STAGES: gl.constexpr,
):  # fmt: skip
    """Load the log-sum-exps of each 64 rows' parts, the parts slot by slot, and what the compressed branch gave."""
    step = 0
    for turn in range(num_rounds(num_tiles * heads)):
        head, b, group, token, _row = _place_of_tile(turn, num_tiles, heads, head_start, token_start, G, HKV)
        for part in range(GROUPS):
            mbarrier.wait(lse_empty.index(part), (turn & 1) ^ 1)
            mbarrier.expect(lse_full.index(part), 4 * PADDED * ROWS)
            place = [head, 0, token * G]
            tma.async_copy_global_to_shared(part_lse_desc, place, lse_full.index(part), lse_smem.index(part))
            for slot in range(FREE + 1):
                stage = step % STAGES
                mbarrier.wait(part_empty.index(stage), (step // STAGES & 1) ^ 1)
                mbarrier.expect(part_full.index(stage), 2 * ROWS * D)
                if slot < FREE:
                    box = [0, head * num_tokens + token, slot * G, 0]
                    tma.async_copy_global_to_shared(part_desc, box, part_full.index(stage), part_smem.index(stage))
                else:
                    box = [b, token_start + token, group * G, 0]
                    tma.async_copy_global_to_shared(cmp_desc, box, part_full.index(stage), part_smem.index(stage))
                step += 1
            token += ROWS // G


@gluon.jit
def _attend_partition(
    PART: gl.constexpr, win_desc, lse_ptr, gate_ptr, q_smem, q_tail_smem, k_smem, k_tail_smem, v_smem, forced_smem,
    line_smem, q_full, q_empty, k_full, k_empty, v_full, v_empty, forced_empty, done, doc_ptr, scale_log2, T,
    head_start, token_start, num_tiles, heads,
    G: gl.constexpr, HKV: gl.constexpr, D: gl.constexpr, TAIL: gl.constexpr, BLOCK: gl.constexpr, INIT: gl.constexpr,
    LOCAL: gl.constexpr, WINDOW: gl.constexpr, PACKED: gl.constexpr, LN2: gl.constexpr, STAGES: gl.constexpr,
    BUFFERS: gl.constexpr,
):  # fmt: skip
    S_LAYOUT: gl.constexpr = gl.NVMMADistributedLayout([3, 0], [4, 1], [16, KEYS, 16])
    O_LAYOUT: gl.constexpr = gl.NVMMADistributedLayout([3, 0], [4, 1], [16, D, 16])
    step = 0
    for turn in range(num_rounds(num_tiles * heads)):
        _head, b, group, _token, tile_row = _place_of_tile(turn, num_tiles, heads, head_start, token_start, G, HKV)
        low = tile_row + PART * ROWS
        row = low + gl.arange(0, ROWS, gl.SliceLayout(1, S_LAYOUT))
        t = gl.minimum(row // G, T - 1)
        place = turn % BUFFERS * GROUPS + PART
        q = q_smem.index(place).reshape([ROWS, D])
        q_tail = q
        if TAIL > 0:
            q_tail = q_tail_smem.index(place).reshape([ROWS, TAIL])

        tile_doc, early, local, tile_end = _forced_keys(tile_row, doc_ptr, T, G, BLOCK, INIT, LOCAL, PACKED)
        doc = _document(t, doc_ptr, PACKED)
        own = doc == tile_doc
        first = _local_start(t, doc, BLOCK, LOCAL)
        if INIT > 0:
            first = gl.where(own, first, doc)
        row_early = gl.where(own, _num_early(t, doc, BLOCK, INIT, LOCAL), 0)
        t_low = gl.minimum(low // G, T - 1)
        t_high = gl.minimum((low + ROWS - 1) // G, T - 1)
        alike = _local_start(t_high, tile_doc, BLOCK, LOCAL) - local
        whole = (alike == 0) & (_num_early(t_low, tile_doc, BLOCK, INIT, LOCAL) == early)
        plain_first = gl.where(whole, 0, early + alike)
        one_document = _document(t_high, doc_ptr, PACKED) == tile_doc
        plain_end = gl.where(one_document, early + t_low + 1 - local, 0)
        mbarrier.wait(q_full.index(place), turn // BUFFERS & 1)
        acc, best, total, step = attend(
            q, q_tail, k_smem, k_tail_smem, v_smem, k_full, k_empty, v_full, v_empty, step, 0, tile_end,
            early + first - local, early + t + 1 - local, row_early, plain_first, plain_end, scale_log2, D, TAIL, True,
            True, S_LAYOUT, O_LAYOUT, STAGES,
        )  # fmt: skip
        share = 1.0 / gl.where(total == 0.0, 1.0, total)
        # Kept in registers, so that the window need not wait until the tile before is summed.
        forced = (acc * gl.convert_layout(share, gl.SliceLayout(1, O_LAYOUT))[:, None]).to(q.dtype)
        forced_lse = gl.where(total == 0.0, float("-inf"), best + gl.log2(total))
        row_64 = (b.to(gl.int64) * T + t) * (G * HKV) + group * G + row % G
        gate_cmp = gl.load(gate_ptr + row_64 * 3)
        gate_slc = gl.load(gate_ptr + row_64 * 3 + 1)
        gate_win = gl.load(gate_ptr + row_64 * 3 + 2)

        tile_first, _from, _to, tile_end = tile_keys(
            tile_row, TILE, doc_ptr, doc_ptr, T, T, 0, 0, G, 1, 1, WINDOW, PACKED
        )  # fmt: skip
        _first, plain_first, plain_end, _end = tile_keys(
            low, ROWS, doc_ptr, doc_ptr, T, T, 0, 0, G, 1, 1, WINDOW, PACKED
        )  # fmt: skip
        first, end = key_interval(t, doc_ptr, doc_ptr, T, 0, 0, 1, 1, WINDOW, PACKED)
        acc, best, total, step = attend(
            q, q_tail, k_smem, k_tail_smem, v_smem, k_full, k_empty, v_full, v_empty, step, tile_first, tile_end,
            first, end, first, plain_first, plain_end, scale_log2, D, TAIL, True, False, S_LAYOUT, O_LAYOUT, STAGES,
        )  # fmt: skip
        share = 1.0 / gl.where(total == 0.0, 1.0, total)
        lse = gl.where(total == 0.0, float("-inf"), (best + gl.log2(total)) * LN2)
        gl.store(lse_ptr + row_64, lse, mask=row < T * G)
        # The queries are done with: their place holds the result until it is written, and added.
        q.store((acc * gl.convert_layout(share, gl.SliceLayout(1, O_LAYOUT))[:, None]).to(q.dtype))
        mbarrier.wait(forced_empty.index(PART), (turn & 1) ^ 1)
        forced_smem.index(PART).reshape([ROWS, D]).store(forced)
        line_smem.index(4 * PART).store(forced_lse)
        line_smem.index(4 * PART + 1).store(gate_cmp.to(gl.float32))
        line_smem.index(4 * PART + 2).store(gate_slc.to(gl.float32))
        line_smem.index(4 * PART + 3).store(gate_win.to(gl.float32))
        fence_async_shared()
        mbarrier.arrive(done.index(PART), count=1)
        tma.async_copy_shared_to_global(win_desc, [b, low // G, group * G, 0], q_smem.index(place))
        tma.store_wait(0)
        mbarrier.arrive(q_empty.index(place), count=1)


@gluon.jit
def _sum_slots(
    weights, part_smem, part_full, part_empty, step, FREE: gl.constexpr, MASKED: gl.constexpr, D: gl.constexpr,
    STAGES: gl.constexpr, LAYOUT: gl.constexpr, WEIGHT_LAYOUT: gl.constexpr,
):  # fmt: skip
    """Sum of 64 rows' parts by their weights; MASKED leaves out what was not written, of weight 0."""
    number = gl.arange(0, weights.shape[1], gl.SliceLayout(0, WEIGHT_LAYOUT))[None, :]
    acc = gl.zeros([ROWS, D], gl.float32, LAYOUT)
    for slot in range(FREE):
        weight = gl.sum(gl.where(number == slot, weights, 0.0), 1)
        weight = gl.convert_layout(weight, gl.SliceLayout(1, LAYOUT), assert_trivial=True)
        stage = step % STAGES
        mbarrier.wait(part_full.index(stage), step // STAGES & 1)
        value = part_smem.index(stage).reshape([ROWS, D]).load(LAYOUT).to(gl.float32)
        fence_async_shared()  # else the next part might come before a slow read of this one
        mbarrier.arrive(part_empty.index(stage), count=1)
        if MASKED:
            value = gl.where((weight > 0.0)[:, None], value, 0.0)
        acc += value * weight[:, None]
        step += 1
    return acc, step


@gluon.jit
def _sum_partition(
    out_ptr, sum_ptr, lse_ptr, q_smem, forced_smem, line_smem, part_smem, lse_smem, q_empty, part_full, part_empty,
    lse_full, lse_empty, forced_empty, done, doc_ptr, T, head_start, token_start, num_tokens, num_tiles, heads,
    G: gl.constexpr, HKV: gl.constexpr, D: gl.constexpr, FREE: gl.constexpr, PADDED: gl.constexpr,
    BLOCK: gl.constexpr, INIT: gl.constexpr, LOCAL: gl.constexpr, PACKED: gl.constexpr, LN2: gl.constexpr,
    STAGES: gl.constexpr, BUFFERS: gl.constexpr,
):  # fmt: skip
    # A thread has one row, and all its weights; eight rows one below the other are eight different banks. It loads
    # nothing from global memory, as a fence would wait for it.
    LAYOUT: gl.constexpr = gl.BlockedLayout([1, 8], [8, 4], [8, 1], [0, 1])
    WEIGHT_LAYOUT: gl.constexpr = gl.BlockedLayout([1, PADDED], [8, 4], [8, 1], [0, 1])
    ROW: gl.constexpr = gl.SliceLayout(1, LAYOUT)
    dtype: gl.constexpr = q_smem.dtype
    slots = gl.arange(0, PADDED, gl.SliceLayout(0, WEIGHT_LAYOUT))[None, :]
    step = 0
    for turn in range(num_rounds(num_tiles * heads)):
        _head, b, group, token, _row = _place_of_tile(turn, num_tiles, heads, head_start, token_start, G, HKV)
        for part in range(GROUPS):
            mbarrier.wait(lse_full.index(part), turn & 1)
            slot_lse = lse_smem.index(part).reshape([PADDED, ROWS]).permute([1, 0]).load(WEIGHT_LAYOUT)
            slot_lse = gl.where(slots < FREE, slot_lse, float("-inf"))
            fence_async_shared()  # else the next ones might come before a slow read of these
            mbarrier.arrive(lse_empty.index(part), count=1)
            best = gl.max(slot_lse, 1)
            best = gl.where(best == float("-inf"), 0.0, best)
            weights = gl.exp2(slot_lse - best[:, None])
            total = gl.convert_layout(gl.sum(weights, 1), ROW, assert_trivial=True)
            best = gl.convert_layout(best, ROW, assert_trivial=True)
            # All slots are in use where all tokens have as many blocks before their local ones.
            t_low = token_start + gl.minimum(token, num_tokens - 1)
            t_high = token_start + gl.minimum(token + ROWS // G, num_tokens) - 1
            doc = _document(t_high, doc_ptr, PACKED)
            if (t_low - doc) // BLOCK + 1 >= FREE + INIT + LOCAL:
                acc, step = _sum_slots(
                    weights, part_smem, part_full, part_empty, step, FREE, False, D, STAGES, LAYOUT, WEIGHT_LAYOUT
                )
            else:
                acc, step = _sum_slots(
                    weights, part_smem, part_full, part_empty, step, FREE, True, D, STAGES, LAYOUT, WEIGHT_LAYOUT
                )

            mbarrier.wait(done.index(part), turn & 1)
            forced_lse = line_smem.index(4 * part).load(ROW)
            gate_cmp = line_smem.index(4 * part + 1).load(ROW)
            gate_slc = line_smem.index(4 * part + 2).load(ROW)
            gate_win = line_smem.index(4 * part + 3).load(ROW)
            forced = forced_smem.index(part).reshape([ROWS, D]).load(LAYOUT).to(gl.float32)
            new_best = gl.maximum(gl.where(total == 0.0, float("-inf"), best), forced_lse)
            safe = gl.where(new_best == float("-inf"), 0.0, new_best)
            weight = gl.exp2(forced_lse - safe)
            fade = gl.where(total == 0.0, 0.0, gl.exp2(best - safe))
            total = total * fade + weight
            share = 1.0 / gl.where(total == 0.0, 1.0, total)
            acc = acc * (fade * share)[:, None] + forced * (weight * share)[:, None]
            out = acc.to(dtype)
            q_place = turn % BUFFERS * GROUPS + part
            window = q_smem.index(q_place).reshape([ROWS, D]).load(LAYOUT).to(gl.float32)
            acc = acc * gate_slc[:, None] + window * gate_win[:, None]
            stage = step % STAGES
            mbarrier.wait(part_full.index(stage), step // STAGES & 1)
            acc += part_smem.index(stage).reshape([ROWS, D]).load(LAYOUT).to(gl.float32) * gate_cmp[:, None]
            fence_async_shared()
            mbarrier.arrive(forced_empty.index(part), count=1)
            mbarrier.arrive(q_empty.index(q_place), count=1)
            mbarrier.arrive(part_empty.index(stage), count=1)
            step += 1

            row = gl.arange(0, ROWS, ROW)
            live = token + row // G < num_tokens
            row_64 = (b.to(gl.int64) * T + token_start) * (G * HKV) + group * G
            row_64 = row_64 + gl.minimum(token + row // G, num_tokens - 1) * (G * HKV) + row % G
            lse = gl.where(total == 0.0, float("-inf"), (safe + gl.log2(total)) * LN2)
            gl.store(lse_ptr + row_64, lse, mask=live)
            place = row_64[:, None] * D + gl.arange(0, D, gl.SliceLayout(0, LAYOUT))[None, :]
            gl.store(out_ptr + place, out, mask=live[:, None])
            gl.store(sum_ptr + place, acc.to(dtype), mask=live[:, None])
            token += ROWS // G


@gluon.jit(do_not_specialize=["T", "head_start", "token_start", "num_tokens", "num_tiles", "heads"])
def hopper_finish_kernel(
    q_desc, q_tail_desc, k_desc, k_tail_desc, v_desc, k_win_desc, k_win_tail_desc, v_win_desc, part_desc,
    part_lse_desc, cmp_desc, win_desc, gate_ptr, out_ptr, sum_ptr, lse_ptr, lse_win_ptr, doc_ptr, scale_log2, T, head_start,
    token_start, num_tokens, num_tiles, heads,
    G: gl.constexpr, HKV: gl.constexpr, D: gl.constexpr, TAIL: gl.constexpr, FREE: gl.constexpr, BLOCK: gl.constexpr,
    INIT: gl.constexpr, LOCAL: gl.constexpr, WINDOW: gl.constexpr, PACKED: gl.constexpr, PADDED: gl.constexpr,
    LN2: gl.constexpr, STAGES: gl.constexpr, PART_STAGES: gl.constexpr, BUFFERS: gl.constexpr,
):  # fmt: skip
    dtype: gl.constexpr = q_desc.dtype
    line: gl.constexpr = gl.SwizzledSharedLayout(1, 1, 1, order=[0])
    q_smem = gl.allocate_shared_memory(dtype, [BUFFERS * GROUPS] + q_desc.block_shape, q_desc.layout)
    k_smem = gl.allocate_shared_memory(dtype, [STAGES] + k_desc.block_shape, k_desc.layout)
    v_smem = gl.allocate_shared_memory(dtype, [STAGES] + v_desc.block_shape, v_desc.layout)
    q_tail_smem, k_tail_smem = q_smem, k_smem
    if TAIL > 0:
        q_box: gl.constexpr = [BUFFERS * GROUPS] + q_tail_desc.block_shape
        k_box: gl.constexpr = [STAGES] + k_tail_desc.block_shape
        q_tail_smem = gl.allocate_shared_memory(dtype, q_box, q_tail_desc.layout)
        k_tail_smem = gl.allocate_shared_memory(dtype, k_box, k_tail_desc.layout)
    forced_smem = gl.allocate_shared_memory(dtype, [GROUPS] + win_desc.block_shape, win_desc.layout)
    line_smem = gl.allocate_shared_memory(gl.float32, [4 * GROUPS, ROWS], line)  # forced blocks' log-sum-exps, gates
    lse_smem = gl.allocate_shared_memory(gl.float32, [GROUPS] + part_lse_desc.block_shape, part_lse_desc.layout)
    part_smem = gl.allocate_shared_memory(dtype, [PART_STAGES] + part_desc.block_shape, part_desc.layout)
    q_full = make_barriers(BUFFERS * GROUPS, 1)
    q_empty = make_barriers(BUFFERS * GROUPS, 2)
    k_full = make_barriers(STAGES, 1)
    k_empty = make_barriers(STAGES, GROUPS)
    v_full = make_barriers(STAGES, 1)
    v_empty = make_barriers(STAGES, GROUPS)
    part_full = make_barriers(PART_STAGES, 1)
    part_empty = make_barriers(PART_STAGES, 1)
    lse_full = make_barriers(GROUPS, 1)
    lse_empty = make_barriers(GROUPS, 1)
    forced_empty = make_barriers(GROUPS, 1)
    done = make_barriers(GROUPS, 1)
    fence_async_shared()
    gl.warp_specialize([
        (_attend_partition, (
            0, win_desc, lse_win_ptr, gate_ptr, q_smem, q_tail_smem, k_smem, k_tail_smem, v_smem, forced_smem,
            line_smem, q_full, q_empty, k_full, k_empty, v_full, v_empty, forced_empty, done, doc_ptr, scale_log2, T,
            head_start, token_start, num_tiles, heads, G, HKV, D, TAIL, BLOCK, INIT, LOCAL, WINDOW, PACKED, LN2, STAGES,
            BUFFERS,
        )),
        (_attend_partition, (
            1, win_desc, lse_win_ptr, gate_ptr, q_smem, q_tail_smem, k_smem, k_tail_smem, v_smem, forced_smem,
            line_smem, q_full, q_empty, k_full, k_empty, v_full, v_empty, forced_empty, done, doc_ptr, scale_log2, T,
            head_start, token_start, num_tiles, heads, G, HKV, D, TAIL, BLOCK, INIT, LOCAL, WINDOW, PACKED, LN2, STAGES,
            BUFFERS,
        )),
        (_sum_partition, (
            out_ptr, sum_ptr, lse_ptr, q_smem, forced_smem, line_smem, part_smem, lse_smem, q_empty, part_full,
            part_empty, lse_full, lse_empty, forced_empty, done, doc_ptr, T, head_start, token_start, num_tokens,
            num_tiles, heads, G, HKV, D, FREE, PADDED, BLOCK, INIT, LOCAL, PACKED, LN2, PART_STAGES, BUFFERS,
        )),
        (_load_partition, (
            q_desc, q_tail_desc, k_desc, k_tail_desc, v_desc, k_win_desc, k_win_tail_desc, v_win_desc, q_smem,
            q_tail_smem, k_smem, k_tail_smem, v_smem, q_full, q_empty, k_full, k_empty, v_full, v_empty, doc_ptr, T,
            head_start, token_start, num_tiles, heads, G, HKV, D, TAIL, BLOCK, INIT, LOCAL, WINDOW, PACKED, STAGES,
            BUFFERS,
        )),
        (_part_partition, (
            part_desc, part_lse_desc, cmp_desc, part_smem, lse_smem, part_full, part_empty, lse_full, lse_empty,
            head_start, token_start, num_tokens, num_tiles, heads, G, HKV, D, FREE, PADDED, PART_STAGES,
        )),
    ], [4, 8, 1, 1], [160, 80, 24, 24])  # fmt: skip


def _describe_lse(part_lse: Tensor, heads: int, free: int, rows: int) -> TensorDescriptor:
    """Boxes of all slots of 64 rows; beyond the slots they read zeros."""
    stride = lse_stride(rows)
    box = [1, triton.next_power_of_2(free), ROWS.value]
    layout = gl.NVMMASharedLayout.get_default_for(box, gl.float32)
    return TensorDescriptor(part_lse, [heads, free, rows], [free * stride, stride, 1], box, layout)


def hopper_finish(
    q: Tensor, k: Tensor, v: Tensor, window: Window, part: Tensor, part_lse: Tensor, out_cmp: Tensor, out_win: Tensor,
    gates: Tensor, out: Tensor, out_slc: Tensor, lse_slc: Tensor, geometry: BlockGeometry, layout: Layout | None,
    chunk: Chunk, free: int, scale: float,
) -> None:  # fmt: skip
    """Write the window branch, the selected branch and the gated sum of a chunk of whole tiles.

    Args:
        part, part_lse: the free blocks' parts, as `hopper_select_forward` leaves them; -inf where it left none.
        free: slots of a token that are free, at least one.
    """
    B, T, H, Dk = q.shape
    Hkv, D = k.shape[2], v.shape[3]
    G, tail = H // Hkv, Dk - D
    heads, tokens = chunk.head_end - chunk.head, chunk.token_end - chunk.token
    parts = part[: heads * tokens * free * G].view(1, heads * tokens, free * G, D)
    num_tiles = triton.cdiv(tokens * G, TILE.value)
    box = (ROWS.value // G, G)
    hopper_finish_kernel[(min(num_multiprocessors(q), num_tiles * heads),)](
        *describe_parts(q, D, *box), *describe_parts(k, D, KEYS.value, 1), describe_box(v, KEYS.value, 1),
        *describe_parts(window.k, D, KEYS.value, 1), describe_box(window.v, KEYS.value, 1), describe_box(parts, *box),
        _describe_lse(part_lse, heads, free, tokens * G), describe_box(out_cmp, *box), describe_box(out_win, *box),
        gates, out_slc, out, lse_slc, window.lse,
        q if layout is None else layout.doc_start, scale * LOG2E, T, chunk.head, chunk.token, tokens, num_tiles, heads,
        G=G, HKV=Hkv, D=D, TAIL=tail, FREE=free, BLOCK=geometry.select_block_size, INIT=geometry.num_init_blocks,
        LOCAL=geometry.num_local_blocks, WINDOW=geometry.window_size, PACKED=layout is not None,
        PADDED=triton.next_power_of_2(free), LN2=LN2, STAGES=STAGES, PART_STAGES=PART_STAGES, BUFFERS=TAIL_QUERY_BUFFERS if tail else QUERY_BUFFERS, num_warps=4,
    )  # fmt: skip
