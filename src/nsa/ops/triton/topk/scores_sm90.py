"""Importance of the selection blocks on Hopper, in Gluon: the score kernel of `scores.py` with parts side by side.

Four warps gather the queries of the next tile and load compressed keys by TMA. Three groups of four warps take turns at
the keys: one multiplies its 64 keys with the tile's queries while the others take exponentials and store. Sums over a
block's keys stay within a thread, of up to 16 heads a group.

Columns, tiles and what is stored are those of `scores.py`.
"""

# Kernels are typed by Triton, not by Python.
# pyright: reportArgumentType=false, reportCallIssue=false, reportAttributeAccessIssue=false, reportReturnType=false
# pyright: reportGeneralTypeIssues=false, reportPossiblyUnboundVariable=false
# pyright: reportAssignmentType=false, reportOperatorIssue=false
# Lists in kernels are added, not unpacked.
# ruff: noqa: RUF005
from __future__ import annotations

import triton
from torch import Tensor
from triton.experimental import gluon
from triton.experimental.gluon import language as gl
from triton.experimental.gluon.language.nvidia.ampere import async_copy
from triton.experimental.gluon.language.nvidia.hopper import (
    fence_async_shared,
    mbarrier,
    tma,
    warpgroup_mma,
    warpgroup_mma_wait,
)

from nsa.geometry import BlockGeometry
from nsa.ops.triton.gpu import LOG2E
from nsa.ops.triton.layout import Layout, document_pointers, num_documents, place_of_tile
from nsa.ops.triton.selected.invert import Chunk
from nsa.ops.triton.sm90 import describe_parts, make_barriers, num_rounds, tile_of_round
from nsa.ops.triton.tiles import Tile
from nsa.ops.triton.topk.scores import Scores, tiles_of_chunk

COLUMNS = gl.constexpr(128)  # (head, token) of a tile
KEYS = gl.constexpr(64)  # keys of a step, as one wgmma takes
GROUPS = gl.constexpr(3)  # groups of four warps
# Steps in flight; multiples of GROUPS, so that a group waits for every use of its places. Keys of 192 leave room for 3.
STAGES, TAIL_STAGES = 6, 3


@gluon.jit
def _place(
    turn, num_tiles, heads, first_tile, cu_ptr, cu_cmp_ptr, T, N, q_start, num_docs, steps, token_start,
    token_end, SIZE: gl.constexpr, STRIDE: gl.constexpr, TOKENS: gl.constexpr, PACKED: gl.constexpr,
):  # fmt: skip
    """A program's tile in a round: its head, first token, document, and the keys that all and any of its tokens see."""
    tile, local_head, _group = tile_of_round(turn, num_tiles, heads, 1, 1)
    first_token, doc_start, doc_end, cmp_start = place_of_tile(
        first_tile + tile, cu_ptr, cu_cmp_ptr, T, num_docs, steps, TOKENS, PACKED
    )
    last_token = gl.minimum(first_token + TOKENS, doc_end) - 1
    first_past = first_token + q_start - doc_start - (SIZE - 1)
    last_past = last_token + q_start - doc_start - (SIZE - 1)
    end = gl.minimum(gl.where(last_past >= 0, last_past // STRIDE + 1, 0), N - cmp_start)
    full = gl.minimum(gl.where(first_past >= 0, first_past // STRIDE + 1, 0), end)
    live = (first_token < gl.minimum(doc_end, token_end)) & (last_token >= token_start)
    return local_head, first_token, doc_start, doc_end, cmp_start, full, gl.where(live, end, 0)


@gluon.jit
def _copy_queries(
    q_ptr, tile, low, b, group, T, doc_end, G: gl.constexpr, HKV: gl.constexpr, D: gl.constexpr, WIDTH: gl.constexpr,
    TOKENS: gl.constexpr,
):  # fmt: skip
    """Begin to copy D columns of the queries of TOKENS tokens from `low` on, head by head; zeros for what is none."""
    LAYOUT: gl.constexpr = gl.BlockedLayout([1, 8], [256 // D, D // 8], [4, 1], [1, 0])
    column = gl.arange(0, COLUMNS, gl.SliceLayout(1, LAYOUT))
    t = low + column % TOKENS
    live = (t < doc_end) & (column // TOKENS < G)
    row = (b.to(gl.int64) * T + gl.minimum(t, T - 1)) * (G * HKV) + group * G + gl.minimum(column // TOKENS, G - 1)
    place = row[:, None] * WIDTH + gl.arange(0, D, gl.SliceLayout(0, LAYOUT))[None, :]
    async_copy.async_copy_global_to_shared(tile, q_ptr + place, mask=live[:, None])


@gluon.jit
def _load_partition(
    q_ptr, k_desc, k_tail_desc, lse_ptr, q_smem, q_tail_smem, k_smem, k_tail_smem, lse_smem, q_full, q_empty, k_full,
    k_empty, cu_ptr, cu_cmp_ptr, log2e, T, N, q_start, num_docs, steps, head_start, token_start, token_end, first_tile,
    num_tiles, heads,
    G: gl.constexpr, HKV: gl.constexpr, D: gl.constexpr, TAIL: gl.constexpr, SIZE: gl.constexpr, STRIDE: gl.constexpr,
    PACKED: gl.constexpr, TOKENS: gl.constexpr, STAGES: gl.constexpr,
):  # fmt: skip
    LINE: gl.constexpr = gl.BlockedLayout([1], [32], [4], [0])
    used = 0
    step = 0
    for turn in range(num_rounds(num_tiles * heads)):
        local_head, first_token, _start, doc_end, cmp_start, _full, end = _place(
            turn, num_tiles, heads, first_tile, cu_ptr, cu_cmp_ptr, T, N, q_start, num_docs, steps,
            token_start, token_end, SIZE, STRIDE, TOKENS, PACKED,
        )  # fmt: skip
        if end > 0:
            b = (head_start + local_head) // HKV
            group = (head_start + local_head) % HKV
            buffer = used % 2
            mbarrier.wait(q_empty.index(buffer), (used // 2 & 1) ^ 1)
            place = q_smem.index(buffer)
            _copy_queries(q_ptr, place, first_token, b, group, T, doc_end, G, HKV, D, D + TAIL, TOKENS)
            if TAIL > 0:
                place = q_tail_smem.index(buffer)
                _copy_queries(q_ptr + D, place, first_token, b, group, T, doc_end, G, HKV, TAIL, D + TAIL, TOKENS)
            line = gl.arange(0, COLUMNS, LINE)
            t = first_token + line % TOKENS
            live = (t < doc_end) & (line // TOKENS < G)
            row = (b.to(gl.int64) * T + gl.minimum(t, T - 1)) * (G * HKV) + group * G
            row += gl.minimum(line // TOKENS, G - 1)
            lse = gl.load(lse_ptr + row, mask=live, other=float("inf")) * log2e
            lse_smem.index(buffer).store(lse)
            async_copy.mbarrier_arrive(q_full.index(buffer), increment_count=False)
            mbarrier.arrive(q_full.index(buffer), count=1)
            used += 1
            for i in range(gl.cdiv(end, KEYS)):
                slot = step % STAGES
                mbarrier.wait(k_empty.index(slot), (step // STAGES & 1) ^ 1)
                mbarrier.expect(k_full.index(slot), 2 * KEYS * (D + TAIL))
                box = [b, cmp_start + i * KEYS, group, 0]
                tma.async_copy_global_to_shared(k_desc, box, k_full.index(slot), k_smem.index(slot))
                if TAIL > 0:
                    tma.async_copy_global_to_shared(k_tail_desc, box, k_full.index(slot), k_tail_smem.index(slot))
                step += 1


@gluon.jit
def _store_mass(
    head_ptr, p, key, width, first_token, token_start, token_end, TOKENS: gl.constexpr, HEADS: gl.constexpr,
    SPAN: gl.constexpr, REACH: gl.constexpr, POOLED: gl.constexpr,
):  # fmt: skip
    """Store the sums over the heads of a group, or what they give to the blocks; see `scores.py`."""
    # A thread takes neighbouring keys of one token, so that a short block's sum is its own.
    NEAR: gl.constexpr = KEYS * TOKENS // 128
    LAYOUT: gl.constexpr = gl.BlockedLayout([NEAR, 1], [KEYS // NEAR, 32 * NEAR // KEYS], [1, 4], [0, 1])
    mass = gl.convert_layout(gl.sum(p.reshape([KEYS, HEADS, TOKENS]), 1), LAYOUT)
    if POOLED:
        i = gl.arange(0, KEYS, gl.SliceLayout(1, LAYOUT)) % SPAN
        own = mass * gl.minimum(REACH, SPAN - i).to(gl.float32)[:, None]
        _store_blocks(head_ptr, own, key // SPAN, width, first_token, token_start, token_end, TOKENS, SPAN)
        if REACH > 1:
            other = mass * gl.maximum(i + REACH - SPAN, 0).to(gl.float32)[:, None]
            place = width // 2 + key // SPAN
            _store_blocks(head_ptr, other, place, width, first_token, token_start, token_end, TOKENS, SPAN)
    else:
        _store_blocks(head_ptr, mass, key, width, first_token, token_start, token_end, TOKENS, 1)


@gluon.jit
def _store_blocks(
    head_ptr, mass, place, width, first_token, token_start, token_end, TOKENS: gl.constexpr, SPAN: gl.constexpr
):
    """Store the sums over SPAN keys each."""
    if SPAN > 1:
        mass = gl.sum(mass.reshape([KEYS // SPAN, SPAN, TOKENS]), 1)
    LAYOUT: gl.constexpr = mass.type.layout
    token = first_token + gl.arange(0, TOKENS, gl.SliceLayout(0, LAYOUT))
    live = (token >= token_start) & (token < token_end)
    target = (token - token_start)[None, :] * width + place
    target += gl.arange(0, KEYS // SPAN, gl.SliceLayout(1, LAYOUT))[:, None]
    gl.store(head_ptr + target, mass, mask=live[None, :])


@gluon.jit
def _store_step(
    head_ptr, s, lse, key, full, first_token, doc_start, q_start, scale_log2, width, token_start, token_end,
    TOKENS: gl.constexpr, SIZE: gl.constexpr, STRIDE: gl.constexpr, BLOCK: gl.constexpr, POOLED: gl.constexpr,
    S_LAYOUT: gl.constexpr,
):  # fmt: skip
    """Store what KEYS keys from `key` on give, of which all tokens see those before `full`."""
    p = gl.exp2(s * scale_log2 - lse[None, :])
    if key + KEYS > full:
        t = first_token + gl.arange(0, COLUMNS, gl.SliceLayout(0, S_LAYOUT)) % TOKENS
        past = t + q_start - doc_start - (SIZE - 1)
        column_end = gl.where(past >= 0, past // STRIDE + 1, 0)
        keys = key + gl.arange(0, KEYS, gl.SliceLayout(1, S_LAYOUT))
        p = gl.where(keys[:, None] < column_end[None, :], p, 0.0)
    _store_mass(
        head_ptr, p, key, width, first_token, token_start, token_end, TOKENS, COLUMNS // TOKENS, BLOCK // STRIDE,
        SIZE // STRIDE, POOLED,
    )  # fmt: skip


@gluon.jit
def _key_partition(
    PART: gl.constexpr, mass_ptr, q_smem, q_tail_smem, k_smem, k_tail_smem, lse_smem, q_full, q_empty, k_full, k_empty,
    turn_of, cu_ptr, cu_cmp_ptr, scale_log2, T, N, q_start, num_docs, steps, token_start, token_end,
    first_tile, num_tiles, heads, width,
    D: gl.constexpr, TAIL: gl.constexpr, SIZE: gl.constexpr, STRIDE: gl.constexpr,
    BLOCK: gl.constexpr, PACKED: gl.constexpr, POOLED: gl.constexpr, TOKENS: gl.constexpr, STAGES: gl.constexpr,
):  # fmt: skip
    S_LAYOUT: gl.constexpr = gl.NVMMADistributedLayout([3, 0], [4, 1], [16, COLUMNS, 16])
    COLUMN: gl.constexpr = gl.SliceLayout(0, S_LAYOUT)
    none = gl.zeros([KEYS, COLUMNS], gl.float32, S_LAYOUT)
    used = 0
    step = 0
    for turn in range(num_rounds(num_tiles * heads)):
        local_head, first_token, doc_start, doc_end, _cmp_start, full, end = _place(
            turn, num_tiles, heads, first_tile, cu_ptr, cu_cmp_ptr, T, N, q_start, num_docs, steps,
            token_start, token_end, SIZE, STRIDE, TOKENS, PACKED,
        )  # fmt: skip
        if end > 0:
            buffer = used % 2
            num_steps = gl.cdiv(end, KEYS)
            last = gl.minimum(token_end, doc_end)
            head_ptr = mass_ptr + local_head.to(gl.int64) * (token_end - token_start) * width
            mbarrier.wait(q_full.index(buffer), used // 2 & 1)
            fence_async_shared()  # queries were written by threads, the products read them as TMA does
            q = q_smem.index(buffer).permute([1, 0])
            lse = lse_smem.index(buffer).load(COLUMN)
            for i in range((PART + GROUPS - step % GROUPS) % GROUPS, num_steps, GROUPS):
                slot = (step + i) % STAGES
                mbarrier.wait(k_full.index(slot), (step + i) // STAGES & 1)
                # The products of one group at a time: the step before this one is another group's.
                mbarrier.wait(turn_of.index(PART), ((step + i) // GROUPS + (PART == 0)) & 1)
                k = k_smem.index(slot).reshape([KEYS, D])
                s = warpgroup_mma(k, q, none, use_acc=False, is_async=True)
                if TAIL > 0:
                    k_tail = k_tail_smem.index(slot).reshape([KEYS, TAIL])
                    s = warpgroup_mma(k_tail, q_tail_smem.index(buffer).permute([1, 0]), s, is_async=True)
                s = warpgroup_mma_wait(0, deps=[s])
                mbarrier.arrive(turn_of.index((PART + 1) % GROUPS), count=1)
                mbarrier.arrive(k_empty.index(slot), count=1)
                _store_step(
                    head_ptr, s, lse, i * KEYS, full, first_token, doc_start, q_start, scale_log2, width, token_start,
                    last, TOKENS, SIZE, STRIDE, BLOCK, POOLED, S_LAYOUT,
                )  # fmt: skip
            mbarrier.arrive(q_empty.index(buffer), count=1)
            used += 1
            step += num_steps


@gluon.jit(
    do_not_specialize=[
        "T", "N", "q_start", "num_docs", "steps", "head_start", "token_start", "token_end", "first_tile", "num_tiles",
        "heads",
    ]
)  # fmt: skip
def scores_sm90_kernel(
    q_ptr, k_desc, k_tail_desc, lse_ptr, mass_ptr, cu_ptr, cu_cmp_ptr, scale_log2, log2e,
    T, N, q_start, num_docs, steps, head_start, token_start, token_end, first_tile, num_tiles, heads, width,
    G: gl.constexpr, HKV: gl.constexpr, D: gl.constexpr, TAIL: gl.constexpr, SIZE: gl.constexpr, STRIDE: gl.constexpr,
    BLOCK: gl.constexpr, PACKED: gl.constexpr, POOLED: gl.constexpr, TOKENS: gl.constexpr, STAGES: gl.constexpr,
):  # fmt: skip
    dtype: gl.constexpr = k_desc.dtype
    queries: gl.constexpr = gl.NVMMASharedLayout.get_default_for([COLUMNS, D], dtype)
    line: gl.constexpr = gl.SwizzledSharedLayout(1, 1, 1, order=[0])
    q_smem = gl.allocate_shared_memory(dtype, [2, COLUMNS, D], queries)
    k_smem = gl.allocate_shared_memory(dtype, [STAGES] + k_desc.block_shape, k_desc.layout)
    q_tail_smem, k_tail_smem = q_smem, k_smem
    if TAIL > 0:
        tails: gl.constexpr = gl.NVMMASharedLayout.get_default_for([COLUMNS, TAIL], dtype)
        q_tail_smem = gl.allocate_shared_memory(dtype, [2, COLUMNS, TAIL], tails)
        k_tail_smem = gl.allocate_shared_memory(dtype, [STAGES] + k_tail_desc.block_shape, k_tail_desc.layout)
    lse_smem = gl.allocate_shared_memory(gl.float32, [2, COLUMNS], line)
    q_full = make_barriers(2, 129)  # every thread that gathers, and one for the log-sum-exps
    q_empty = make_barriers(2, GROUPS)
    k_full = make_barriers(STAGES, 1)
    k_empty = make_barriers(STAGES, 1)
    turn_of = make_barriers(GROUPS, 1)
    fence_async_shared()
    gl.warp_specialize([
        (_key_partition, (
            0, mass_ptr, q_smem, q_tail_smem, k_smem, k_tail_smem, lse_smem, q_full, q_empty, k_full, k_empty, turn_of,
            cu_ptr, cu_cmp_ptr, scale_log2, T, N, q_start, num_docs, steps, token_start, token_end,
            first_tile, num_tiles, heads, width, D, TAIL, SIZE, STRIDE, BLOCK, PACKED, POOLED, TOKENS, STAGES,
        )),
        (_key_partition, (
            1, mass_ptr, q_smem, q_tail_smem, k_smem, k_tail_smem, lse_smem, q_full, q_empty, k_full, k_empty, turn_of,
            cu_ptr, cu_cmp_ptr, scale_log2, T, N, q_start, num_docs, steps, token_start, token_end,
            first_tile, num_tiles, heads, width, D, TAIL, SIZE, STRIDE, BLOCK, PACKED, POOLED, TOKENS, STAGES,
        )),
        (_key_partition, (
            2, mass_ptr, q_smem, q_tail_smem, k_smem, k_tail_smem, lse_smem, q_full, q_empty, k_full, k_empty, turn_of,
            cu_ptr, cu_cmp_ptr, scale_log2, T, N, q_start, num_docs, steps, token_start, token_end,
            first_tile, num_tiles, heads, width, D, TAIL, SIZE, STRIDE, BLOCK, PACKED, POOLED, TOKENS, STAGES,
        )),
        (_load_partition, (
            q_ptr, k_desc, k_tail_desc, lse_ptr, q_smem, q_tail_smem, k_smem, k_tail_smem, lse_smem, q_full, q_empty,
            k_full, k_empty, cu_ptr, cu_cmp_ptr, log2e, T, N, q_start, num_docs, steps, head_start, token_start,
            token_end, first_tile, num_tiles, heads, G, HKV, D, TAIL, SIZE, STRIDE, PACKED, TOKENS, STAGES,
        )),
    ], [4, 4, 4], [144, 144, 72])  # fmt: skip


def tile_tokens(group_size: int) -> int:
    """Tokens of a tile."""
    return COLUMNS.value // triton.next_power_of_2(group_size)


def scores_sm90(
    q: Tensor, k_cmp: Tensor, lse: Tensor, scores: Scores, geometry: BlockGeometry, layout: Layout | None,
    chunk: Chunk, q_start: int, scale: float, tile: Tile,
) -> None:  # fmt: skip
    """Write what `plain_scores` gives; `tile` has the tokens of a tile and the most programs."""
    T, H, Dk = q.shape[1:]
    N, Hkv, num_docs = k_cmp.shape[1], k_cmp.shape[2], num_documents(layout)
    D, heads = min(Dk, 128), chunk.num_heads
    first_tile, num_tiles = tiles_of_chunk(chunk, tile["TOKENS"], num_docs)
    scores_sm90_kernel[(min(tile["programs"], num_tiles * heads),)](
        q, *describe_parts(k_cmp, D, KEYS.value, 1), lse, scores.mass,
        *document_pointers(layout, scores.mass, "cu_seqlens", "cu_compressed"), scale * LOG2E, LOG2E,
        T, N, q_start, num_docs, (num_docs + 1).bit_length(), chunk.head, chunk.token, chunk.token_end, first_tile,
        num_tiles, heads, scores.width, G=H // Hkv, HKV=Hkv, D=D, TAIL=Dk - D, SIZE=geometry.compress_block_size,
        STRIDE=geometry.compress_stride, BLOCK=geometry.select_block_size, PACKED=layout is not None,
        POOLED=scores.pooled, TOKENS=tile["TOKENS"], STAGES=TAIL_STAGES if Dk > D else STAGES, num_warps=4,
    )  # fmt: skip
