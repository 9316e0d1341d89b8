"""Importance of the selection blocks (Eq. 8 to 10) on any GPU: the scores of the compressed branch, taken again.

The attention to compressed keys keeps no probabilities, only each row's log-sum-exp. From it a probability is one more
product and one exponential. What is stored are the group's sums, a scratch of a chunk of tokens at a time (2 GiB).

Shapes are those of `topk/choice.py`, which chooses from them. Legend: a pair is a batch row with a group of heads,
b * Hkv + group. A tile holds TOKENS tokens of a pair as HEADS * TOKENS columns, head-major (column = head * TOKENS +
token), so that the sum over a group's heads stays within a thread; it runs over BLOCK_N compressed keys a step. SPAN
keys begin in a selection block (l'/d); a key is REACH strides long (l/d), so that the last ones of a block end in the
next.
"""

# Kernels are typed by Triton, not by Python.
# pyright: reportArgumentType=false, reportCallIssue=false, reportAttributeAccessIssue=false, reportReturnType=false
# pyright: reportGeneralTypeIssues=false, reportPossiblyUnboundVariable=false, reportAssignmentType=false
from __future__ import annotations

from typing import NamedTuple

import triton
import triton.language as tl
from torch import Tensor

from nsa.geometry import BlockGeometry
from nsa.ops.triton.dense.step import describe_keys
from nsa.ops.triton.gpu import LOG2E, dot_precision, key_tail
from nsa.ops.triton.layout import Layout, document_pointers, num_documents, place_of_tile
from nsa.ops.triton.selected.invert import Chunk
from nsa.ops.triton.tiles import Tile


class Scores(NamedTuple):
    """The scratch between scores and choice, of one chunk after another.

    Attributes:
        values: fp32, flat: a row of `width` for each pair and token of the chunk.
        width: of a row.
        pooled: a row holds what each block's keys give to its own importance, then, from the middle on, what they give
            to the next block's; else the probability of each key, summed over the group.
    """

    values: Tensor
    width: int
    pooled: bool


def row_width(num_keys: int, geometry: BlockGeometry, pooled: bool) -> int:
    """`Scores.width` for `num_keys` compressed keys."""
    width = triton.cdiv(max(num_keys, 1), 128) * 128
    if not pooled:
        return width
    parts = 1 if geometry.compress_block_size == geometry.compress_stride else 2
    return width // geometry.strides_per_select * parts


def tiles_of_chunk(chunk: Chunk, tokens: int, num_docs: int) -> tuple[int, int]:
    """First number and count of the tiles that may hold tokens of a chunk; each document before one shifts them."""
    first = chunk.token // tokens
    return first, triton.cdiv(chunk.token_end, tokens) - first + num_docs


@triton.jit
def _probabilities(
    q, q_tail, k_desc, k_tail_desc, key_row, key_column, lse, scale_log2, TAIL: tl.constexpr, PRECISION: tl.constexpr
):
    """Probabilities [BLOCK_N, columns] of the keys from row `key_row` of the descriptor on; `lse` is base 2."""
    k = k_desc.load([key_row, key_column])
    s = tl.dot(k, tl.trans(q), input_precision=PRECISION)
    if TAIL > 0:
        k = k_tail_desc.load([key_row, key_column + q.shape[1]])
        s = tl.dot(k, tl.trans(q_tail), s, input_precision=PRECISION)
    return tl.math.exp2(s * scale_log2 - lse[None, :])


@triton.jit
def _store_scores(
    score_ptr, p, key, token_row, live_token, width, HEADS: tl.constexpr, TOKENS: tl.constexpr, BLOCK_N: tl.constexpr,
    SPAN: tl.constexpr, REACH: tl.constexpr, POOLED: tl.constexpr,
):  # fmt: skip
    """Store the group's sums of keys key .. key + BLOCK_N - 1, or (POOLED) what they give to the blocks."""
    scores = tl.sum(tl.reshape(p, [BLOCK_N, HEADS, TOKENS]), 1)
    if POOLED:
        BLOCKS: tl.constexpr = BLOCK_N // SPAN
        scores = tl.reshape(scores, [BLOCKS, SPAN, TOKENS])
        # Key i of a block covers strides i .. i + REACH - 1: those before SPAN are its own, the others the next one's.
        i = tl.arange(0, SPAN)[None, :, None]
        own = tl.sum(scores * tl.minimum(REACH, SPAN - i).to(tl.float32), 1)
        target = score_ptr + token_row[None, :] * width + (key // SPAN + tl.arange(0, BLOCKS))[:, None]
        tl.store(target, own, mask=live_token[None, :])
        if REACH > 1:  # kept apart, not added: the next block may be another step's
            next_block = tl.sum(scores * tl.maximum(i + REACH - SPAN, 0).to(tl.float32), 1)
            tl.store(target + width // 2, next_block, mask=live_token[None, :])
    else:
        keys = key + tl.arange(0, BLOCK_N)
        tl.store(score_ptr + token_row[None, :] * width + keys[:, None], scores, mask=live_token[None, :])


@triton.jit(
    do_not_specialize=["T", "N", "q_start", "num_docs", "steps", "pair_start", "token_start", "token_end", "first_tile"]
)
def scores_kernel(
    q_ptr, k_desc, k_tail_desc, lse_ptr, score_ptr, cu_ptr, cu_cmp_ptr, scale_log2, log2e,
    T, N, q_start, num_docs, steps, pair_start, token_start, token_end, first_tile, width,
    H: tl.constexpr, HKV: tl.constexpr, DK: tl.constexpr, TAIL: tl.constexpr, SIZE: tl.constexpr,
    STRIDE: tl.constexpr, BLOCK: tl.constexpr, PACKED: tl.constexpr, POOLED: tl.constexpr, HEADS: tl.constexpr,
    TOKENS: tl.constexpr, BLOCK_N: tl.constexpr, PRECISION: tl.constexpr,
):  # fmt: skip
    """Scores of tokens token_start .. token_end - 1 of a pair: a program takes one tile, all of its compressed keys."""
    G: tl.constexpr = H // HKV
    SPAN: tl.constexpr = BLOCK // STRIDE
    REACH: tl.constexpr = SIZE // STRIDE
    b = (pair_start + tl.program_id(1)) // HKV
    group = (pair_start + tl.program_id(1)) % HKV
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
        # Columns without a token or head read some row that exists; an infinite log-sum-exp makes them 0.
        row = (b.to(tl.int64) * T + tl.minimum(t, T - 1)) * H + group * G + tl.minimum(head, G - 1)
        MAIN: tl.constexpr = DK - TAIL
        q = tl.load(q_ptr + row[:, None] * DK + tl.arange(0, MAIN)[None, :], mask=live[:, None], other=0.0)
        q_tail = q
        if TAIL > 0:
            q_ptr += MAIN
            q_tail = tl.load(q_ptr + row[:, None] * DK + tl.arange(0, TAIL)[None, :], mask=live[:, None], other=0.0)
        lse = tl.where(live, tl.load(lse_ptr + row, mask=live, other=0.0) * log2e, float("inf"))
        # A token sees the keys whose last token is not after it (Eq. 7): all of the tile do so before `full_end`.
        past = t + q_start - doc_start - (SIZE - 1)
        column_end = tl.where(past >= 0, past // STRIDE + 1, 0)
        first_past = first_token + q_start - doc_start - (SIZE - 1)
        last_past = last_token + q_start - doc_start - (SIZE - 1)
        key_end = tl.minimum(tl.where(last_past >= 0, last_past // STRIDE + 1, 0), N - cmp_start)
        full_end = tl.minimum(tl.where(first_past >= 0, first_past // STRIDE + 1, 0), key_end) // BLOCK_N * BLOCK_N
        # A tile may begin before the chunk or end after it: those tokens are other launches'.
        token = first_token + tl.arange(0, TOKENS)
        token_row = tl.program_id(1).to(tl.int64) * (token_end - token_start) + token - token_start
        live_token = (token >= token_start) & (token < tl.minimum(token_end, doc_end))
        key_row, key_column = b * N + cmp_start, group * DK
        for key in tl.range(0, full_end, BLOCK_N):
            p = _probabilities(
                q, q_tail, k_desc, k_tail_desc, key_row + key, key_column, lse, scale_log2, TAIL, PRECISION
            )
            _store_scores(score_ptr, p, key, token_row, live_token, width, HEADS, TOKENS, BLOCK_N, SPAN, REACH, POOLED)
        for key in tl.range(full_end, key_end, BLOCK_N):
            p = _probabilities(
                q, q_tail, k_desc, k_tail_desc, key_row + key, key_column, lse, scale_log2, TAIL, PRECISION
            )
            keys = key + tl.arange(0, BLOCK_N)
            p = tl.where(keys[:, None] < column_end[None, :], p, 0.0)
            _store_scores(score_ptr, p, key, token_row, live_token, width, HEADS, TOKENS, BLOCK_N, SPAN, REACH, POOLED)


def plain_scores(
    q: Tensor, k_cmp: Tensor, lse: Tensor, scores: Scores, geometry: BlockGeometry, layout: Layout | None,
    chunk: Chunk, q_start: int, scale: float, tile: Tile,
) -> None:  # fmt: skip
    """Write the scores of a chunk, from fitting queries and keys and fp32 log-sum-exps."""
    T, H, Dk = q.shape[1:]
    N, Hkv, num_docs = k_cmp.shape[1], k_cmp.shape[2], num_documents(layout)
    first_tile, num_tiles = tiles_of_chunk(chunk, tile["TOKENS"], num_docs)
    scores_kernel[(num_tiles, chunk.num_pairs)](
        q, *describe_keys(k_cmp, tile["BLOCK_N"]), lse, scores.values,
        *document_pointers(layout, scores.values, "cu_seqlens", "cu_compressed"), scale * LOG2E, LOG2E, T, N, q_start,
        num_docs, (num_docs + 1).bit_length(), chunk.pair, chunk.token, chunk.token_end, first_tile, scores.width,
        H=H, HKV=Hkv, DK=Dk, TAIL=key_tail(Dk), SIZE=geometry.compress_block_size, STRIDE=geometry.compress_stride,
        BLOCK=geometry.select_block_size, PACKED=layout is not None, POOLED=scores.pooled, PRECISION=dot_precision(q),
        **tile,
    )  # fmt: skip
