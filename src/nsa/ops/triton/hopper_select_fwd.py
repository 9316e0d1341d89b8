"""Forward of the selected branch's free blocks on Hopper, in Gluon: rows are gathered ahead of their products.

As in `select_fwd`, keys and values of a block stay while the rows of the tokens that chose it pass by, and each row's
result goes to the scratch that `select_reduce_kernel` adds up. There a program waits for each tile of rows in turn;
here four warps gather the rows of coming tiles and the next block's keys and values, and three groups of four warps
take turns at the tiles. Programs are persistent. They run over the blocks for one range of tokens after another, short
enough for the queries of a range to stay in L2.

Shapes are those of `select_fwd`; the blocks are free (`forced` holds the others), so that a tile needs no mask.
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

from nsa.ops.triton.common import LOG2E, Layout, num_multiprocessors
from nsa.ops.triton.hopper_fwd import describe_box, describe_parts, make_barriers
from nsa.ops.triton.invert import Chunk, Inversion, Items, item_keys

ROWS = gl.constexpr(64)  # rows of a tile, as one wgmma takes
GROUPS = gl.constexpr(3)  # groups of four warps
BLOCK = gl.constexpr(64)  # keys of a block
STAGES, TAIL_STAGES = 6, 3  # tiles in flight; multiples of GROUPS, so that a group waits for every use of its places
STREAM = True  # partial results leave L2 early, in favour of queries and keys
RANGE_ROWS = 32  # rows of a range of tokens for each block there is: some 400 a block that choose it


@gluon.jit
def items_of_unit(unit, done, item_ptr, first_ptr, head_start, num_heads, range_start, num_ranges, bound, J):
    """Where the items of a head and range lie, this program's first one and their number; `done` went before."""
    place = (range_start + unit % num_ranges) * num_heads + head_start + unit // num_ranges
    programs = gl.num_programs(0)
    first = (gl.program_id(0) + programs - done % programs) % programs
    return item_ptr + place.to(gl.int64) * bound * 3, first, gl.load(first_ptr + place * (J + 1) + J)


@gluon.jit
def _row_places(start, item_entries_ptr, num_rows, G: gl.constexpr, LAYOUT: gl.constexpr):
    """Numbers of an item's rows from `start` on, and their entries."""
    row = gl.minimum(start + gl.arange(0, ROWS, LAYOUT), num_rows - 1)
    return row, gl.load(item_entries_ptr + row // G)


@gluon.jit
def _gather_partition(
    q_ptr, k_desc, k_tail_desc, v_desc, q_smem, q_tail_smem, k_smem, k_tail_smem, v_smem, q_full, q_empty, k_full,
    k_empty, entries_ptr, item_ptr, first_ptr, doc_ptr, base_ptr, T, head_start, token_start, num_heads, range_start,
    num_ranges, num_units, bound, J,
    G: gl.constexpr, HKV: gl.constexpr, D: gl.constexpr, TAIL: gl.constexpr, RATIO: gl.constexpr, SLOTS: gl.constexpr,
    PACKED: gl.constexpr, STAGES: gl.constexpr,
):  # fmt: skip
    LAYOUT: gl.constexpr = gl.BlockedLayout([1, 8], [256 // D, D // 8], [4, 1], [1, 0])
    ROW: gl.constexpr = gl.SliceLayout(1, LAYOUT)
    TAIL_LAYOUT: gl.constexpr = gl.BlockedLayout([1, 8], [4, 8], [4, 1], [1, 0])
    TAIL_ROW: gl.constexpr = gl.SliceLayout(1, TAIL_LAYOUT)
    column = gl.arange(0, D, gl.SliceLayout(0, LAYOUT))
    tail_column = gl.arange(0, 64, gl.SliceLayout(0, TAIL_LAYOUT))
    done = 0
    turn = 0
    step = 0
    for unit in range(num_units):
        unit_ptr, first, num_items = items_of_unit(
            unit, done, item_ptr, first_ptr, head_start, num_heads, range_start, num_ranges, bound, J
        )
        head = head_start + unit // num_ranges
        b = head // HKV
        group = head % HKV
        unit_q_ptr = q_ptr + ((b.to(gl.int64) * T + token_start) * (G * HKV) + group * G) * (D + TAIL)
        for item in range(first, num_items, gl.num_programs(0)):
            place_ptr = unit_ptr + item * 3
            block = gl.load(place_ptr)
            entry = gl.load(place_ptr + 1)
            num_rows = (gl.load(place_ptr + 2) - entry) * G
            key_start = item_keys(entries_ptr, entry, block, doc_ptr, base_ptr, SLOTS, RATIO, BLOCK, PACKED)
            buffer = turn % 2
            mbarrier.wait(k_empty.index(buffer), (turn // 2 & 1) ^ 1)
            mbarrier.expect(k_full.index(buffer), 2 * BLOCK * (2 * D + TAIL))
            box = [b, key_start, group, 0]
            tma.async_copy_global_to_shared(k_desc, box, k_full.index(buffer), k_smem.index(buffer))
            if TAIL > 0:
                tma.async_copy_global_to_shared(k_tail_desc, box, k_full.index(buffer), k_tail_smem.index(buffer))
            tma.async_copy_global_to_shared(v_desc, box, k_full.index(buffer), v_smem.index(buffer))
            turn += 1

            # The next tile's tokens are read long before they are needed; the last row may repeat.
            row, place = _row_places(0, entries_ptr + entry, num_rows, G, ROW)
            tail_row, tail_place = row, place
            if TAIL > 0:
                tail_row, tail_place = _row_places(0, entries_ptr + entry, num_rows, G, TAIL_ROW)
            for start in range(0, num_rows, ROWS):
                next_row, next_place = _row_places(start + ROWS, entries_ptr + entry, num_rows, G, ROW)
                offset = ((place // SLOTS - token_start) * (G * HKV) + row % G) * (D + TAIL)
                slot = step % STAGES
                mbarrier.wait(q_empty.index(slot), (step // STAGES & 1) ^ 1)
                async_copy.async_copy_global_to_shared(
                    q_smem.index(slot), unit_q_ptr + (offset[:, None] + column[None, :])
                )
                if TAIL > 0:
                    next_tail_row, next_tail_place = _row_places(
                        start + ROWS, entries_ptr + entry, num_rows, G, TAIL_ROW
                    )
                    offset = ((tail_place // SLOTS - token_start) * (G * HKV) + tail_row % G) * (D + TAIL) + D
                    async_copy.async_copy_global_to_shared(
                        q_tail_smem.index(slot), unit_q_ptr + (offset[:, None] + tail_column[None, :])
                    )
                    tail_row, tail_place = next_tail_row, next_tail_place
                async_copy.mbarrier_arrive(q_full.index(slot), increment_count=False)
                step += 1
                row, place = next_row, next_place
        done += num_items


@gluon.jit
def _row_partition(
    PART: gl.constexpr, part_ptr, part_lse_ptr, q_smem, q_tail_smem, k_smem, k_tail_smem, v_smem, q_full, q_empty,
    k_full, k_empty, entries_ptr, item_ptr, first_ptr, scale_log2, head_start, token_start, num_tokens, num_heads,
    range_start, num_ranges, num_units, bound, J,
    G: gl.constexpr, D: gl.constexpr, TAIL: gl.constexpr, SLOTS: gl.constexpr, FREE: gl.constexpr, SHIFT: gl.constexpr,
    STREAM: gl.constexpr, STAGES: gl.constexpr,
):  # fmt: skip
    S_LAYOUT: gl.constexpr = gl.NVMMADistributedLayout([3, 0], [4, 1], [16, BLOCK, 16])
    O_LAYOUT: gl.constexpr = gl.NVMMADistributedLayout([3, 0], [4, 1], [16, D, 16])
    P_LAYOUT: gl.constexpr = gl.DotOperandLayout(0, O_LAYOUT, 2)
    STORE: gl.constexpr = gl.BlockedLayout([1, 8], [256 // D, D // 8], [4, 1], [1, 0])
    STORE_ROW: gl.constexpr = gl.SliceLayout(1, STORE)
    S_ROW: gl.constexpr = gl.SliceLayout(1, S_LAYOUT)
    dtype: gl.constexpr = q_smem.dtype
    column = gl.arange(0, D, gl.SliceLayout(0, STORE))
    none = gl.zeros([ROWS, BLOCK], gl.float32, S_LAYOUT)
    zero = gl.zeros([ROWS, D], gl.float32, O_LAYOUT)
    done = 0
    turn = 0
    step = 0
    for unit in range(num_units):
        unit_ptr, first, num_items = items_of_unit(
            unit, done, item_ptr, first_ptr, head_start, num_heads, range_start, num_ranges, bound, J
        )
        head_row = (unit // num_ranges).to(gl.int64) * num_tokens * (FREE * G)
        unit_part_ptr = part_ptr + head_row * D
        unit_lse_ptr = part_lse_ptr + head_row
        for item in range(first, num_items, gl.num_programs(0)):
            place_ptr = unit_ptr + item * 3
            entry = gl.load(place_ptr + 1)
            num_rows = (gl.load(place_ptr + 2) - entry) * G
            num_tiles = gl.cdiv(num_rows, ROWS)
            buffer = turn % 2
            k = k_smem.index(buffer).reshape([BLOCK, D]).permute([1, 0])
            v = v_smem.index(buffer).reshape([BLOCK, D])
            mbarrier.wait(k_full.index(buffer), turn // 2 & 1)
            for tile in range((PART + GROUPS - step % GROUPS) % GROUPS, num_tiles, GROUPS):
                row = tile * ROWS + gl.arange(0, ROWS, S_ROW)
                live = row < num_rows
                place = gl.load(entries_ptr + entry + row // G, mask=live, other=0)
                store_row = tile * ROWS + gl.arange(0, ROWS, STORE_ROW)
                store_live = store_row < num_rows
                store_place = gl.load(entries_ptr + entry + store_row // G, mask=store_live, other=0)

                slot = (step + tile) % STAGES
                mbarrier.wait(q_full.index(slot), (step + tile) // STAGES & 1)
                fence_async_shared()  # rows were written by threads, the products read them as TMA does
                s = warpgroup_mma(q_smem.index(slot), k, none, use_acc=False, is_async=True)
                if TAIL > 0:
                    k_tail = k_tail_smem.index(buffer).reshape([BLOCK, TAIL]).permute([1, 0])
                    s = warpgroup_mma(q_tail_smem.index(slot), k_tail, s, is_async=True)
                s = warpgroup_mma_wait(0, deps=[s])
                mbarrier.arrive(q_empty.index(slot), count=1)
                best = gl.max(s, 1) * scale_log2
                p = gl.exp2(s * scale_log2 - best[:, None])
                total = gl.sum(p, 1)
                acc = warpgroup_mma(gl.convert_layout(p.to(dtype), P_LAYOUT), v, zero, use_acc=False, is_async=True)
                part = ((place // SLOTS - token_start) * FREE + place % SLOTS - SHIFT) * G + row % G
                gl.store(unit_lse_ptr + part, best + gl.log2(total), mask=live)
                acc = warpgroup_mma_wait(0, deps=[acc])
                acc = acc * gl.convert_layout(1.0 / total, gl.SliceLayout(1, O_LAYOUT))[:, None]
                part = ((store_place // SLOTS - token_start) * FREE + store_place % SLOTS - SHIFT) * G + store_row % G
                out = gl.convert_layout(acc.to(dtype), STORE)
                place = part[:, None] * D + column[None, :]
                cache: gl.constexpr = ".cs" if STREAM else ""
                gl.store(unit_part_ptr + place, out, mask=store_live[:, None], cache_modifier=cache)
            mbarrier.arrive(k_empty.index(buffer), count=1)
            step += num_tiles
            turn += 1
        done += num_items


@gluon.jit(
    do_not_specialize=[
        "T", "head_start", "token_start", "num_tokens", "num_heads", "range_start", "num_ranges", "num_units", "bound",
        "J",
    ]
)  # fmt: skip
def hopper_select_kernel(
    q_ptr, k_desc, k_tail_desc, v_desc, part_ptr, part_lse_ptr, entries_ptr, item_ptr, first_ptr, doc_ptr, base_ptr,
    scale_log2, T, head_start, token_start, num_tokens, num_heads, range_start, num_ranges, num_units, bound, J,
    G: gl.constexpr, HKV: gl.constexpr, D: gl.constexpr, TAIL: gl.constexpr, RATIO: gl.constexpr, SLOTS: gl.constexpr,
    FREE: gl.constexpr, SHIFT: gl.constexpr, PACKED: gl.constexpr, STREAM: gl.constexpr, STAGES: gl.constexpr,
):  # fmt: skip
    dtype: gl.constexpr = k_desc.dtype
    layout: gl.constexpr = gl.NVMMASharedLayout.get_default_for([ROWS, D], dtype)
    q_smem = gl.allocate_shared_memory(dtype, [STAGES, ROWS, D], layout)
    k_smem = gl.allocate_shared_memory(dtype, [2] + k_desc.block_shape, k_desc.layout)
    v_smem = gl.allocate_shared_memory(dtype, [2] + v_desc.block_shape, v_desc.layout)
    q_tail_smem, k_tail_smem = q_smem, k_smem
    if TAIL > 0:
        tail_layout: gl.constexpr = gl.NVMMASharedLayout.get_default_for([ROWS, TAIL], dtype)
        q_tail_smem = gl.allocate_shared_memory(dtype, [STAGES, ROWS, TAIL], tail_layout)
        k_tail_smem = gl.allocate_shared_memory(dtype, [2] + k_tail_desc.block_shape, k_tail_desc.layout)
    q_full = make_barriers(STAGES, 128)  # every thread that gathers
    q_empty = make_barriers(STAGES, 1)
    k_full = make_barriers(2, 1)
    k_empty = make_barriers(2, GROUPS)
    fence_async_shared()
    gl.warp_specialize([
        (_row_partition, (
            0, part_ptr, part_lse_ptr, q_smem, q_tail_smem, k_smem, k_tail_smem, v_smem, q_full, q_empty, k_full,
            k_empty, entries_ptr, item_ptr, first_ptr, scale_log2, head_start, token_start, num_tokens, num_heads,
            range_start, num_ranges, num_units, bound, J, G, D, TAIL, SLOTS, FREE, SHIFT, STREAM, STAGES,
        )),
        (_row_partition, (
            1, part_ptr, part_lse_ptr, q_smem, q_tail_smem, k_smem, k_tail_smem, v_smem, q_full, q_empty, k_full,
            k_empty, entries_ptr, item_ptr, first_ptr, scale_log2, head_start, token_start, num_tokens, num_heads,
            range_start, num_ranges, num_units, bound, J, G, D, TAIL, SLOTS, FREE, SHIFT, STREAM, STAGES,
        )),
        (_row_partition, (
            2, part_ptr, part_lse_ptr, q_smem, q_tail_smem, k_smem, k_tail_smem, v_smem, q_full, q_empty, k_full,
            k_empty, entries_ptr, item_ptr, first_ptr, scale_log2, head_start, token_start, num_tokens, num_heads,
            range_start, num_ranges, num_units, bound, J, G, D, TAIL, SLOTS, FREE, SHIFT, STREAM, STAGES,
        )),
        (_gather_partition, (
            q_ptr, k_desc, k_tail_desc, v_desc, q_smem, q_tail_smem, k_smem, k_tail_smem, v_smem, q_full, q_empty,
            k_full, k_empty, entries_ptr, item_ptr, first_ptr, doc_ptr, base_ptr, T, head_start, token_start, num_heads,
            range_start, num_ranges, num_units, bound, J, G, HKV, D, TAIL, RATIO, SLOTS, PACKED, STAGES,
        )),
    ], [4, 4, 4], [144, 144, 72])  # fmt: skip


def range_tokens(num_blocks: int, group_size: int, segment: int, most: int) -> int:
    """Tokens of a range: whole segments, at most `most` tokens, RANGE_ROWS rows for each block."""
    tokens = min(num_blocks * RANGE_ROWS // group_size, most)
    return max(tokens // segment, 1) * segment


def hopper_select(
    q: Tensor, k: Tensor, v: Tensor, part: Tensor, part_lse: Tensor, inversion: Inversion, items: Items, chunk: Chunk,
    layout: Layout | None, shift: int, free: int, scale: float,
) -> None:  # fmt: skip
    """Write what `select_forward_kernel` gives for a chunk of whole ranges and tensors that `hopper_gathers` takes.

    Args:
        shift: slots of a token before its free ones.
        free: slots that are free.
    """
    B, T, H, Dk = q.shape
    Hkv, D = k.shape[2], v.shape[3]
    tokens = chunk.token_end - chunk.token
    num_ranges = triton.cdiv(tokens, items.range_tokens)
    documents = (q, q) if layout is None else (layout.doc_start, layout.block_base)
    hopper_select_kernel[(num_multiprocessors(q),)](
        q, *describe_parts(k, D, BLOCK.value, 1), describe_box(v, BLOCK.value, 1), part, part_lse, inversion.entries,
        items.table, items.first, *documents, scale * LOG2E, T, chunk.head, chunk.token, tokens, B * Hkv,
        chunk.token // items.range_tokens, num_ranges, num_ranges * (chunk.head_end - chunk.head),
        items.table.shape[2], items.first.shape[2] - 1,
        G=H // Hkv, HKV=Hkv, D=D, TAIL=Dk - D, RATIO=inversion.ratio, SLOTS=inversion.slots, FREE=free, SHIFT=shift,
        PACKED=layout is not None, STREAM=STREAM, STAGES=TAIL_STAGES if Dk > D else STAGES, num_warps=4,
    )  # fmt: skip
