"""Importance of the selection blocks and the choice of the best n; no score matrix outlives a chunk of tokens.

`scores.py` stores a chunk's scores. Here one warp for each token of a pair (a batch row with a group of heads) adds
them up to its blocks' importance (Eq. 9) and chooses. Forced blocks, INIT initial and LOCAL local ones, need no search.
Of the others, the candidates, the best FREE = n - INIT - LOCAL are wanted. A token's row, with INIT 1 and LOCAL 2:

    block     0  1  2  3   4  5  6  7   8  9 10 11   ..     .. own     i initial, c candidate, l local
              i  c  c  c   c  c  c  c   c  c  c  c   ..   c  c  l  l
    quad      0            4            8            ..   last         four blocks, which a lane loads at once

Scores are at least 0, so that their order is that of their bits as integers: the least of the FREE best is found by
bisection on the bits. Each step counts the candidates that reach a value.

Rows of up to 256 blocks are searched whole. Of longer ones CHUNK blocks are read at a time and compared with a bound;
quads that reach it go to a list, and only the list is searched exactly:

              lane 0       lane 1       ..   lane 31
    line 0    0 .. 3       4 .. 7       ..   124 .. 127      these blocks: [CHUNK / 128 lines, 32 lanes, 4]
    line 1    128 .. 131   132 .. 135   ..   252 .. 255
              ||||         ||||              ||||
    groups    the largest of each of the 128 columns, of all blocks so far
    bound     a value that FREE groups, so at least FREE candidates, reach: near the least of the best
    list      4, 132, 260, ..: the first blocks of quads in which a candidate reaches it, in order

Where more quads reach the bound than the list has room for (ties, rising scores), the list is cut to its best FREE
blocks, then the present CHUNK to its own, both exactly; later candidates must exceed the least of them. Any length
takes this path, and ties go to the lower index because list and candidates stay in index order.

Shapes: q `[B, T, H, Dk]`, k_cmp `[B, N, Hkv, Dk]`, lse `[B, T, H]`, out int32 `[B, T, Hkv, n]`.
"""

# Kernels are typed by Triton, not by Python.
# pyright: reportArgumentType=false, reportCallIssue=false, reportAttributeAccessIssue=false, reportReturnType=false
# pyright: reportGeneralTypeIssues=false, reportPossiblyUnboundVariable=false, reportAssignmentType=false
from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

from nsa.geometry import BlockGeometry
from nsa.ops.triton.layout import Layout, document_pointers
from nsa.ops.triton.plan import TopK
from nsa.ops.triton.selected.invert import cut_chunks
from nsa.ops.triton.topk.scores import Scores, plain_scores, row_width
from nsa.ops.triton.topk.scores_sm90 import scores_sm90

LARGEST = tl.constexpr(0x7F7FFFFF)  # bits of the largest finite number: infinite scores tie with it


@triton.jit
def _importance(
    score_ptr, j, live, key_end, width, SIZE: tl.constexpr, STRIDE: tl.constexpr, BLOCK: tl.constexpr,
    INIT: tl.constexpr, LOCAL: tl.constexpr, POOLED: tl.constexpr,
):  # fmt: skip
    """Bits of the importance of blocks j, -1 where not `live`; anything for initial and local blocks."""
    SPAN: tl.constexpr = BLOCK // STRIDE
    REACH: tl.constexpr = SIZE // STRIDE
    WRITTEN: tl.constexpr = SIZE <= LOCAL * BLOCK + 1  # a block that is not local has a visible key
    if POOLED:  # blocks are written up to the last that has a visible key, the one before it has one in any case
        own = live if WRITTEN else live & (j * SPAN < key_end)
        score = tl.load(score_ptr + j, mask=own, other=0.0)
        if REACH > 1:
            before = live & (j > 0) if INIT == 0 else live
            score += tl.load(score_ptr + (width // 2 - 1) + j, mask=before, other=0.0)
    else:
        score = tl.zeros(j.shape, tl.float32)
        for offset in tl.static_range(SPAN + REACH - 1):
            i = offset + 1 - REACH
            weight = tl.minimum(i + REACH, SPAN) - tl.maximum(i, 0)  # overlap(i, j) / d, Eq. 9
            key = j * SPAN + i
            score += weight * tl.load(score_ptr + key, mask=live & (key >= 0) & (key < key_end), other=0.0)
    return tl.where(live, score.to(tl.int32, bitcast=True), -1)


@triton.jit
def _count(ones):
    """How many of [lines, 32, few] are 1: lines and quads within a lane first, so that one sum crosses lanes."""
    return tl.sum(tl.sum(tl.sum(ones.to(tl.int32), 2), 0), 0)


@triton.jit
def _threshold(bits, low, COUNT: tl.constexpr, SLACK: tl.constexpr):
    """A bound that the COUNT largest of `bits`, ties and at most SLACK others reach; 0 if there are fewer.

    `low` is a bound that at least COUNT reach, or 0. The search lies between it and the largest: most scores share
    their exponent, which need not be found again.
    """
    high = tl.max(tl.max(tl.max(bits, 2), 0), 0) + 1
    high = tl.where(_count(bits >= 0) <= COUNT, 1, high)
    while high - low > 1:
        middle = low + (high - low) // 2
        reached = _count(bits >= middle)
        low = tl.where(reached >= COUNT, middle, low)
        high = tl.where(reached > COUNT + SLACK, high, middle)  # few enough: no need to look closer
    return low


@triton.jit
def _ranks(ones):
    """How many of the ones [lines, 32, few] come before each, in the order of blocks."""
    ROWS: tl.constexpr = ones.shape[0]
    lanes = tl.sum(ones, 2)
    if ROWS <= 4:  # a row has 128 ones at most, which fit a byte: one scan for all rows
        row = tl.arange(0, ROWS)
        word = tl.sum(lanes << (row[:, None] * 8), 0)
        before = ((tl.cumsum(word, 0) - word)[None, :] >> (row[:, None] * 8)) & 255
        if ROWS > 1:
            total = tl.sum(lanes, 1)
            before += tl.sum(tl.where(row[None, :] < row[:, None], total[None, :], 0), 1)[:, None]
    else:
        lanes = tl.reshape(lanes, [ROWS * 32])
        before = tl.reshape(tl.cumsum(lanes, 0) - lanes, [ROWS, 32])
    ranks = before[:, :, None]
    if ones.shape[2] > 1:
        ranks += tl.cumsum(ones, 2) - ones
    return ranks


@triton.jit
def _best(bits, threshold, COUNT: tl.constexpr):
    """Ones for the COUNT largest, ties to the first, and their number. `threshold` is that of COUNT without slack."""
    best = (bits >= threshold).to(tl.int32)
    count = _count(best)
    if count > COUNT:
        tied = (bits == threshold).to(tl.int32)
        best = tl.where(_ranks(tied) < COUNT - count + _count(tied), best, best - tied)
        count = COUNT
    return best, count


@triton.jit
def _read_quads(list_ptr, i, begin, filled):
    """First blocks of the list's quads i; those that are not filled lie before all blocks."""
    return tl.load(list_ptr + i, mask=(i >= begin) & (i < filled), other=-4)


@triton.jit
def _append(list_ptr, quads, j):
    """Add the quads [lines, 32, 1] that are 1 to the list, by their first blocks; j are the blocks of all."""
    tl.store(list_ptr + _ranks(quads), tl.min(j, 2, keep_dims=True), mask=quads > 0)


@triton.jit
def _quarters(x):
    """The first, second, third and fourth of each quad, [lines, 32] each."""
    even, odd = tl.split(tl.reshape(x, [x.shape[0], 32, 2, 2]))
    x0, x2 = tl.split(even)
    x1, x3 = tl.split(odd)
    return x0, x1, x2, x3


@triton.jit
def _prune(
    score_ptr, list_ptr, filled, least, key_end, width, SIZE: tl.constexpr, STRIDE: tl.constexpr, BLOCK: tl.constexpr,
    INIT: tl.constexpr, LOCAL: tl.constexpr, POOLED: tl.constexpr, FREE: tl.constexpr, QUADS: tl.constexpr,
):  # fmt: skip
    """Keep the quads of the list that hold its FREE best blocks; returns what these reach, and the list's new end."""
    FIRST: tl.constexpr = (INIT + 3) // 4
    tl.debug_barrier()
    i = (tl.arange(0, QUADS // 32) * 32)[:, None] + tl.arange(0, 32)[None, :]
    # The hint sticks to a sum, not to what was loaded.
    first = tl.multiple_of(_read_quads(list_ptr, i, FIRST, filled) + 0, [4, 4])
    old = first[:, :, None] + tl.arange(0, 4)[None, None, :]
    old_bits = _importance(score_ptr, old, old >= 0, key_end, width, SIZE, STRIDE, BLOCK, INIT, LOCAL, POOLED)
    old_bits = tl.minimum(old_bits, LARGEST)
    least = _threshold(old_bits, tl.maximum(least, 0), FREE, 0)
    old_best, _ = _best(old_bits, least, FREE)
    kept = tl.max(old_best, 2, keep_dims=True)
    tl.debug_barrier()  # every thread has read the list
    _append(list_ptr + FIRST, kept, old)
    return least, FIRST + _count(kept)


@triton.jit
def _list_quads(
    score_ptr, list_ptr, blocks, quads_end, key_end, width, SIZE: tl.constexpr, STRIDE: tl.constexpr,
    BLOCK: tl.constexpr, INIT: tl.constexpr, LOCAL: tl.constexpr, POOLED: tl.constexpr, FREE: tl.constexpr,
    QUADS: tl.constexpr, SLACK: tl.constexpr,
):  # fmt: skip
    """List the quads up to `quads_end` that may hold one of the FREE best, chunk by chunk; `blocks` are the first's.

    Returns the list's end and a bound that FREE of its blocks reach; negative if none is known.
    """
    CHUNK: tl.constexpr = blocks.shape[0] * 128
    FIRST: tl.constexpr = (INIT + 3) // 4  # quads with an initial block, which are searched in any case
    groups = tl.full([1, 32, 4], -1, tl.int32)  # the largest of every 128th candidate, initial quads left out
    bound = 0  # FREE of the groups reach it, unless 0
    least = -1  # FREE blocks of the list reach it, unless negative: later ones must exceed it
    filled = FIRST
    for start in range(0, quads_end, CHUNK):
        j = start + blocks
        inside = (j >= 4 * FIRST) & (j < quads_end)
        bits = _importance(score_ptr, j, inside, key_end, width, SIZE, STRIDE, BLOCK, INIT, LOCAL, POOLED)
        groups = tl.maximum(groups, tl.minimum(tl.max(bits, 0, keep_dims=True), LARGEST))
        if FREE <= 32:  # cheap, and often close: each lane has a candidate that reaches the least of the lanes' largest
            bound = tl.maximum(bound, tl.min(tl.min(tl.max(groups, 2), 0), 0))
        if FREE <= 128:
            bound = _threshold(groups, bound, FREE, SLACK)
        tau = tl.maximum(bound, least + 1)
        quads = (tl.minimum(tl.max(bits, 2, keep_dims=True), LARGEST) >= tau).to(tl.int32)
        count = _count(quads)
        full = (bound > tl.maximum(least, 0)) | (count >= FREE)
        if filled + count >= QUADS:
            if filled > FIRST + FREE:  # keep the best of the list
                least, filled = _prune(
                    score_ptr, list_ptr, filled, least, key_end, width, SIZE, STRIDE, BLOCK, INIT, LOCAL, POOLED, FREE,
                    QUADS,
                )  # fmt: skip
                tau = tl.maximum(tau, least + 1)
            # Read again rather than held: this is rare, and registers are what limits the warps of a multiprocessor.
            bits = _importance(score_ptr, j, inside, key_end, width, SIZE, STRIDE, BLOCK, INIT, LOCAL, POOLED)
            bits = tl.minimum(bits, LARGEST)
            quads = (tl.max(bits, 2, keep_dims=True) >= tau).to(tl.int32)
            count = _count(quads)
            full = (bound > tl.maximum(least, 0)) | (count >= FREE)
            if filled + count >= QUADS:  # and the best of the chunk
                tau = _threshold(bits, tau, FREE, 0)
                best, _ = _best(bits, tau, FREE)
                quads = tl.max(best, 2, keep_dims=True)
                count = _count(quads)
        if count > 0:
            _append(list_ptr + filled, quads, j)
            filled += count
        least = tl.where(full, tau, least)
    tl.debug_barrier()
    return filled, least


@triton.jit
def _lanes_bound(bits, free_end, FREE: tl.constexpr, INIT: tl.constexpr):
    """A bound that FREE candidates of [lines, 32, 4] reach, or 0: the least of the lanes' largest, if lanes suffice."""
    lane = tl.arange(0, 32) * 4
    has_free = (lane < free_end) & (lane + 3 >= INIT)
    low = tl.min(tl.where(has_free, tl.max(tl.max(bits, 2), 0), LARGEST), 0)
    num_lanes = tl.minimum((free_end + 3) // 4, 32) - INIT // 4
    return tl.where(num_lanes >= FREE, tl.maximum(low, 0), 0)


@triton.jit
def _store_best(out_ptr, best, j, INIT: tl.constexpr):
    """Store the blocks j where `best` is 1, in order, behind the initial ones."""
    # In parts, as each thread holds them: a whole would first go through shared memory.
    target0, target1, target2, target3 = _quarters(INIT + _ranks(best))
    best0, best1, best2, best3 = _quarters(best)
    j0, j1, j2, j3 = _quarters(j)
    tl.store(out_ptr + target0, j0, mask=best0 > 0)
    tl.store(out_ptr + target1, j1, mask=best1 > 0)
    tl.store(out_ptr + target2, j2, mask=best2 > 0)
    tl.store(out_ptr + target3, j3, mask=best3 > 0)


@triton.jit
def _store_forced(
    out_ptr, own, live, num_best, COUNT: tl.constexpr, INIT: tl.constexpr, LOCAL: tl.constexpr, PADDED: tl.constexpr
):
    """Store the forced blocks around the best ones, and -1 behind the last; `own` is the token's block."""
    o = tl.arange(0, PADDED)
    num_local = tl.minimum(tl.maximum(own + 1 - INIT, 0), LOCAL)
    block = tl.where(o < INIT, o, o + (own + 1 - num_local - INIT - num_best))
    block = tl.where((block <= own) & live, block, -1)
    tl.store(out_ptr + o, block, mask=(o < COUNT) & ((o < INIT) | (o >= INIT + num_best)))


@triton.jit(do_not_specialize=["T", "q_start", "pair_start", "token_start", "num_tokens"])
def choice_kernel(
    score_ptr, list_ptr, out_ptr, doc_ptr, T, q_start, pair_start, token_start, num_tokens, width,
    HKV: tl.constexpr, SIZE: tl.constexpr, STRIDE: tl.constexpr, BLOCK: tl.constexpr, COUNT: tl.constexpr,
    INIT: tl.constexpr, LOCAL: tl.constexpr, PACKED: tl.constexpr, POOLED: tl.constexpr, PADDED: tl.constexpr,
    CHUNK: tl.constexpr, QUADS: tl.constexpr, SLACK: tl.constexpr,
):  # fmt: skip
    """The COUNT blocks of a token of a pair, ascending, then -1; rows that a CHUNK holds have no list (QUADS 0)."""
    FREE: tl.constexpr = COUNT - INIT - LOCAL  # blocks to choose among those that are not forced
    FIRST: tl.constexpr = (INIT + 3) // 4  # quads with an initial block
    t = token_start + tl.num_programs(0) - 1 - tl.program_id(0)  # the longest rows first
    pair = pair_start + tl.program_id(1)
    position = t + q_start
    live = True
    if PACKED:  # tokens of no document have no blocks
        position = t - tl.load(doc_ptr + t)
        live = position >= 0
    local_row = tl.program_id(1).to(tl.int64) * num_tokens + t - token_start
    score_ptr += local_row * width
    list_ptr += local_row * QUADS + 1  # not aligned: loads of two would put neighbours into one thread
    out_ptr += (((pair // HKV).to(tl.int64) * T + t) * HKV + pair % HKV) * COUNT
    four = tl.arange(0, 4)[None, None, :]
    blocks = (tl.arange(0, CHUNK // 128) * 128)[:, None, None] + (tl.arange(0, 32) * 4)[None, :, None] + four
    own = position // BLOCK
    key_end = tl.where(position >= SIZE - 1, (position - (SIZE - 1)) // STRIDE + 1, 0)
    free_end = tl.where(live, own + 1 - LOCAL, 0)
    num_best = 0
    if FREE > 0 and free_end > INIT:
        low = 0
        if QUADS == 0:  # all candidates at once
            j = blocks
            inside = j < (free_end + 3) // 4 * 4  # loads of four
            bits = _importance(score_ptr, j, inside, key_end, width, SIZE, STRIDE, BLOCK, INIT, LOCAL, POOLED)
        else:
            quads_end = free_end // 4 * 4
            filled, least = _list_quads(
                score_ptr, list_ptr, blocks, quads_end, key_end, width, SIZE, STRIDE, BLOCK, INIT, LOCAL, POOLED, FREE,
                QUADS, SLACK,
            )  # fmt: skip
            # The initial quads, the list and the last, which may have fewer than four free blocks.
            i = (tl.arange(0, QUADS // 32) * 32)[:, None] + tl.arange(0, 32)[None, :]
            first = tl.where(i < FIRST, 4 * i, _read_quads(list_ptr, i, FIRST, filled))
            first = tl.where((i == filled) & (quads_end >= 4 * FIRST), quads_end, first)
            j = tl.multiple_of(first, [4, 4])[:, :, None] + four
            bits = _importance(score_ptr, j, j >= 0, key_end, width, SIZE, STRIDE, BLOCK, INIT, LOCAL, POOLED)
            low = tl.maximum(least, 0)
        bits = tl.where((j >= INIT) & (j < free_end), tl.minimum(bits, LARGEST), -1)
        if QUADS == 0 and FREE <= 32:
            low = _lanes_bound(bits, free_end, FREE, INIT)
        best, num_best = _best(bits, _threshold(bits, low, FREE, 0), FREE)
        _store_best(out_ptr, best, j, INIT)
    _store_forced(out_ptr, own, live, num_best, COUNT, INIT, LOCAL, PADDED)


def select_blocks(
    q: Tensor, k_cmp: Tensor, lse: Tensor, geometry: BlockGeometry, layout: Layout | None, q_start: int, scale: float,
    plan: TopK,
) -> Tensor:  # fmt: skip
    """int32 `[B, T, Hkv, n]`, ascending, padded with -1 (Eq. 8-12), for fitting tensors."""
    B, T = q.shape[:2]
    N, Hkv, count, tile = k_cmp.shape[1], k_cmp.shape[2], geometry.num_selected_blocks, plan.choice.tile
    out = torch.empty(B, T, Hkv, count, dtype=torch.int32, device=q.device)
    if out.numel() == 0:
        return out
    width = row_width(N, geometry, plan.pooled)
    chunks = cut_chunks(B * Hkv, T, (width + tile["QUADS"]) * 4, 128, plan.choice.scratch_bytes)
    rows = max(chunk.num_pairs * chunk.num_tokens for chunk in chunks)
    values = torch.empty(rows * width + 4, dtype=torch.float32, device=q.device)  # the choice reads in fours
    lists = torch.empty(rows * tile["QUADS"] + 1, dtype=torch.int32, device=q.device)
    scores, write_scores = Scores(values, width, plan.pooled), scores_sm90 if plan.scores.is_sm90 else plain_scores
    lse = lse.float().contiguous()
    for chunk in chunks:
        if N:
            write_scores(q, k_cmp, lse, scores, geometry, layout, chunk, q_start, scale, plan.scores.tile)
        choice_kernel[(chunk.num_tokens, chunk.num_pairs)](
            values, lists, out, *document_pointers(layout, lists, "doc_start"), T, q_start, chunk.pair, chunk.token,
            chunk.num_tokens, width, HKV=Hkv, SIZE=geometry.compress_block_size, STRIDE=geometry.compress_stride,
            BLOCK=geometry.select_block_size, POOLED=plan.pooled, PACKED=layout is not None, COUNT=count,
            INIT=geometry.num_init_blocks, LOCAL=geometry.num_local_blocks, **tile,
        )  # fmt: skip
    return out
