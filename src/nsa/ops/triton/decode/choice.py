"""The blocks of each query of a decode step: importance from what `compressed.py` wrote, forced blocks, top-n.

`decode_importance_kernel` adds up the importance of a chunk of candidates in fp32 (Eq. 9, 10). Then one program for
each (row, query, group), in a launch of `attend.py`, finds the n-th largest by bisection on the bits of the scores;
ties go to the lower index because equal scores are ranked by a running count.
"""

# Kernels are typed by Triton, not by Python.
# pyright: reportArgumentType=false, reportCallIssue=false, reportAttributeAccessIssue=false, reportReturnType=false
# pyright: reportGeneralTypeIssues=false, reportPossiblyUnboundVariable=false, reportAssignmentType=false
from __future__ import annotations

import triton
import triton.language as tl
from triton.language.extra.cuda import gdc_wait

from nsa.ops.triton.decode.compressed import num_compressed, split_of_blocks

FORCED = tl.constexpr(0x7FFFFFFF)  # above the bits of every finite score


@triton.jit
def log_sum_exp(stat_ptr, place, live, used, NUM_SPLITS: tl.constexpr, SPLITS_PADDED: tl.constexpr):
    """Base-2 log-sum-exp of rows `place` over the splits that were used; 0 for rows that see nothing."""
    split = tl.arange(0, SPLITS_PADDED)
    at = (place[:, None] * NUM_SPLITS + split[None, :]) * 2
    there = live[:, None] & (split < used)[None, :]
    best = tl.load(stat_ptr + at, there, -float("inf"))
    total = tl.load(stat_ptr + at + 1, there, 0.0)
    top = tl.max(best, 1)
    base = tl.where(top == -float("inf"), 0.0, top)
    whole = tl.sum(total * tl.exp2(best - base[:, None]), 1)
    return tl.where(whole > 0, base + tl.log2(tl.where(whole > 0, whole, 1.0)), 0.0)


@triton.jit
def choose(score_ptr, index_ptr, position, scored, wanted, SELECT: tl.constexpr, INIT: tl.constexpr,
           LOCAL: tl.constexpr, CANDIDATES: tl.constexpr):  # fmt: skip
    """Write the `wanted` best of the blocks 0 .. position // l' in ascending order, then -1."""
    block = tl.arange(0, CANDIDATES)
    current = position // SELECT
    candidate = block <= current
    score = tl.load(score_ptr + block, candidate & (block < scored), 0.0)
    forced = (block < INIT) | (block > current - LOCAL)
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
    place = tl.cumsum(chosen.to(tl.int32), 0) - 1
    tl.store(index_ptr + place, block, chosen)


@triton.jit
def decode_importance_kernel(
    stat_ptr, mass_ptr, top_ptr, length_ptr, score_ptr, num_blocks, num_tiles, Q: tl.constexpr, G: tl.constexpr,
    HKV: tl.constexpr, HEADS: tl.constexpr, TILE: tl.constexpr, NUM_SPLITS: tl.constexpr, SPLITS_PADDED: tl.constexpr,
    SIZE: tl.constexpr, STRIDE: tl.constexpr, PER_BLOCK: tl.constexpr, SPANS: tl.constexpr, CHUNK: tl.constexpr,
    PDL: tl.constexpr,
):  # fmt: skip
    """Importance of CHUNK blocks for one query and group (Eq. 9, 10)."""
    if PDL:
        gdc_wait()
    start, head, which = tl.program_id(0) * CHUNK, tl.program_id(1), tl.program_id(2)
    batch, query = which // Q, which % Q
    length = tl.load(length_ptr + batch)
    last = tl.cdiv(num_compressed(length, SIZE, STRIDE), PER_BLOCK)
    if start < last + SPANS - 1:
        first, end = split_of_blocks(length, 0, NUM_SPLITS, TILE, SIZE, STRIDE, PER_BLOCK)
        used = tl.cdiv(last, tl.maximum(end - first, 1))
        lane = tl.arange(0, HEADS)
        row = (batch * HKV + head).to(tl.int64) * (Q * G) + query * G + lane
        live = lane < G
        block = start + tl.arange(0, CHUNK)
        lse = log_sum_exp(stat_ptr, row, live, used, NUM_SPLITS, SPLITS_PADDED)
        # Masses were taken with the maximum of their own tile of blocks as the reference.
        tile = start // TILE + tl.arange(0, CHUNK // TILE)
        top_at = top_ptr + (row * num_tiles)[:, None] + tile[None, :]
        exists = live[:, None] & (tile * TILE < last)[None, :]
        own = tl.exp2(tl.load(top_at, exists, -float("inf")) - lse[:, None])[:, :, None]
        before = live[:, None] & (tile > 0)[None, :] & ((tile - 1) * TILE < last)[None, :]
        previous = tl.exp2(tl.load(top_at - 1, before, -float("inf")) - lse[:, None])[:, :, None]
        score = tl.zeros([HEADS, CHUNK // TILE, TILE], tl.float32)
        for span in tl.static_range(SPANS):
            there = live[:, None] & ((block >= span) & (block - span < last) & (block < num_blocks))[None, :]
            mass = tl.load(mass_ptr + ((row * SPANS + span) * num_blocks)[:, None] + block[None, :], there, 0.0)
            mass = tl.reshape(mass, [HEADS, CHUNK // TILE, TILE])
            crosses = (tl.arange(0, TILE) < span)[None, None, :]
            score += mass * tl.where(crosses, previous, own)
        score = tl.reshape(tl.sum(score, 0), [CHUNK])
        score_ptr += (which * HKV + head).to(tl.int64) * num_blocks
        tl.store(score_ptr + block, score, block < num_blocks)


@triton.jit
def choose_blocks(
    query, head, batch, length_ptr, score_ptr, index_ptr, num_blocks, Q: tl.constexpr, HKV: tl.constexpr,
    SIZE: tl.constexpr, STRIDE: tl.constexpr, SELECT: tl.constexpr, PER_BLOCK: tl.constexpr, SPANS: tl.constexpr,
    INIT: tl.constexpr, LOCAL: tl.constexpr, N: tl.constexpr, N_PADDED: tl.constexpr, FEW: tl.constexpr,
    CANDIDATES: tl.constexpr,
):  # fmt: skip
    """Blocks of one query; rows of at most FEW blocks are searched with so many candidates, others with CANDIDATES."""
    length = tl.minimum(tl.load(length_ptr + batch), num_blocks * SELECT)
    position = length - Q + query
    which = (batch * Q + query) * HKV + head
    index_ptr += which * N
    slot = tl.arange(0, N_PADDED)
    if position < 0:  # padding
        tl.store(index_ptr + slot, -1, slot < N)
    else:
        wanted = tl.minimum(position // SELECT + 1, N)
        tl.store(index_ptr + slot, -1, (slot < N) & (slot >= wanted))
        scored = tl.cdiv(num_compressed(length, SIZE, STRIDE), PER_BLOCK) + SPANS - 1
        score_ptr += which.to(tl.int64) * num_blocks
        if position // SELECT < FEW:
            choose(score_ptr, index_ptr, position, scored, wanted, SELECT, INIT, LOCAL, FEW)
        else:
            choose(score_ptr, index_ptr, position, scored, wanted, SELECT, INIT, LOCAL, CANDIDATES)
