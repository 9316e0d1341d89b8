"""Importance of the selection blocks (Eq. 8 to 10) on any GPU: the scores of the compressed branch, taken again.

Shapes and scratch are those of `topk/choice.py`, which chooses from them.
"""

# Kernels are typed by Triton, not by Python.
# pyright: reportArgumentType=false, reportCallIssue=false, reportAttributeAccessIssue=false, reportReturnType=false
# pyright: reportGeneralTypeIssues=false, reportPossiblyUnboundVariable=false, reportAssignmentType=false
from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

from nsa.ops.triton.gpu import hopper_serves
from nsa.ops.triton.layout import place_of_tile


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
    """Whether Hopper's own kernel scores these fitting queries; one head a group wider than 64 leaves it no room."""
    return hopper_serves(q, q[..., :128]) and (2 if q.shape[3] > 64 else 1) <= group_size <= 32


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
