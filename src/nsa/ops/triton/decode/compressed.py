"""Compressed attention of a decode step, split over the context: partial outputs, and what each key gives its blocks.

A program holds all heads of a group for all queries of a step as rows (row = query * G + head) and walks over a share
of the cached row's selection blocks; a block has l'/d compressed tokens, which lie in the page of the same number. How
many there are is read from `lengths` on the device, so a short row ends at once whatever the cache could hold.

Written for `choice.py`: with the running maximum of its tile as the reference, what the probabilities of a block's own
compressed tokens give to the block and to the SPANS - 1 blocks after it (Eq. 9), for each row.

Shapes: q `[B, Q, H, Dk]`, pages `[P, Hkv, l'/d, D]`, table `[B, M]`, lengths `[B]`.
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
def decode_compressed_kernel(
    q_ptr, k_ptr, v_ptr, table_ptr, length_ptr, out_ptr, stat_ptr, mass_ptr, top_ptr, scale_log2, table_stride, k_page,
    k_head, v_page, v_head, num_blocks, num_tiles, Q: tl.constexpr, G: tl.constexpr, HKV: tl.constexpr,
    DK: tl.constexpr, DV: tl.constexpr, DK_PADDED: tl.constexpr, DV_PADDED: tl.constexpr, ROWS: tl.constexpr,
    TILE: tl.constexpr, NUM_SPLITS: tl.constexpr, SIZE: tl.constexpr, STRIDE: tl.constexpr, SELECT: tl.constexpr,
    PER_BLOCK: tl.constexpr, PADDED: tl.constexpr, SPANS: tl.constexpr, PRECISION: tl.constexpr,
    STAGES: tl.constexpr,
):  # fmt: skip
    """One split of one (row, group): TILE blocks of PADDED >= l'/d compressed tokens a step."""
    split, batch = tl.program_id(0), tl.program_id(2)
    head, row_tile = tl.program_id(1) % HKV, tl.program_id(1) // HKV
    length = tl.minimum(tl.load(length_ptr + batch), num_blocks * SELECT)
    count = num_compressed(length, SIZE, STRIDE)
    first, end = split_of_blocks(length, split, NUM_SPLITS, TILE, SIZE, STRIDE, PER_BLOCK)
    if first >= end:
        return
    row = row_tile * ROWS + tl.arange(0, ROWS)
    live = row < Q * G
    # Query c is at position length - Q + c.
    visible = num_compressed(length - Q + row // G + 1, SIZE, STRIDE)
    q_row = (batch * Q + row // G) * (HKV * G) + head * G + row % G
    feature, value = tl.arange(0, DK_PADDED), tl.arange(0, DV_PADDED)
    q = tl.load(q_ptr + q_row[:, None] * DK + feature[None, :], (live[:, None] & (feature < DK)[None, :]), 0.0)
    column = tl.arange(0, TILE * PADDED)
    within = column % PADDED
    unit = (batch * HKV + head).to(tl.int64) * (Q * G)
    acc = tl.zeros([ROWS, DV_PADDED], tl.float32)
    best = tl.full([ROWS], -float("inf"), tl.float32)
    total = tl.zeros([ROWS], tl.float32)
    for block in tl.range(first, end, TILE, num_stages=STAGES):
        number = block + column // PADDED
        token = number * PER_BLOCK + within
        there = (within < PER_BLOCK) & (number < end) & (token < count)
        page = tl.load(table_ptr + batch * table_stride + number, there, 0).to(tl.int64)
        k_at = page * k_page + head * k_head + within * DK
        v_at = page * v_page + head * v_head + within * DV
        k = tl.load(k_ptr + k_at[:, None] + feature[None, :], there[:, None] & (feature < DK)[None, :], 0.0)
        s = tl.dot(q, tl.trans(k), input_precision=PRECISION) * scale_log2
        s = tl.where(there[None, :] & (token[None, :] < visible[:, None]), s, -float("inf"))
        top = tl.maximum(best, tl.max(s, 1))
        base = tl.where(top == -float("inf"), 0.0, top)  # a query that sees none of these tokens
        p = tl.exp2(s - base[:, None])
        decay = tl.exp2(best - base)
        v = tl.load(v_ptr + v_at[:, None] + value[None, :], there[:, None] & (value < DV)[None, :], 0.0)
        acc = acc * decay[:, None] + tl.dot(p.to(v.dtype), v, input_precision=PRECISION)
        total = total * decay + tl.sum(p, 1)
        best = top
        by_block = tl.reshape(p, [ROWS, TILE, PADDED])
        begin = tl.arange(0, PADDED) * STRIDE
        target = block + tl.arange(0, TILE)
        for span in tl.static_range(SPANS):
            shared = tl.minimum(begin + SIZE, (span + 1) * SELECT) - tl.maximum(begin, span * SELECT)
            weight = tl.maximum(shared, 0).to(tl.float32) / STRIDE
            given = tl.sum(by_block * weight[None, None, :], 2)
            place = ((unit + row) * SPANS + span) * num_blocks + span
            kept = (target < end) & (target + span < num_blocks)
            tl.store(mass_ptr + place[:, None] + target[None, :], given, live[:, None] & kept[None, :])
        tl.store(top_ptr + (unit + row) * num_tiles + block // TILE, base, live)
    place = (unit + row) * NUM_SPLITS + split
    tl.store(out_ptr + place[:, None] * DV + value[None, :], acc, live[:, None] & (value < DV)[None, :])
    tl.store(stat_ptr + place * 2, best, live)
    tl.store(stat_ptr + place * 2 + 1, total, live)
