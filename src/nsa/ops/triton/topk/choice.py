"""Importance of the selection blocks and the choice of the best n; no score matrix outlives a chunk of tokens.

The score kernel holds the queries of TOKENS tokens as columns, head-major (column = head * TOKENS + token), so that the
sum over the heads of a group stays within a thread. For each compressed key it multiplies again, takes the probability
from the final log-sum-exp, and stores the group's sums: fp32 `[heads, tokens, width]` of a chunk, about 2 GiB.
A row holds, where a block's keys fill part of a tile (POOLED), what each block's keys give to its own importance, and
then what they give to the next block's; in other geometries the sum of every key.
The choice kernel has one warp for each token and group. It adds these up to the blocks' importance (Eq. 9) and finds
the n-th largest by bisection on the bits of the scores. Initial and local blocks are left out and written as they are.
Rows of few blocks are searched whole. Of others it takes CHUNK candidates at a time and lists the quads (four
neighbours, one load) that reach a bound: a value that n of the largest of 128 groups of candidates reach. It is near
the n-th largest, so that the exact search runs on a short list instead of all candidates. Where more reach it than the
list holds (ties, rising scores), the best n of the list, then of the chunk, are found exactly. Any length takes this
path, and ties go to the lower index because list and candidates stay in index order.

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


@triton.jit
def _importance(
    mass_ptr, j, live, key_end, width, SIZE: tl.constexpr, STRIDE: tl.constexpr, BLOCK: tl.constexpr,
    INIT: tl.constexpr, LOCAL: tl.constexpr, POOLED: tl.constexpr,
):  # fmt: skip
    """Bits of the importance of blocks j, -1 where not `live`; anything for initial and local blocks."""
    SPAN: tl.constexpr = BLOCK // STRIDE
    REACH: tl.constexpr = SIZE // STRIDE
    WRITTEN: tl.constexpr = SIZE <= LOCAL * BLOCK + 1  # a block that is not local has a visible key
    if POOLED:  # blocks are written up to the last that has a visible key, the one before it has one in any case
        own = live if WRITTEN else live & (j * SPAN < key_end)
        score = tl.load(mass_ptr + j, mask=own, other=0.0)
        if REACH > 1:
            before = live & (j > 0) if INIT == 0 else live
            score += tl.load(mass_ptr + (width // 2 - 1) + j, mask=before, other=0.0)
    else:
        score = tl.zeros(j.shape, tl.float32)
        for offset in tl.static_range(SPAN + REACH - 1):
            i = offset + 1 - REACH
            weight = tl.minimum(i + REACH, SPAN) - tl.maximum(i, 0)  # overlap(i, j) / d, Eq. 9
            key = j * SPAN + i
            score += weight * tl.load(mass_ptr + key, mask=live & (key >= 0) & (key < key_end), other=0.0)
    return tl.where(live, score.to(tl.int32, bitcast=True), -1)


@triton.jit
def _count(ones):
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
def _places(ones):
    """How many of the ones [rows, 32, few] come before each."""
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
    places = before[:, :, None]
    if ones.shape[2] > 1:
        places += tl.cumsum(ones, 2) - ones
    return places


@triton.jit
def _best(bits, threshold, COUNT: tl.constexpr):
    """Ones for the COUNT largest, ties to the first, and their number. `threshold` is that of COUNT without slack."""
    best = (bits >= threshold).to(tl.int32)
    count = _count(best)
    if count > COUNT:
        tied = (bits == threshold).to(tl.int32)
        best = tl.where(_places(tied) < COUNT - count + _count(tied), best, best - tied)
        count = COUNT
    return best, count


@triton.jit
def _read_quads(list_ptr, i, begin, filled):
    return tl.load(list_ptr + i, mask=(i >= begin) & (i < filled), other=-4)


@triton.jit
def _append(list_ptr, quads, j):
    """Add the quads [rows, 32, 1] that are 1 to the list; j are the blocks of all."""
    tl.store(list_ptr + _places(quads), tl.min(j, 2, keep_dims=True), mask=quads > 0)


@triton.jit
def _quarters(x):
    even, odd = tl.split(tl.reshape(x, [x.shape[0], 32, 2, 2]))
    x0, x2 = tl.split(even)
    x1, x3 = tl.split(odd)
    return x0, x1, x2, x3


@triton.jit(do_not_specialize=["T", "q_start", "head_start", "token_start", "num_tokens"])
def choice_kernel(
    mass_ptr, list_ptr, out_ptr, doc_ptr, T, q_start, head_start, token_start, num_tokens, width,
    HKV: tl.constexpr, SIZE: tl.constexpr, STRIDE: tl.constexpr, BLOCK: tl.constexpr, COUNT: tl.constexpr,
    INIT: tl.constexpr, LOCAL: tl.constexpr, PACKED: tl.constexpr, POOLED: tl.constexpr, PADDED: tl.constexpr,
    CHUNK: tl.constexpr, QUADS: tl.constexpr, SLACK: tl.constexpr,
):  # fmt: skip
    FREE: tl.constexpr = COUNT - INIT - LOCAL  # blocks to choose among those that are not forced
    FIRST: tl.constexpr = (INIT + 3) // 4  # quads with an initial block
    LARGEST: tl.constexpr = 0x7F7FFFFF  # infinite scores tie
    t = token_start + tl.num_programs(0) - 1 - tl.program_id(0)
    head = head_start + tl.program_id(1)
    position = t + q_start
    live = True
    if PACKED:
        position = t - tl.load(doc_ptr + t)
        live = position >= 0
    local_row = tl.program_id(1).to(tl.int64) * num_tokens + t - token_start
    mass_ptr += local_row * width
    list_ptr += local_row * QUADS + 1  # not aligned: loads of two would put neighbours into one thread
    out_ptr += (((head // HKV).to(tl.int64) * T + t) * HKV + head % HKV) * COUNT
    four = tl.arange(0, 4)[None, None, :]
    c = (tl.arange(0, CHUNK // 128) * 128)[:, None, None] + (tl.arange(0, 32) * 4)[None, :, None] + four
    own = position // BLOCK
    key_end = tl.where(position >= SIZE - 1, (position - (SIZE - 1)) // STRIDE + 1, 0)
    free_end = tl.where(live, own + 1 - LOCAL, 0)
    num_best = 0
    if FREE > 0 and free_end > INIT:
        low = 0
        if QUADS == 0:  # all candidates at once
            j = c
            inside = j < (free_end + 3) // 4 * 4  # loads of four
            bits = _importance(mass_ptr, j, inside, key_end, width, SIZE, STRIDE, BLOCK, INIT, LOCAL, POOLED)
        else:
            quads_end = free_end // 4 * 4
            groups = tl.full([1, 32, 4], -1, tl.int32)  # the largest of every 128th candidate, initial quads left out
            bound = 0  # FREE of the groups reach it, unless 0
            least = -1  # FREE blocks of the list reach it, unless negative: later ones must exceed it
            filled = FIRST
            for start in range(0, quads_end, CHUNK):
                j = start + c
                inside = (j >= 4 * FIRST) & (j < quads_end)
                bits = _importance(mass_ptr, j, inside, key_end, width, SIZE, STRIDE, BLOCK, INIT, LOCAL, POOLED)
                groups = tl.maximum(groups, tl.minimum(tl.max(bits, 0, keep_dims=True), LARGEST))
                if FREE <= 32:
                    bound = tl.maximum(bound, tl.min(tl.min(tl.max(groups, 2), 0), 0))
                if FREE <= 128:
                    bound = _threshold(groups, bound, FREE, SLACK)
                tau = tl.maximum(bound, least + 1)
                quads = (tl.minimum(tl.max(bits, 2, keep_dims=True), LARGEST) >= tau).to(tl.int32)
                count = _count(quads)
                full = (bound > tl.maximum(least, 0)) | (count >= FREE)
                if filled + count >= QUADS:
                    if filled > FIRST + FREE:  # keep the best of the list
                        tl.debug_barrier()
                        i = (tl.arange(0, QUADS // 32) * 32)[:, None] + tl.arange(0, 32)[None, :]
                        # The hint sticks to a sum, not to what was loaded.
                        first = tl.multiple_of(_read_quads(list_ptr, i, FIRST, filled) + 0, [4, 4])
                        old = first[:, :, None] + four
                        old_bits = _importance(
                            mass_ptr, old, old >= 0, key_end, width, SIZE, STRIDE, BLOCK, INIT, LOCAL, POOLED
                        )
                        old_bits = tl.minimum(old_bits, LARGEST)
                        least = _threshold(old_bits, tl.maximum(least, 0), FREE, 0)
                        old_best, _ = _best(old_bits, least, FREE)
                        kept = tl.max(old_best, 2, keep_dims=True)
                        tl.debug_barrier()  # every thread has read the list
                        _append(list_ptr + FIRST, kept, old)
                        filled = FIRST + _count(kept)
                        tau = tl.maximum(tau, least + 1)
                    bits = _importance(mass_ptr, j, inside, key_end, width, SIZE, STRIDE, BLOCK, INIT, LOCAL, POOLED)
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
            # The initial quads, the list and the last, which may have fewer than four free blocks.
            i = (tl.arange(0, QUADS // 32) * 32)[:, None] + tl.arange(0, 32)[None, :]
            first = tl.where(i < FIRST, 4 * i, _read_quads(list_ptr, i, FIRST, filled))
            first = tl.where((i == filled) & (quads_end >= 4 * FIRST), quads_end, first)
            j = tl.multiple_of(first, [4, 4])[:, :, None] + four
            bits = _importance(mass_ptr, j, j >= 0, key_end, width, SIZE, STRIDE, BLOCK, INIT, LOCAL, POOLED)
            low = tl.maximum(least, 0)
        bits = tl.where((j >= INIT) & (j < free_end), tl.minimum(bits, LARGEST), -1)
        if QUADS == 0 and FREE <= 32:  # as many lanes as have candidates reach the least of their largest
            lane = tl.arange(0, 32) * 4
            has_free = (lane < free_end) & (lane + 3 >= INIT)
            low = tl.min(tl.where(has_free, tl.max(tl.max(bits, 2), 0), LARGEST), 0)
            num_lanes = tl.minimum((free_end + 3) // 4, 32) - INIT // 4
            low = tl.where(num_lanes >= FREE, tl.maximum(low, 0), 0)
        best, num_best = _best(bits, _threshold(bits, low, FREE, 0), FREE)
        # Stored in parts, as each thread holds them: a whole would first go through shared memory.
        place0, place1, place2, place3 = _quarters(INIT + _places(best))
        best0, best1, best2, best3 = _quarters(best)
        j0, j1, j2, j3 = _quarters(j)
        tl.store(out_ptr + place0, j0, mask=best0 > 0)
        tl.store(out_ptr + place1, j1, mask=best1 > 0)
        tl.store(out_ptr + place2, j2, mask=best2 > 0)
        tl.store(out_ptr + place3, j3, mask=best3 > 0)
    o = tl.arange(0, PADDED)
    num_local = tl.minimum(tl.maximum(own + 1 - INIT, 0), LOCAL)
    block = tl.where(o < INIT, o, o + (own + 1 - num_local - INIT - num_best))
    block = tl.where((block <= own) & live, block, -1)
    tl.store(out_ptr + o, block, mask=(o < COUNT) & ((o < INIT) | (o >= INIT + num_best)))


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
    mass = torch.empty(rows * width + 4, dtype=torch.float32, device=q.device)  # the choice reads in fours
    lists = torch.empty(rows * tile["QUADS"] + 1, dtype=torch.int32, device=q.device)
    scores, write_scores = Scores(mass, width, plan.pooled), scores_sm90 if plan.scores.is_sm90 else plain_scores
    lse = lse.float().contiguous()
    for chunk in chunks:
        if N:
            write_scores(q, k_cmp, lse, scores, geometry, layout, chunk, q_start, scale, plan.scores.tile)
        choice_kernel[(chunk.num_tokens, chunk.num_pairs)](
            mass, lists, out, *document_pointers(layout, lists, "doc_start"), T, q_start, chunk.pair, chunk.token,
            chunk.num_tokens, width, HKV=Hkv, SIZE=geometry.compress_block_size, STRIDE=geometry.compress_stride,
            BLOCK=geometry.select_block_size, POOLED=plan.pooled, PACKED=layout is not None, COUNT=count,
            INIT=geometry.num_init_blocks, LOCAL=geometry.num_local_blocks, **tile,
        )  # fmt: skip
    return out
