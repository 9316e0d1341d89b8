"""Importance of the selection blocks and the choice of the best n, in one kernel; no score matrix is ever stored.

A persistent program holds the queries of TOKENS tokens as columns, head-major (column = head * TOKENS + token), so that
the sum over the heads of a group stays within a thread. It walks the compressed keys in chunks: products again with the
final log-sum-exp, group sum, the Eq. 9 stencil over the chunk's sums (a scratch of some KiB for each program, which
stays in the L2 cache), then a threshold search on the bits of the scores that merges the chunk into a running list of
n. Any length takes this one path, and ties go to the lower index because list and chunk stay in index order.

Shapes: q `[B, T, H, Dk]`, k_cmp `[B, N, Hkv, Dk]`, lse `[B, T, H]`, out int32 `[B, T, Hkv, n]`.
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor
from triton.tools.tensor_descriptor import TensorDescriptor

from nsa.geometry import BlockGeometry
from nsa.ops.triton.common import (
    LOG2E,
    Layout,
    dot_precision,
    has_large_shared_memory,
    num_multiprocessors,
)
from nsa.ops.triton.dense_fwd import describe


def score_tile(q: Tensor, group_size: int, large: bool) -> dict[str, int]:
    """Tile sizes: HEADS heads (a power of two) by TOKENS tokens of columns, BLOCK_N keys a step."""
    heads = triton.next_power_of_2(group_size)
    if q.dtype == torch.float32:
        return {"HEADS": heads, "TOKENS": max(2, 32 // heads), "BLOCK_N": 16, "num_warps": 4, "num_stages": 1}
    if not large or q.shape[3] > 128:
        return {"HEADS": heads, "TOKENS": max(4, 64 // heads), "BLOCK_N": 64, "num_warps": 4, "num_stages": 1}
    return {"HEADS": heads, "TOKENS": max(4, 128 // heads), "BLOCK_N": 64, "num_warps": 4, "num_stages": 3}


@triton.jit
def _score_step(
    scores_ptr, q, k_desc, lse, column_end, key, chunk_key, row_start, column_k, scale_log2,
    MASKED: tl.constexpr, HEADS: tl.constexpr, TOKENS: tl.constexpr, BLOCK_N: tl.constexpr, CHUNK_KEYS: tl.constexpr,
    PRECISION: tl.constexpr,
):  # fmt: skip
    """Store the group-summed probabilities of keys key .. key + BLOCK_N - 1, at their place after `chunk_key`."""
    k = k_desc.load([row_start + key, column_k])
    s = tl.dot(k, tl.trans(q), input_precision=PRECISION)
    p = tl.math.exp2(s * scale_log2 - lse[None, :])
    keys = key + tl.arange(0, BLOCK_N)
    if MASKED:
        p = tl.where((keys >= 0)[:, None] & (keys[:, None] < column_end[None, :]), p, 0.0)
    mass = tl.sum(tl.reshape(p, [BLOCK_N, HEADS, TOKENS]), 1)
    tl.store(scores_ptr + tl.arange(0, TOKENS)[None, :] * CHUNK_KEYS + (keys - chunk_key)[:, None], mass)


@triton.jit
def _count(x):
    """Sum of [ROWS, SUB, LANES] for each of the SUB tokens, [1, SUB, 1]: one layout throughout."""
    return tl.sum(tl.sum(x, 0, keep_dims=True), 2, keep_dims=True)


@triton.jit
def _threshold(bits, COUNT: tl.constexpr):
    """The COUNT-th largest of each token's non-negative int32 keys (0 if there are fewer; -1 is no key).

    Two bits a pass; the three counts of a pass share one int32, so a token has less than 1024 keys.
    """
    threshold = tl.where(_count((bits >= (1 << 30)).to(tl.int32)) >= COUNT, 1 << 30, 0)
    for i in range(15):
        step = 1 << (28 - 2 * i)
        one = (bits >= threshold + step).to(tl.int32)
        two = (bits >= threshold + 2 * step).to(tl.int32)
        three = (bits >= threshold + 3 * step).to(tl.int32)
        counts = _count(one + two * 1024 + three * 1048576)
        digit = ((counts & 1023) >= COUNT).to(tl.int32) + (((counts >> 10) & 1023) >= COUNT).to(tl.int32)
        threshold += step * (digit + ((counts >> 20) >= COUNT).to(tl.int32))
    return threshold


@triton.jit
def _merge(
    out_ptr, scores_ptr, list_ptr, start_block, end_block, written, own, live, token, last,
    COUNT: tl.constexpr, INIT: tl.constexpr, LOCAL: tl.constexpr, SPAN: tl.constexpr, REACH: tl.constexpr,
    PADDED: tl.constexpr, CHUNK: tl.constexpr, CHUNK_KEYS: tl.constexpr, SUB: tl.constexpr,
):  # fmt: skip
    """Choose the best COUNT of the running list and of the blocks start_block .. end_block - 1, for SUB tokens.

    Candidates are [CHUNK / 32, SUB, 32]: a warp holds whole tokens, so that no sum crosses warps. The list holds pairs
    (bits, block) for the same reason: single words are not contiguous, so the compiler gives all accesses one layout.
    """
    LANES: tl.constexpr = 32
    ROWS: tl.constexpr = CHUNK // LANES
    c = (tl.arange(0, ROWS) * LANES)[:, None, None] + tl.arange(0, LANES)[None, None, :]
    token = token[None, :, None]
    own = own[None, :, None]
    live = live[None, :, None]
    j = start_block + c - PADDED
    fresh = (c >= PADDED) & (j < end_block)
    score = tl.zeros([ROWS, SUB, LANES], tl.float32)
    for offset in tl.static_range(SPAN + REACH - 1):
        i = offset + 1 - REACH
        weight = tl.minimum(i + REACH, SPAN) - tl.maximum(i, 0)  # overlap(i, j) / d, Eq. 9
        key = (c - PADDED) * SPAN + offset
        mass = tl.load(scores_ptr + token * CHUNK_KEYS + key, mask=fresh & (key < written) & (token >= 0), other=0.0)
        score += weight * mass
    bits = tl.minimum(score.to(tl.int32, bitcast=True), 0x7F7FFFFF)
    bits = tl.where((j < INIT) | (j > own - LOCAL), 0x7F800000, bits)  # forced
    bits = tl.where(fresh & (j <= own), bits, -1)
    listed = (c < PADDED) & (start_block > 0) & (token >= 0)
    entry = list_ptr + (token * PADDED + c) * 2
    bits = tl.where(c < PADDED, tl.load(entry, mask=listed, other=-1), bits)
    block = tl.where(c < PADDED, tl.load(entry + 1, mask=listed, other=-1), j)

    threshold = _threshold(bits, COUNT)
    above = (bits > threshold).to(tl.int32)
    # Numbers of those above and, in the upper half, of those equal, up to each candidate in the order of blocks.
    mark = above + (bits == threshold).to(tl.int32) * 65536
    row_marks = tl.sum(mark, 2, keep_dims=True)
    before = tl.cumsum(mark, 2) + tl.cumsum(row_marks, 0) - row_marks
    marks = tl.sum(row_marks, 0, keep_dims=True)
    room = COUNT - (marks & 65535)
    chosen = (above > 0) | ((bits == threshold) & ((before >> 16) <= room))
    place = (before & 65535) + tl.minimum(before >> 16, room) - 1
    rest = c >= (marks & 65535) + tl.minimum(marks >> 16, room)
    free = c + tl.minimum(before, 0)  # c, in a form that the compiler does not know to be contiguous
    none = tl.full([ROWS, SUB, LANES], -1, tl.int32)
    tl.debug_barrier()  # every thread has read the list
    if last:
        target = out_ptr[None, :, None]
        tl.store(target + place, block, mask=chosen & live)
        tl.store(target + free, none, mask=rest & live & (c < COUNT))
    else:
        target = list_ptr + token * PADDED * 2
        tl.store(target + 2 * place, bits, mask=chosen)
        tl.store(target + 2 * place + 1, block, mask=chosen)
        tl.store(target + 2 * free, none, mask=rest & (c < PADDED))


@triton.jit(do_not_specialize=["T", "N", "q_start", "num_docs", "steps", "num_tiles", "tiles_each"])
def score_topk_kernel(
    q_ptr, k_desc, lse_ptr, out_ptr, scores_ptr, list_ptr, cu_ptr, cu_cmp_ptr, scale_log2, log2e,
    T, N, q_start, num_docs, steps, num_tiles, tiles_each,
    H: tl.constexpr, HKV: tl.constexpr, DK: tl.constexpr, SIZE: tl.constexpr, STRIDE: tl.constexpr, BLOCK: tl.constexpr,
    COUNT: tl.constexpr, INIT: tl.constexpr, LOCAL: tl.constexpr, PACKED: tl.constexpr,
    HEADS: tl.constexpr, TOKENS: tl.constexpr, SUB: tl.constexpr, BLOCK_N: tl.constexpr, PADDED: tl.constexpr,
    CHUNK: tl.constexpr, CHUNK_BLOCKS: tl.constexpr, CHUNK_KEYS: tl.constexpr, PRECISION: tl.constexpr,
):  # fmt: skip
    G: tl.constexpr = H // HKV
    SPAN: tl.constexpr = BLOCK // STRIDE
    REACH: tl.constexpr = SIZE // STRIDE
    scores_ptr += tl.program_id(0).to(tl.int64) * CHUNK_KEYS * TOKENS
    list_ptr += tl.program_id(0).to(tl.int64) * 2 * TOKENS * PADDED
    column = tl.arange(0, HEADS * TOKENS)
    head = column // TOKENS
    for work in range(tl.program_id(0), num_tiles, tl.num_programs(0)):
        b = (work // tiles_each) // HKV
        group = (work // tiles_each) % HKV
        tile = tiles_each - 1 - work % tiles_each  # the heaviest first
        doc_start, doc_end, cmp_start = 0, T, 0
        first_token = tile * TOKENS
        if PACKED:
            # Tiles of a document are numbered from start // TOKENS + document: no two share a number.
            low, high = 0, num_docs
            for _ in range(steps):
                middle = (low + high) // 2
                below = (tl.load(cu_ptr + middle) // TOKENS + middle <= tile) & (middle < num_docs)
                low = tl.where(below, middle, low)
                high = tl.where(below, high, middle)
            doc_start = tl.load(cu_ptr + low)
            doc_end = tl.minimum(tl.load(cu_ptr + low + 1), T)
            cmp_start = tl.load(cu_cmp_ptr + low)
            first_token = doc_start + (tile - doc_start // TOKENS - low) * TOKENS
        if first_token < doc_end:
            t = first_token + column % TOKENS
            live = (t < doc_end) & (head < G)
            row = (b.to(tl.int64) * T + tl.minimum(t, T - 1)) * H + group * G + tl.minimum(head, G - 1)
            q = tl.load(q_ptr + row[:, None] * DK + tl.arange(0, DK)[None, :], mask=live[:, None], other=0.0)
            lse = tl.where(live, tl.load(lse_ptr + row, mask=live, other=0.0) * log2e, float("inf"))
            first_past = first_token + q_start - doc_start - (SIZE - 1)
            last_token = tl.minimum(first_token + TOKENS, doc_end) - 1
            last_position = last_token + q_start - doc_start
            past = t + q_start - doc_start - (SIZE - 1)
            column_end = tl.where(past >= 0, past // STRIDE + 1, 0)
            least_end = tl.where(first_past >= 0, first_past // STRIDE + 1, 0)
            key_end = tl.where(last_position >= SIZE - 1, (last_position - (SIZE - 1)) // STRIDE + 1, 0)
            key_end = tl.minimum(key_end, N - cmp_start)
            num_blocks = last_position // BLOCK + 1
            for start_block in range(0, num_blocks, CHUNK_BLOCKS):
                end_block = tl.minimum(start_block + CHUNK_BLOCKS, num_blocks)
                chunk_key = start_block * SPAN + 1 - REACH
                chunk_end = tl.minimum(end_block * SPAN, key_end)
                num_left = tl.where(chunk_key < 0, tl.cdiv(-chunk_key, BLOCK_N), 0)
                full_start = chunk_key + num_left * BLOCK_N
                full_keys = tl.minimum(chunk_end, least_end) - full_start
                full_end = full_start + tl.maximum(full_keys, 0) // BLOCK_N * BLOCK_N
                num_masked = num_left + tl.cdiv(tl.maximum(chunk_end - full_end, 0), BLOCK_N)
                for key in tl.range(full_start, full_end, BLOCK_N):
                    _score_step(
                        scores_ptr, q, k_desc, lse, column_end, key, chunk_key, b * N + cmp_start, group * DK,
                        scale_log2, False, HEADS, TOKENS, BLOCK_N, CHUNK_KEYS, PRECISION,
                    )  # fmt: skip
                for i in tl.range(num_masked):
                    key = tl.where(i < num_left, chunk_key + i * BLOCK_N, full_end + (i - num_left) * BLOCK_N)
                    _score_step(
                        scores_ptr, q, k_desc, lse, column_end, key, chunk_key, b * N + cmp_start, group * DK,
                        scale_log2, True, HEADS, TOKENS, BLOCK_N, CHUNK_KEYS, PRECISION,
                    )  # fmt: skip
                tl.debug_barrier()  # the chunk's scores are complete
                for sub in range(0, TOKENS, SUB):
                    token = sub + tl.arange(0, SUB)
                    own = (first_token + token + q_start - doc_start) // BLOCK
                    out_row = ((b.to(tl.int64) * T + first_token + token) * HKV + group) * COUNT
                    _merge(
                        out_ptr + out_row, scores_ptr, list_ptr, start_block, end_block, chunk_end - chunk_key, own,
                        first_token + token < doc_end, token, end_block == num_blocks,
                        COUNT, INIT, LOCAL, SPAN, REACH, PADDED, CHUNK, CHUNK_KEYS, SUB,
                    )  # fmt: skip
                tl.debug_barrier()  # the scores are read, the list is complete


def chunk_sizes(geometry: BlockGeometry, length: int, block_n: int) -> tuple[int, int, int, int]:
    """List width, merge width, blocks a chunk and keys a chunk for documents of up to `length` tokens."""
    span, reach = geometry.strides_per_select, 1 - geometry.overlap_start
    padded = max(16, triton.next_power_of_2(geometry.num_selected_blocks))
    widest = max(512, 4 * padded)
    if widest > 1023:
        raise ValueError(
            f"backend 'triton' chooses at most 128 blocks for a query, not {geometry.num_selected_blocks}; "
            f"use backend='torch'"
        )
    chunk = min(widest, triton.next_power_of_2(padded + geometry.num_select_blocks(length)))
    chunk = max(chunk, 2 * padded)
    tiles = max((chunk - padded) * span // block_n, 1)
    blocks = min(chunk - padded, max((tiles * block_n - (reach - 1)) // span, 1))
    keys = triton.cdiv(blocks * span + reach - 1, block_n) * block_n
    return padded, chunk, blocks, keys


def select_blocks(
    q: Tensor, k_cmp: Tensor, lse: Tensor, geometry: BlockGeometry, layout: Layout | None, q_start: int, scale: float,
    tile: dict[str, int] | None = None, programs_each: int = 3,
) -> Tensor:  # fmt: skip
    """int32 `[B, T, Hkv, n]`, ascending, padded with -1 (Eq. 8-12), for fitting tensors."""
    B, T, H, Dk = q.shape
    N, Hkv, count = k_cmp.shape[1], k_cmp.shape[2], geometry.num_selected_blocks
    out = torch.empty(B, T, Hkv, count, dtype=torch.int32, device=q.device)
    if layout is not None:
        out.fill_(-1)
    if out.numel() == 0:
        return out
    if N == 0:  # no document has a compressed token, so all blocks are nearly forced: let a zero key stand in
        k_cmp, N = k_cmp.new_zeros(B, 1, Hkv, Dk), 1
    tile = dict(tile or score_tile(q, H // Hkv, has_large_shared_memory(q)))
    tokens, block_n = tile["TOKENS"], tile["BLOCK_N"]
    padded, chunk, blocks, keys = chunk_sizes(geometry, q_start + T, block_n)
    num_docs = 1 if layout is None else layout.cu_seqlens.numel() - 1
    tiles_each = triton.cdiv(T, tokens) + (0 if layout is None else num_docs)
    num_tiles = tiles_each * B * Hkv
    programs = min(num_tiles, programs_each * num_multiprocessors(q))
    scores = torch.empty(programs, tokens, keys, dtype=torch.float32, device=q.device)
    lists = torch.empty(programs, tokens, padded, 2, dtype=torch.int32, device=q.device)
    bounds = (lists, lists) if layout is None else (layout.cu_seqlens, layout.cu_compressed)
    k_desc: TensorDescriptor = describe(k_cmp, block_n)
    score_topk_kernel[(programs,)](
        q, k_desc, lse.float().contiguous(), out, scores, lists, *bounds, scale * LOG2E, LOG2E,
        T, N, q_start, num_docs, (num_docs + 1).bit_length(), num_tiles, tiles_each,
        H=H, HKV=Hkv, DK=Dk, SIZE=geometry.compress_block_size, STRIDE=geometry.compress_stride,
        BLOCK=geometry.select_block_size, COUNT=count, INIT=geometry.num_init_blocks, LOCAL=geometry.num_local_blocks,
        PACKED=layout is not None, SUB=min(tokens, 8), PADDED=padded, CHUNK=chunk, CHUNK_BLOCKS=blocks,
        CHUNK_KEYS=keys, PRECISION=dot_precision(q), **tile,
    )  # fmt: skip
    return out
