"""The blocks of each query of a decode step: importance from what `compressed.py` wrote, forced blocks, top-n.

`decode_importance_kernel` adds up the importance of a chunk of candidates in fp32 (Eq. 9, 10). Then one program for
each (row, query, group), in a launch of `attend.py`, finds the n-th largest by bisection on the bits of the scores;
ties go to the lower index because equal scores are ranked by a running count.
"""

# Kernels are typed by Triton, not by Python.
# pyright: reportArgumentType=false, reportCallIssue=false, reportAttributeAccessIssue=false, reportReturnType=false
# pyright: reportGeneralTypeIssues=false, reportPossiblyUnboundVariable=false, reportAssignmentType=false
from __future__ import annotations

from typing import Any, NamedTuple

import triton
import triton.language as tl
from triton.language.extra.cuda import gdc_wait

from nsa.ops.triton.decode.compressed import num_compressed, num_used_splits

FORCED = tl.constexpr(0x7FFFFFFF)  # above the bits of every finite score


class Blocks(NamedTuple):
    """Constants of the choice: geometry in tokens and blocks, PER_BLOCK = l'/d, SPANS as `num_spans` says."""

    SIZE: Any
    STRIDE: Any
    SELECT: Any
    PER_BLOCK: Any
    SPANS: Any
    INIT: Any
    LOCAL: Any
    N: Any


@triton.jit
def log_sum_exp(stat_ptr, row, live, used, NUM_SPLITS: tl.constexpr, SPLITS_PADDED: tl.constexpr):
    """Base-2 log-sum-exp `[rows]` of rows over the splits that were used; 0 for rows that see nothing."""
    split = tl.arange(0, SPLITS_PADDED)
    at = (row[:, None] * NUM_SPLITS + split[None, :]) * 2
    exists = live[:, None] & (split < used)[None, :]
    row_max = tl.load(stat_ptr + at, exists, -float("inf"))
    row_sum = tl.load(stat_ptr + at + 1, exists, 0.0)
    top = tl.max(row_max, 1)
    safe_max = tl.where(top == -float("inf"), 0.0, top)
    whole = tl.sum(row_sum * tl.exp2(row_max - safe_max[:, None]), 1)
    return tl.where(whole > 0, safe_max + tl.log2(tl.where(whole > 0, whole, 1.0)), 0.0)


@triton.jit
def choose(score_ptr, index_ptr, position, scored, wanted, SELECT: tl.constexpr, INIT: tl.constexpr,
           LOCAL: tl.constexpr, CANDIDATES: tl.constexpr):  # fmt: skip
    """Write the `wanted` best of the blocks 0 .. position // l' in ascending order, then -1."""
    block = tl.arange(0, CANDIDATES)
    current = position // SELECT
    candidate = block <= current
    score = tl.load(score_ptr + block, candidate & (block < scored), 0.0)
    forced = (block < INIT) | (block > current - LOCAL)
    # Scores are not negative: their bits as integers have the same order.
    key = tl.where(forced, FORCED, score.to(tl.int32, bitcast=True))
    key = tl.where(candidate, key, -1)
    half = 1 << 30
    threshold = tl.where(tl.sum((key >= half).to(tl.int32), 0) >= wanted, half, 0)
    for step in range(15):  # two bits at a time: three counts in one sum
        bit = 1 << (28 - 2 * step)
        count = (key >= threshold + bit).to(tl.int64)
        count += (key >= threshold + 2 * bit).to(tl.int64) << 20
        count += (key >= threshold + 3 * bit).to(tl.int64) << 40
        count = tl.sum(count, 0)
        enough = ((count & 0xFFFFF) >= wanted).to(tl.int32) + (((count >> 20) & 0xFFFFF) >= wanted).to(tl.int32)
        threshold += bit * (enough + ((count >> 40) >= wanted).to(tl.int32))
    above = key > threshold
    tied = (key == threshold) & candidate
    room = wanted - tl.sum(above.to(tl.int32), 0)
    chosen = above | (tied & (tl.cumsum(tied.to(tl.int32), 0) <= room))
    slot = tl.cumsum(chosen.to(tl.int32), 0) - 1
    tl.store(index_ptr + slot, block, chosen)


@triton.jit
def decode_importance_kernel(
    stat_ptr, importance_ptr, tile_max_ptr, length_ptr, score_ptr, num_blocks, num_tiles, Q: tl.constexpr,
    G: tl.constexpr, HKV: tl.constexpr, HEADS: tl.constexpr, TILE: tl.constexpr, NUM_SPLITS: tl.constexpr,
    SPLITS_PADDED: tl.constexpr, SIZE: tl.constexpr, STRIDE: tl.constexpr, PER_BLOCK: tl.constexpr,
    SPANS: tl.constexpr, CHUNK: tl.constexpr, PDL: tl.constexpr,
):  # fmt: skip
    """Score of CHUNK blocks for one query and group: their importance, summed over the group's heads (Eq. 9, 10)."""
    if PDL:
        gdc_wait()
    start, group, q_index = tl.program_id(0) * CHUNK, tl.program_id(1), tl.program_id(2)
    batch, query = q_index // Q, q_index % Q
    length = tl.load(length_ptr + batch)
    last = tl.cdiv(num_compressed(length, SIZE, STRIDE), PER_BLOCK)
    if start < last + SPANS - 1:
        used = num_used_splits(length, NUM_SPLITS, TILE, SIZE, STRIDE, PER_BLOCK)
        head = tl.arange(0, HEADS)
        row = (batch * HKV + group).to(tl.int64) * (Q * G) + query * G + head
        live = head < G
        block = start + tl.arange(0, CHUNK)
        lse = log_sum_exp(stat_ptr, row, live, used, NUM_SPLITS, SPLITS_PADDED)
        # Importance was taken with the maximum of its own tile of blocks as the reference.
        tile = start // TILE + tl.arange(0, CHUNK // TILE)
        max_at = tile_max_ptr + (row * num_tiles)[:, None] + tile[None, :]
        exists = live[:, None] & (tile * TILE < last)[None, :]
        own = tl.exp2(tl.load(max_at, exists, -float("inf")) - lse[:, None])[:, :, None]
        before = live[:, None] & (tile > 0)[None, :] & ((tile - 1) * TILE < last)[None, :]
        previous = tl.exp2(tl.load(max_at - 1, before, -float("inf")) - lse[:, None])[:, :, None]
        score = tl.zeros([HEADS, CHUNK // TILE, TILE], tl.float32)
        for span in tl.static_range(SPANS):
            written = live[:, None] & ((block >= span) & (block - span < last) & (block < num_blocks))[None, :]
            entry = ((row * SPANS + span) * num_blocks)[:, None] + block[None, :]
            importance = tl.reshape(tl.load(importance_ptr + entry, written, 0.0), [HEADS, CHUNK // TILE, TILE])
            # The first blocks of a tile have it from the tile before: `plan_decode` makes tiles at least so long.
            crosses = (tl.arange(0, TILE) < span)[None, None, :]
            score += importance * tl.where(crosses, previous, own)
        score = tl.reshape(tl.sum(score, 0), [CHUNK])
        score_ptr += (q_index * HKV + group).to(tl.int64) * num_blocks
        tl.store(score_ptr + block, score, block < num_blocks)


@triton.jit
def choose_blocks(
    query, group, batch, length_ptr, score_ptr, index_ptr, num_blocks, BLOCKS: tl.constexpr, Q: tl.constexpr,
    HKV: tl.constexpr, N_PADDED: tl.constexpr, FEW: tl.constexpr, CANDIDATES: tl.constexpr,
):  # fmt: skip
    """Blocks of one query; rows of at most FEW blocks are searched with so many candidates, others with CANDIDATES."""
    length = tl.minimum(tl.load(length_ptr + batch), num_blocks * BLOCKS.SELECT)
    position = length - Q + query
    list_number = (batch * Q + query) * HKV + group
    index_ptr += list_number * BLOCKS.N
    slot = tl.arange(0, N_PADDED)
    if position < 0:  # padding
        tl.store(index_ptr + slot, -1, slot < BLOCKS.N)
    else:
        wanted = tl.minimum(position // BLOCKS.SELECT + 1, BLOCKS.N)
        tl.store(index_ptr + slot, -1, (slot < BLOCKS.N) & (slot >= wanted))
        # Blocks that `decode_importance_kernel` wrote; the local ones after them may have none yet.
        scored = tl.cdiv(num_compressed(length, BLOCKS.SIZE, BLOCKS.STRIDE), BLOCKS.PER_BLOCK) + BLOCKS.SPANS - 1
        score_ptr += list_number.to(tl.int64) * num_blocks
        if position // BLOCKS.SELECT < FEW:
            choose(score_ptr, index_ptr, position, scored, wanted, BLOCKS.SELECT, BLOCKS.INIT, BLOCKS.LOCAL, FEW)
        else:
            choose(score_ptr, index_ptr, position, scored, wanted, BLOCKS.SELECT, BLOCKS.INIT, BLOCKS.LOCAL, CANDIDATES)
