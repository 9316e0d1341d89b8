"""Importance of the selection blocks and the choice of the best n; no score matrix outlives a chunk of tokens.

The score kernel holds the queries of TOKENS tokens as columns, head-major (column = head * TOKENS + token), so that the
sum over the heads of a group stays within a thread. For each compressed key it multiplies again, takes the probability
from the final log-sum-exp, and stores the group's sums: fp32 `[heads, tokens, width]` of a chunk, about SCRATCH_BYTES.
A row holds, where a block's keys fill part of a tile (POOLED), what each block's keys give to its own importance, and
then what they give to the next block's; in other geometries the sum of every key.
The choice kernel has one warp for each token and group. It adds these up to the blocks' importance (Eq. 9) and finds
the n-th largest by bisection on the bits of the scores, CHUNK candidates at a time merged into a running list of n. Any
length takes this one path, and ties go to the lower index because list and candidates stay in index order.

Shapes: q `[B, T, H, Dk]`, k_cmp `[B, N, Hkv, Dk]`, lse `[B, T, H]`, out int32 `[B, T, Hkv, n]`.
"""

# Kernels are typed by Triton, not by Python.
# pyright: reportArgumentType=false, reportCallIssue=false, reportAttributeAccessIssue=false, reportReturnType=false
# pyright: reportGeneralTypeIssues=false, reportPossiblyUnboundVariable=false
from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

from nsa.geometry import BlockGeometry
from nsa.ops.triton.common import (
    LOG2E,
    Layout,
    dot_precision,
    has_large_shared_memory,
    hopper_serves,
    key_tail,
    place_of_tile,
    scratch_of,
)
from nsa.ops.triton.dense_fwd import describe_keys
from nsa.ops.triton.hopper_score import hopper_score, tile_tokens
from nsa.ops.triton.invert import Chunk, cut_chunks

SCRATCH_BYTES = 2**31
CHOICE_REGISTERS = 72  # for a thread of the choice: 28 of its warps fit a multiprocessor, where 106 leave room for 18


def score_tile(q: Tensor, group_size: int, num_keys: int, large: bool) -> dict[str, int]:
    """Tile sizes: HEADS heads (a power of two) by TOKENS tokens of columns, BLOCK_N of `num_keys` keys a step."""
    heads = triton.next_power_of_2(group_size)
    if q.dtype == torch.float32:
        return {"HEADS": heads, "TOKENS": max(2, 32 // heads), "BLOCK_N": 16, "num_warps": 4, "num_stages": 1}
    if not large or q.shape[3] > 128:
        return {"HEADS": heads, "TOKENS": max(4, 64 // heads), "BLOCK_N": 64, "num_warps": 4, "num_stages": 1}
    stages = 2 if num_keys <= 4096 else 3  # three programs a multiprocessor, or deeper reads once L2 is short of room
    return {"HEADS": heads, "TOKENS": max(4, 128 // heads), "BLOCK_N": 64, "num_warps": 4, "num_stages": stages}


def hopper_scores(q: Tensor, group_size: int) -> bool:
    """Whether Hopper's own kernel scores these fitting queries."""
    return hopper_serves(q, q[..., :128]) and group_size <= 32


@triton.jit
def _score_step(
    mass_ptr, q, q_tail, k_desc, k_tail_desc, lse, column_end, key, row_start, column_k, scale_log2, token_row,
    live_token, width, TAIL: tl.constexpr, MAIN: tl.constexpr, MASKED: tl.constexpr, HEADS: tl.constexpr,
    TOKENS: tl.constexpr, BLOCK_N: tl.constexpr, SPAN: tl.constexpr, REACH: tl.constexpr, POOLED: tl.constexpr,
    PRECISION: tl.constexpr,
):  # fmt: skip
    """Store the group-summed probabilities of keys key .. key + BLOCK_N - 1, or what they give to the blocks."""
    k = k_desc.load([row_start + key, column_k])
    s = tl.dot(k, tl.trans(q), input_precision=PRECISION)
    if TAIL > 0:
        k = k_tail_desc.load([row_start + key, column_k + MAIN])
        s = tl.dot(k, tl.trans(q_tail), s, input_precision=PRECISION)
    p = tl.math.exp2(s * scale_log2 - lse[None, :])
    keys = key + tl.arange(0, BLOCK_N)
    if MASKED:
        p = tl.where(keys[:, None] < column_end[None, :], p, 0.0)
    mass = tl.sum(tl.reshape(p, [BLOCK_N, HEADS, TOKENS]), 1)
    if POOLED:
        BLOCKS: tl.constexpr = BLOCK_N // SPAN
        mass = tl.reshape(mass, [BLOCKS, SPAN, TOKENS])
        i = tl.arange(0, SPAN)[None, :, None]
        own = tl.sum(mass * tl.minimum(REACH, SPAN - i).to(tl.float32), 1)
        place = mass_ptr + token_row[None, :] * width + (key // SPAN + tl.arange(0, BLOCKS))[:, None]
        tl.store(place, own, mask=live_token[None, :])
        if REACH > 1:
            next_block = tl.sum(mass * tl.maximum(i + REACH - SPAN, 0).to(tl.float32), 1)
            tl.store(place + width // 2, next_block, mask=live_token[None, :])
    else:
        tl.store(mass_ptr + token_row[None, :] * width + keys[:, None], mass, mask=live_token[None, :])


@triton.jit(
    do_not_specialize=["T", "N", "q_start", "num_docs", "steps", "head_start", "token_start", "token_end", "first_tile"]
)
def score_kernel(
    q_ptr, k_desc, k_tail_desc, lse_ptr, mass_ptr, cu_ptr, cu_cmp_ptr, scale_log2, log2e,
    T, N, q_start, num_docs, steps, head_start, token_start, token_end, first_tile, width,
    H: tl.constexpr, HKV: tl.constexpr, DK: tl.constexpr, TAIL: tl.constexpr, SIZE: tl.constexpr,
    STRIDE: tl.constexpr, BLOCK: tl.constexpr, PACKED: tl.constexpr, POOLED: tl.constexpr, HEADS: tl.constexpr,
    TOKENS: tl.constexpr, BLOCK_N: tl.constexpr, PRECISION: tl.constexpr,
):  # fmt: skip
    G: tl.constexpr = H // HKV
    SPAN: tl.constexpr = BLOCK // STRIDE
    REACH: tl.constexpr = SIZE // STRIDE
    b = (head_start + tl.program_id(1)) // HKV
    group = (head_start + tl.program_id(1)) % HKV
    tile = first_tile + tl.num_programs(0) - 1 - tl.program_id(0)  # the heaviest first
    first_token, doc_start, doc_end, cmp_start = place_of_tile(
        tile, cu_ptr, cu_cmp_ptr, T, num_docs, steps, TOKENS, PACKED
    )
    last_token = tl.minimum(first_token + TOKENS, doc_end) - 1
    if (first_token < tl.minimum(doc_end, token_end)) & (last_token >= token_start):
        column = tl.arange(0, HEADS * TOKENS)
        head = column // TOKENS
        t = first_token + column % TOKENS
        live = (t < doc_end) & (head < G)
        row = (b.to(tl.int64) * T + tl.minimum(t, T - 1)) * H + group * G + tl.minimum(head, G - 1)
        MAIN: tl.constexpr = DK - TAIL
        q = tl.load(q_ptr + row[:, None] * DK + tl.arange(0, MAIN)[None, :], mask=live[:, None], other=0.0)
        q_tail = q
        if TAIL > 0:
            q_ptr += MAIN
            q_tail = tl.load(q_ptr + row[:, None] * DK + tl.arange(0, TAIL)[None, :], mask=live[:, None], other=0.0)
        lse = tl.where(live, tl.load(lse_ptr + row, mask=live, other=0.0) * log2e, float("inf"))
        past = t + q_start - doc_start - (SIZE - 1)
        column_end = tl.where(past >= 0, past // STRIDE + 1, 0)
        first_past = first_token + q_start - doc_start - (SIZE - 1)
        last_past = last_token + q_start - doc_start - (SIZE - 1)
        key_end = tl.minimum(tl.where(last_past >= 0, last_past // STRIDE + 1, 0), N - cmp_start)
        full_end = tl.minimum(tl.where(first_past >= 0, first_past // STRIDE + 1, 0), key_end) // BLOCK_N * BLOCK_N
        token = first_token + tl.arange(0, TOKENS)
        token_row = tl.program_id(1).to(tl.int64) * (token_end - token_start) + token - token_start
        live_token = (token >= token_start) & (token < tl.minimum(token_end, doc_end))
        for key in tl.range(0, full_end, BLOCK_N):
            _score_step(
                mass_ptr, q, q_tail, k_desc, k_tail_desc, lse, column_end, key, b * N + cmp_start, group * DK,
                scale_log2, token_row, live_token, width,
                TAIL, MAIN, False, HEADS, TOKENS, BLOCK_N, SPAN, REACH, POOLED, PRECISION,
            )  # fmt: skip
        for key in tl.range(full_end, key_end, BLOCK_N):
            _score_step(
                mass_ptr, q, q_tail, k_desc, k_tail_desc, lse, column_end, key, b * N + cmp_start, group * DK,
                scale_log2, token_row, live_token, width,
                TAIL, MAIN, True, HEADS, TOKENS, BLOCK_N, SPAN, REACH, POOLED, PRECISION,
            )  # fmt: skip


@triton.jit
def _threshold(bits, low, COUNT: tl.constexpr):
    """A bound that the COUNT largest non-negative int32 keys reach and, ties aside, no others; 0 if there are fewer.

    `low` is a bound that at least COUNT reach, or 0. The search lies between it and the largest key that is not forced:
    most scores share their exponent, which need not be found again.
    """
    high = tl.max(tl.where(bits < 0x7F800000, bits, 0), 0) + 1
    high = tl.where(tl.sum((bits >= 0).to(tl.int32), 0) <= COUNT, 1, high)
    while high - low > 1:
        middle = low + (high - low) // 2
        reached = tl.sum((bits >= middle).to(tl.int32), 0)
        low = tl.where(reached >= COUNT, middle, low)
        high = tl.where(reached > COUNT, high, middle)  # exactly these: no need to look closer
    return low


@triton.jit(do_not_specialize=["T", "N", "q_start", "head_start", "token_start", "num_tokens"])
def choice_kernel(
    mass_ptr, list_ptr, out_ptr, doc_ptr, doc_end_ptr, T, N, q_start, head_start, token_start, num_tokens, width,
    HKV: tl.constexpr, SIZE: tl.constexpr, STRIDE: tl.constexpr, BLOCK: tl.constexpr, COUNT: tl.constexpr,
    INIT: tl.constexpr, LOCAL: tl.constexpr, PACKED: tl.constexpr, POOLED: tl.constexpr, PADDED: tl.constexpr,
    CHUNK: tl.constexpr,
):  # fmt: skip
    SPAN: tl.constexpr = BLOCK // STRIDE
    REACH: tl.constexpr = SIZE // STRIDE
    t = token_start + tl.num_programs(0) - 1 - tl.program_id(0)
    head = head_start + tl.program_id(1)
    position = t + q_start
    live = True
    if PACKED:
        position = t - tl.load(doc_ptr + t)
        live = position >= 0
    local_row = tl.program_id(1).to(tl.int64) * num_tokens + t - token_start
    mass_ptr += local_row * width
    list_ptr += local_row * (2 * PADDED)
    out_ptr += (((head // HKV).to(tl.int64) * T + t) * HKV + head % HKV) * COUNT
    c = tl.arange(0, CHUNK)
    own = position // BLOCK
    key_end = tl.where(position >= SIZE - 1, (position - (SIZE - 1)) // STRIDE + 1, 0)
    if live:
        for start in range(0, own + 1, CHUNK - PADDED):
            # The first PADDED candidates are the running list, the others the next blocks.
            j = start + c - PADDED
            fresh = (c >= PADDED) & (j <= own)
            score = tl.zeros([CHUNK], tl.float32)
            if POOLED:  # blocks are written up to the last that has a visible key
                score = tl.load(mass_ptr + j, mask=fresh & (j * SPAN < key_end), other=0.0)
                if REACH > 1:
                    before = fresh & (j > 0) & ((j - 1) * SPAN < key_end)
                    score += tl.load(mass_ptr + width // 2 + j - 1, mask=before, other=0.0)
            else:
                for offset in tl.static_range(SPAN + REACH - 1):
                    i = offset + 1 - REACH
                    weight = tl.minimum(i + REACH, SPAN) - tl.maximum(i, 0)  # overlap(i, j) / d, Eq. 9
                    key = j * SPAN + i
                    score += weight * tl.load(mass_ptr + key, mask=fresh & (key >= 0) & (key < key_end), other=0.0)
            bits = tl.minimum(score.to(tl.int32, bitcast=True), 0x7F7FFFFF)
            bits = tl.where((j < INIT) | (j > own - LOCAL), 0x7F800000, bits)  # forced
            listed = (c < PADDED) & (start > 0)
            old = tl.load(list_ptr + c, mask=listed, other=-1)
            bits = tl.where(c < PADDED, old, tl.where(fresh, bits, -1))
            block = tl.where(c < PADDED, tl.load(list_ptr + PADDED + c, mask=listed, other=-1), j)

            # A full list reaches its least; as many candidates as there are groups reach the least of their largest.
            if (start == 0) & (PADDED % (CHUNK // 32) == 0) & (COUNT <= 32 - 32 * PADDED // CHUNK):
                groups = tl.reshape(tl.where(c < PADDED, 0x7FFFFFFF, bits), [32, CHUNK // 32])
                least = tl.min(tl.max(groups, 1), 0)
            else:
                least = tl.min(tl.where(c < COUNT, old, 0x7FFFFFFF), 0)
            threshold = _threshold(bits, tl.maximum(least, 0), COUNT)
            above = (bits > threshold).to(tl.int32)
            tied = (bits == threshold).to(tl.int32)
            # Numbers of those above and, in the upper half, of those equal, up to each candidate.
            ranks = tl.cumsum(above + tied * 65536, 0)
            num_above = tl.sum(above, 0)
            room = COUNT - num_above
            chosen = (above > 0) | ((tied > 0) & ((ranks >> 16) <= room))
            place = (ranks & 65535) + tl.minimum(ranks >> 16, room) - 1
            rest = c >= num_above + tl.minimum(tl.sum(tied, 0), room)
            if start + CHUNK - PADDED > own:
                tl.store(out_ptr + place, block, mask=chosen)
                tl.store(out_ptr + c, tl.full([CHUNK], -1, tl.int32), mask=rest & (c < COUNT))
            else:
                tl.debug_barrier()  # every thread has read the list
                tl.store(list_ptr + place, bits, mask=chosen)
                tl.store(list_ptr + PADDED + place, block, mask=chosen)
                tl.store(list_ptr + c, tl.full([CHUNK], -1, tl.int32), mask=rest & (c < PADDED))
                tl.debug_barrier()
    else:
        tl.store(out_ptr + c, tl.full([CHUNK], -1, tl.int32), mask=c < COUNT)


def select_blocks(
    q: Tensor, k_cmp: Tensor, lse: Tensor, geometry: BlockGeometry, layout: Layout | None, q_start: int, scale: float,
    tile: dict[str, int] | None = None, scratch_bytes: int = SCRATCH_BYTES, max_chunk: int | None = None,
) -> Tensor:  # fmt: skip
    """int32 `[B, T, Hkv, n]`, ascending, padded with -1 (Eq. 8-12), for fitting tensors."""
    B, T, H, Dk = q.shape
    N, Hkv, count = k_cmp.shape[1], k_cmp.shape[2], geometry.num_selected_blocks
    out = torch.empty(B, T, Hkv, count, dtype=torch.int32, device=q.device)
    if out.numel() == 0:
        return out
    hopper = tile is None and hopper_scores(q, H // Hkv)
    tile = tile or score_tile(q, H // Hkv, N, has_large_shared_memory(q))
    tile_of_tokens = tile_tokens(H // Hkv) if hopper else tile["TOKENS"]
    span, reach = (
        geometry.select_block_size // geometry.compress_stride,
        geometry.compress_block_size // geometry.compress_stride,
    )
    pooled = tile["BLOCK_N"] % span == 0 and span & (span - 1) == 0 and reach <= span + 1
    width = triton.cdiv(max(N, 1), 128) * 128
    if pooled:
        width = width // span * (1 if reach == 1 else 2)
    padded = max(16, triton.next_power_of_2(count))
    num_blocks = geometry.num_select_blocks(q_start + T)
    max_chunk = max_chunk or (128 if num_blocks <= 1024 else 256)
    candidates = min(max(max_chunk, 2 * padded), max(2 * padded, triton.next_power_of_2(padded + num_blocks)))
    chunks = cut_chunks(B * Hkv, T, width * 4, 128, scratch_of(q, scratch_bytes))
    rows = max((c.head_end - c.head) * (c.token_end - c.token) for c in chunks)
    mass = torch.empty(rows, width, dtype=torch.float32, device=q.device)
    lists = torch.empty(rows, 2, padded, dtype=torch.int32, device=q.device)
    lse = lse.float().contiguous()
    shape = {"HKV": Hkv, "SIZE": geometry.compress_block_size, "STRIDE": geometry.compress_stride,
             "BLOCK": geometry.select_block_size, "POOLED": pooled, "PACKED": layout is not None}  # fmt: skip
    bounds = (lists, lists) if layout is None else (layout.cu_seqlens, layout.cu_compressed)
    documents = (lists, lists) if layout is None else (layout.doc_start, layout.doc_end)
    num_docs = 0 if layout is None else layout.cu_seqlens.numel() - 1
    for chunk in chunks:
        heads, tokens = chunk.head_end - chunk.head, chunk.token_end - chunk.token
        first_tile, num_tiles = _tiles(chunk, tile_of_tokens, num_docs)
        if N and hopper:
            hopper_score(
                q, k_cmp, lse, mass, bounds, geometry, chunk, first_tile, num_tiles, num_docs, q_start, scale, width,
                layout is not None, pooled,
            )  # fmt: skip
        elif N:
            score_kernel[(num_tiles, heads)](
                q, *describe_keys(k_cmp, tile["BLOCK_N"]), lse, mass, *bounds, scale * LOG2E, LOG2E, T, N, q_start,
                num_docs, (num_docs + 1).bit_length(), chunk.head, chunk.token, chunk.token_end, first_tile, width,
                H=H, DK=Dk, TAIL=key_tail(Dk), PRECISION=dot_precision(q), **shape, **tile,
            )  # fmt: skip
        choice_kernel[(tokens, heads)](
            mass, lists, out, *documents, T, N, q_start, chunk.head, chunk.token, tokens, width,
            COUNT=count, INIT=geometry.num_init_blocks, LOCAL=geometry.num_local_blocks, PADDED=padded,
            CHUNK=candidates, num_warps=1, maxnreg=CHOICE_REGISTERS, **shape,
        )  # fmt: skip
    return out


def _tiles(chunk: Chunk, tokens: int, num_docs: int) -> tuple[int, int]:
    """First number and count of the tiles that may hold tokens of a chunk; each document before one shifts them."""
    first = chunk.token // tokens
    return first, triton.cdiv(chunk.token_end, tokens) - first + num_docs
