"""Compressed attention of a decode step, split over the context: partial outputs, and what each key gives its blocks.

A program holds all heads of a group for all queries of a step as rows (row = query * G + head) and walks over a share
of the cached row's selection blocks; a block has l'/d compressed tokens, which lie in the page of the same number. How
many there are is read from `lengths` on the device, so a short row ends at once whatever the cache could hold.

Written for `choice.py`: with the running maximum of its tile as the reference, what the probabilities of a block's own
compressed tokens give to the block and to the SPANS - 1 blocks after it (Eq. 9), for each row.

Shapes: q `[B, Q, H, Dk]`, pages `[P, Hkv, l'/d, D]`, table `[B, M]`, lengths `[B]`; a pair is a batch row and a group.
"""

# Kernels are typed by Triton, not by Python.
# pyright: reportArgumentType=false, reportCallIssue=false, reportAttributeAccessIssue=false, reportReturnType=false
# pyright: reportGeneralTypeIssues=false, reportPossiblyUnboundVariable=false, reportAssignmentType=false
from __future__ import annotations

import triton
import triton.language as tl


@triton.jit
def num_compressed(length, SIZE: tl.constexpr, STRIDE: tl.constexpr):
    """N(length): complete compressed blocks among so many tokens; 0 for no or negative lengths."""
    return tl.where(length >= SIZE, (length - SIZE) // STRIDE + 1, 0)


@triton.jit
def split_of_blocks(length, split, NUM_SPLITS: tl.constexpr, TILE: tl.constexpr, SIZE: tl.constexpr,
                    STRIDE: tl.constexpr, PER_BLOCK: tl.constexpr):  # fmt: skip
    """Blocks [first, end) of a split, whole tiles of them; empty for the splits that a short row does not need."""
    blocks = tl.cdiv(num_compressed(length, SIZE, STRIDE), PER_BLOCK)
    share = tl.cdiv(tl.cdiv(blocks, TILE), NUM_SPLITS) * TILE
    return tl.minimum(split * share, blocks), tl.minimum((split + 1) * share, blocks)


@triton.jit
def num_used_splits(length, NUM_SPLITS: tl.constexpr, TILE: tl.constexpr, SIZE: tl.constexpr, STRIDE: tl.constexpr,
                    PER_BLOCK: tl.constexpr):  # fmt: skip
    """Splits that are not empty; what the others left in the scratch is undefined."""
    first, end = split_of_blocks(length, 0, NUM_SPLITS, TILE, SIZE, STRIDE, PER_BLOCK)
    return tl.cdiv(tl.cdiv(num_compressed(length, SIZE, STRIDE), PER_BLOCK), tl.maximum(end - first, 1))


@triton.jit
def store_importance(
    importance_ptr, p, row, live, block, end, num_blocks, TILE: tl.constexpr, PADDED: tl.constexpr,
    SPANS: tl.constexpr, SIZE: tl.constexpr, STRIDE: tl.constexpr, SELECT: tl.constexpr,
):  # fmt: skip
    """What p `[ROWS, TILE * PADDED]` of the TILE blocks from `block` on gives to them and to the blocks after (Eq. 9).

    Stored at the block that it is for, `[row, span, block + span]`: there one exponential a tile rescales it, not one a
    key.
    """
    by_block = tl.reshape(p, [p.shape[0], TILE, PADDED])
    begin = tl.arange(0, PADDED) * STRIDE
    target = block + tl.arange(0, TILE)
    for span in tl.static_range(SPANS):
        # Tokens of a compressed block that lie in the span-th selection block, in strides.
        shared = tl.minimum(begin + SIZE, (span + 1) * SELECT) - tl.maximum(begin, span * SELECT)
        weight = tl.maximum(shared, 0).to(tl.float32) / STRIDE
        given = tl.sum(by_block * weight[None, None, :], 2)
        entry = (row * SPANS + span) * num_blocks + span
        kept = (target < end) & (target + span < num_blocks)
        tl.store(importance_ptr + entry[:, None] + target[None, :], given, live[:, None] & kept[None, :])


@triton.jit
def decode_compressed_kernel(
    q_ptr, k_ptr, v_ptr, table_ptr, length_ptr, out_ptr, stat_ptr, importance_ptr, tile_max_ptr, scale_log2,
    table_stride, k_page, k_head, v_page, v_head, num_blocks, num_tiles, Q: tl.constexpr, G: tl.constexpr,
    HKV: tl.constexpr, DK: tl.constexpr, DV: tl.constexpr, DK_PADDED: tl.constexpr, DV_PADDED: tl.constexpr,
    ROWS: tl.constexpr, TILE: tl.constexpr, NUM_SPLITS: tl.constexpr, SIZE: tl.constexpr, STRIDE: tl.constexpr,
    SELECT: tl.constexpr, PER_BLOCK: tl.constexpr, PADDED: tl.constexpr, SPANS: tl.constexpr,
    PRECISION: tl.constexpr, STAGES: tl.constexpr,
):  # fmt: skip
    """One split of one pair: TILE blocks of PADDED >= l'/d compressed tokens a step."""
    split, batch = tl.program_id(0), tl.program_id(2)
    group, row_tile = tl.program_id(1) % HKV, tl.program_id(1) // HKV
    length = tl.minimum(tl.load(length_ptr + batch), num_blocks * SELECT)
    count = num_compressed(length, SIZE, STRIDE)
    first, end = split_of_blocks(length, split, NUM_SPLITS, TILE, SIZE, STRIDE, PER_BLOCK)
    if first >= end:
        return
    row = row_tile * ROWS + tl.arange(0, ROWS)
    live = row < Q * G
    # Query c is at position length - Q + c.
    visible = num_compressed(length - Q + row // G + 1, SIZE, STRIDE)
    q_row = (batch * Q + row // G) * (HKV * G) + group * G + row % G
    feature, value = tl.arange(0, DK_PADDED), tl.arange(0, DV_PADDED)
    q = tl.load(q_ptr + q_row[:, None] * DK + feature[None, :], (live[:, None] & (feature < DK)[None, :]), 0.0)
    column = tl.arange(0, TILE * PADDED)
    within = column % PADDED
    pair_row = (batch * HKV + group).to(tl.int64) * (Q * G) + row
    acc = tl.zeros([ROWS, DV_PADDED], tl.float32)
    row_max = tl.full([ROWS], -float("inf"), tl.float32)
    row_sum = tl.zeros([ROWS], tl.float32)
    for block in tl.range(first, end, TILE, num_stages=STAGES):
        number = block + column // PADDED
        token = number * PER_BLOCK + within
        exists = (within < PER_BLOCK) & (number < end) & (token < count)
        page = tl.load(table_ptr + batch * table_stride + number, exists, 0).to(tl.int64)
        k_at = page * k_page + group * k_head + within * DK
        v_at = page * v_page + group * v_head + within * DV
        k = tl.load(k_ptr + k_at[:, None] + feature[None, :], exists[:, None] & (feature < DK)[None, :], 0.0)
        s = tl.dot(q, tl.trans(k), input_precision=PRECISION) * scale_log2
        s = tl.where(exists[None, :] & (token[None, :] < visible[:, None]), s, -float("inf"))
        new_max = tl.maximum(row_max, tl.max(s, 1))
        safe_max = tl.where(new_max == -float("inf"), 0.0, new_max)  # a query that sees none of these tokens
        p = tl.exp2(s - safe_max[:, None])
        alpha = tl.exp2(row_max - safe_max)
        v = tl.load(v_ptr + v_at[:, None] + value[None, :], exists[:, None] & (value < DV)[None, :], 0.0)
        acc = acc * alpha[:, None] + tl.dot(p.to(v.dtype), v, input_precision=PRECISION)
        row_sum = row_sum * alpha + tl.sum(p, 1)
        row_max = new_max
        store_importance(
            importance_ptr, p, pair_row, live, block, end, num_blocks, TILE, PADDED, SPANS, SIZE, STRIDE, SELECT
        )
        # The maximum that this tile was taken with: later ones may be larger, and `choice.py` makes up for that.
        tl.store(tile_max_ptr + pair_row * num_tiles + block // TILE, safe_max, live)
    part = pair_row * NUM_SPLITS + split
    tl.store(out_ptr + part[:, None] * DV + value[None, :], acc, live[:, None] & (value < DV)[None, :])
    tl.store(stat_ptr + part * 2, row_max, live)
    tl.store(stat_ptr + part * 2 + 1, row_sum, live)
