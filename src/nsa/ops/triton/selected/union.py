"""The selected branch by tiles of neighbouring tokens: each tile runs over the union of its tokens' blocks.

Neighbours choose alike in trained models, and in short documents they choose from few blocks: then the union is hardly
longer than one token's list, tiles are dense, and there is no scratch, inversion or reduction. Where tokens choose
apart, `forward.py` and `backward.py` do less work; `nsa.ops.triton.plan` says which. Here are the output and dQ; dK and
dV are `backward.py`'s in both cases.

Shapes: q `[B, T, H, Dk]`, k `[B, S, Hkv, Dk]`, v `[B, S, Hkv, Dv]`, block_indices `[B, T, Hkv, n]`. A pair is a batch
row with a group of heads, b * Hkv + group. A tile holds the rows (token, head of the group) of TOKENS whole tokens of a
pair; a step is BLOCK_N keys of one block of its union.
"""

# Kernels are typed by Triton, not by Python.
# pyright: reportArgumentType=false, reportCallIssue=false, reportAttributeAccessIssue=false, reportReturnType=false
# pyright: reportGeneralTypeIssues=false, reportPossiblyUnboundVariable=false
from __future__ import annotations

from typing import NamedTuple

import torch
import triton
import triton.language as tl
from torch import Tensor

from nsa.geometry import BlockGeometry
from nsa.ops.triton.dense.step import KeyTiles, attend_tile, describe, describe_keys, query_step
from nsa.ops.triton.gates import Gated, Rows, gate_pointers, gated_sum
from nsa.ops.triton.gpu import LN2, LOG2E, dot_precision, key_tail
from nsa.ops.triton.layout import Layout, document_pointers
from nsa.ops.triton.plan import Stage
from nsa.ops.triton.selected.union_dq_sm90 import union_dq_sm90
from nsa.ops.triton.selected.union_sm90 import union_forward_sm90

NOTHING = 2**31 - 1  # sorts behind every choice


class Unions(NamedTuple):
    """The blocks that a tile's tokens choose between them, ascending.

    Attributes:
        starts: int32 `[B*Hkv, tiles, width]`, first key of each block.
        masks: int64, likewise; bit i is set if the tile's i-th token chose it.
        counts: int32 `[B*Hkv, tiles]`.
    """

    starts: Tensor
    masks: Tensor
    counts: Tensor


@triton.jit(do_not_specialize=["T", "num_tiles"])
def union_kernel(
    choice_ptr, doc_ptr, sorted_ptr, start_ptr, mask_ptr, count_ptr, T, num_tiles,
    HKV: tl.constexpr, COUNT: tl.constexpr, BLOCK: tl.constexpr, TOKENS: tl.constexpr, PACKED: tl.constexpr,
    PADDED: tl.constexpr, SIZE: tl.constexpr, NOTHING: tl.constexpr,
):  # fmt: skip
    """The union of one tile: its (block, token) choices are sorted, each run of one block becomes one entry."""
    b, group = tl.program_id(1) // HKV, tl.program_id(1) % HKV
    index = tl.arange(0, SIZE)
    token, slot = index // PADDED, index % PADDED
    t = tl.program_id(0) * TOKENS + token
    live = (token < TOKENS) & (t < T) & (slot < COUNT)
    chosen = tl.load(choice_ptr + ((b.to(tl.int64) * T + t) * HKV + group) * COUNT + slot, mask=live, other=-1)
    start = chosen * BLOCK
    if PACKED:
        start += tl.load(doc_ptr + t, mask=chosen >= 0, other=0)
    # One integer to sort by block, then token: six bits hold a tile's tokens (MAX_UNION_TOKENS).
    key = tl.sort(tl.where(chosen >= 0, start * 64 + token, NOTHING))
    tile = tl.program_id(1).to(tl.int64) * num_tiles + tl.program_id(0)
    sorted_ptr += tile * SIZE
    tl.store(sorted_ptr + index, key)
    tl.debug_barrier()  # the one before is another thread's
    before = tl.load(sorted_ptr + index - 1, mask=index > 0, other=-1)
    live = key != NOTHING
    first = live & ((key >> 6) != (before >> 6))
    entry = tile * (TOKENS * COUNT) + tl.cumsum(first.to(tl.int32), 0) - 1
    tl.store(start_ptr + entry, key >> 6, mask=first)
    bit = tl.full([SIZE], 1, tl.int64) << (key & 63).to(tl.int64)
    tl.atomic_add(mask_ptr + entry, bit, mask=live, sem="relaxed")  # distinct bits: the order does not matter
    tl.store(count_ptr + tile, tl.sum(first.to(tl.int32), 0))


def make_unions(block_indices: Tensor, geometry: BlockGeometry, layout: Layout | None, tokens: int) -> Unions:
    """Unions of `tokens` tokens each from `block_indices` int32 `[B, T, Hkv, n]`, contiguous."""
    B, T, Hkv, count = block_indices.shape
    tiles, device = triton.cdiv(T, tokens), block_indices.device
    padded = triton.next_power_of_2(count)
    size = triton.next_power_of_2(tokens) * padded
    scratch = torch.empty(B * Hkv * tiles * size, dtype=torch.int32, device=device)
    starts = torch.empty(B * Hkv, tiles, tokens * count, dtype=torch.int32, device=device)
    masks = torch.zeros(starts.shape, dtype=torch.int64, device=device)
    counts = torch.empty(B * Hkv, tiles, dtype=torch.int32, device=device)
    union_kernel[(tiles, B * Hkv)](
        block_indices, *document_pointers(layout, block_indices, "doc_start"), scratch, starts, masks, counts, T, tiles,
        HKV=Hkv, COUNT=count, BLOCK=geometry.select_block_size, TOKENS=tokens, PACKED=layout is not None,
        PADDED=padded, SIZE=size, NOTHING=NOTHING, num_warps=1 if size <= 256 else 4,
    )  # fmt: skip
    return Unions(starts, masks, counts)


@triton.jit
def tile_rows(T, H: tl.constexpr, HKV: tl.constexpr, TOKENS: tl.constexpr, BLOCK_M: tl.constexpr):
    """Of a program: number of its union, batch row, group; of its rows: token, its bit, row in `[B, T, H]`, if live."""
    G: tl.constexpr = H // HKV
    tile = tl.num_programs(0) - 1 - tl.program_id(0)  # the heaviest tiles first
    b, group = tl.program_id(1) // HKV, tl.program_id(1) % HKV
    row = tl.arange(0, BLOCK_M)
    bit = row // G
    t = tile * TOKENS + bit
    live = (bit < TOKENS) & (t < T)
    t = tl.minimum(t, T - 1)  # rows beyond the last read some token that exists, and store nothing
    row_64 = (b.to(tl.int64) * T + t) * H + group * G + row % G
    return tl.program_id(1).to(tl.int64) * tl.num_programs(0) + tile, b, group, t, bit, row_64, live


@triton.jit
def visible_end(start_ptr, mask_ptr, i, t, bit, live, q_start, BLOCK: tl.constexpr):
    """First key of the i-th block of a union, and where the keys end that each row sees of it; 0 for none.

    That is causal, and enough for packed documents: what follows one in its last block lies after all of its tokens.
    """
    key_start = tl.load(start_ptr + i)
    chosen = live & (((tl.load(mask_ptr + i) >> bit.to(tl.int64)) & 1) != 0)
    return key_start, tl.where(chosen, tl.minimum(t + q_start + 1, key_start + BLOCK), 0)


@triton.jit(do_not_specialize=["T", "S", "q_start"])
def union_forward_kernel(
    q_ptr, k_desc, k_tail_desc, v_desc, out_ptr, lse_ptr, cmp_ptr, win_ptr, gate_ptr, sum_ptr,
    start_ptr, mask_ptr, count_ptr, scale_log2, T, S, q_start,
    H: tl.constexpr, HKV: tl.constexpr, DK: tl.constexpr, TAIL: tl.constexpr, DV: tl.constexpr, BLOCK: tl.constexpr,
    COUNT: tl.constexpr, TOKENS: tl.constexpr, GATED: tl.constexpr, LN2: tl.constexpr, PRECISION: tl.constexpr,
    BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr,
):  # fmt: skip
    """Output of a tile of rows by the online softmax; GATED also stores the gated sum of the branches (Eq. 5)."""
    MAIN: tl.constexpr = DK - TAIL
    tile, b, group, t, bit, row_64, live = tile_rows(T, H, HKV, TOKENS, BLOCK_M)
    q = tl.load(q_ptr + row_64[:, None] * DK + tl.arange(0, MAIN)[None, :], mask=live[:, None], other=0.0)
    q_tail = q
    if TAIL > 0:
        q_ptr += MAIN
        q_tail = tl.load(q_ptr + row_64[:, None] * DK + tl.arange(0, TAIL)[None, :], mask=live[:, None], other=0.0)
    acc = tl.zeros([BLOCK_M, DV], tl.float32)
    row_max = tl.full([BLOCK_M], float("-inf"), tl.float32)
    row_sum = tl.zeros([BLOCK_M], tl.float32)
    first = tl.zeros([BLOCK_M], tl.int32)  # no lower end: a step's keys are all of one block
    start_ptr += tile * (TOKENS * COUNT)
    mask_ptr += tile * (TOKENS * COUNT)
    keys = KeyTiles(k_desc, k_tail_desc, v_desc, b * S, group * DK, group * DV)
    for i in tl.range(0, tl.load(count_ptr + tile)):
        key_start, end = visible_end(start_ptr, mask_ptr, i, t, bit, live, q_start, BLOCK)
        for part in tl.static_range(0, BLOCK, BLOCK_N):
            acc, row_max, row_sum = attend_tile(
                acc, row_max, row_sum, q, q_tail, keys, key_start + part, first, end, scale_log2, TAIL, True, PRECISION
            )
    out = acc / tl.where(row_sum == 0.0, 1.0, row_sum)[:, None]  # a row that chose nothing: 0, and -inf below
    offset = row_64[:, None] * DV + tl.arange(0, DV)[None, :]
    tl.store(out_ptr + offset, out.to(out_ptr.dtype.element_ty), mask=live[:, None])
    lse_ptr += row_64
    tl.store(lse_ptr, tl.where(row_sum == 0.0, float("-inf"), (row_max + tl.math.log2(row_sum)) * LN2), mask=live)
    if GATED:
        gated_sum(out, cmp_ptr, win_ptr, gate_ptr, sum_ptr, row_64, offset, live)


def union_forward(
    q: Tensor, k: Tensor, v: Tensor, block_indices: Tensor, geometry: BlockGeometry, layout: Layout | None,
    q_start: int, scale: float, stage: Stage, gated: Gated | None = None,
) -> tuple[Tensor, Tensor]:  # fmt: skip
    """What `select_forward` returns, for fitting tensors and group sizes up to the rows of a tile."""
    B, T, H, Dk = q.shape
    S, Hkv, Dv = k.shape[1], k.shape[2], v.shape[3]
    out, lse = q.new_empty(B, T, H, Dv), q.new_empty(B, T, H, dtype=torch.float32)
    if out.numel() == 0:
        return out, lse
    tile = stage.tile
    unions = make_unions(block_indices, geometry, layout, tile["TOKENS"])
    if stage.is_sm90:
        union_forward_sm90(q, k, v, out, lse, *unions, geometry, q_start, scale, gated, tile["programs"])
        return out, lse
    union_forward_kernel[(unions.counts.shape[1], B * Hkv)](
        q, *describe_keys(k, tile["BLOCK_N"]), describe(v, tile["BLOCK_N"]), out, lse, *gate_pointers(gated, out),
        unions.starts, unions.masks, unions.counts, scale * LOG2E, T, S, q_start,
        H=H, HKV=Hkv, DK=Dk, TAIL=key_tail(Dk), DV=Dv, BLOCK=geometry.select_block_size,
        COUNT=geometry.num_selected_blocks, GATED=gated is not None, LN2=LN2,
        PRECISION=dot_precision(q), **tile,
    )  # fmt: skip
    return out, lse


@triton.jit(do_not_specialize=["T", "S", "q_start"])
def union_dq_kernel(
    q_ptr, k_desc, k_tail_desc, v_desc, dout_ptr, lse_ptr, delta_ptr, dq_ptr, start_ptr, mask_ptr, count_ptr,
    scale, scale_log2, log2e, T, S, q_start,
    H: tl.constexpr, HKV: tl.constexpr, DK: tl.constexpr, TAIL: tl.constexpr, DV: tl.constexpr, BLOCK: tl.constexpr,
    COUNT: tl.constexpr, TOKENS: tl.constexpr, ADD: tl.constexpr, PRECISION: tl.constexpr, BLOCK_M: tl.constexpr,
    BLOCK_N: tl.constexpr,
):  # fmt: skip
    """dQ of a tile of rows; ADD puts it on top of what `dq_ptr` holds."""
    MAIN: tl.constexpr = DK - TAIL
    tile, b, group, t, bit, row_64, live = tile_rows(T, H, HKV, TOKENS, BLOCK_M)
    q_offset = row_64[:, None] * DK + tl.arange(0, MAIN)[None, :]
    q = tl.load(q_ptr + q_offset, mask=live[:, None], other=0.0)
    dq = tl.zeros([BLOCK_M, MAIN], tl.float32)
    q_tail, dq_tail, tail_offset = q, dq, q_offset
    if TAIL > 0:
        tail_offset = row_64[:, None] * DK + MAIN + tl.arange(0, TAIL)[None, :]
        q_tail = tl.load(q_ptr + tail_offset, mask=live[:, None], other=0.0)
        dq_tail = tl.zeros([BLOCK_M, TAIL], tl.float32)
    dout = tl.load(dout_ptr + row_64[:, None] * DV + tl.arange(0, DV)[None, :], mask=live[:, None], other=0.0)
    lse = tl.load(lse_ptr + row_64, mask=live, other=0.0) * log2e
    delta = tl.load(delta_ptr + row_64, mask=live, other=0.0)
    first = tl.zeros([BLOCK_M], tl.int32)  # no lower end: a step's keys are all of one block
    start_ptr += tile * (TOKENS * COUNT)
    mask_ptr += tile * (TOKENS * COUNT)
    keys = KeyTiles(k_desc, k_tail_desc, v_desc, b * S, group * DK, group * DV)
    for i in tl.range(0, tl.load(count_ptr + tile)):
        key_start, end = visible_end(start_ptr, mask_ptr, i, t, bit, live, q_start, BLOCK)
        for part in tl.static_range(0, BLOCK, BLOCK_N):
            dq, dq_tail = query_step(
                dq, dq_tail, q, q_tail, dout, lse, delta, keys, key_start + part, first, end, scale_log2, TAIL, True,
                PRECISION,
            )  # fmt: skip
    dq *= scale
    if ADD:
        dq += tl.load(dq_ptr + q_offset, mask=live[:, None], other=0.0).to(tl.float32)
    tl.store(dq_ptr + q_offset, dq.to(dq_ptr.dtype.element_ty), mask=live[:, None])
    if TAIL > 0:
        dq_tail *= scale
        if ADD:
            dq_tail += tl.load(dq_ptr + tail_offset, mask=live[:, None], other=0.0).to(tl.float32)
        tl.store(dq_ptr + tail_offset, dq_tail.to(dq_ptr.dtype.element_ty), mask=live[:, None])


def union_dq(
    dout: Tensor, q: Tensor, k: Tensor, v: Tensor, rows: Rows, block_indices: Tensor, geometry: BlockGeometry,
    layout: Layout | None, q_start: int, scale: float, stage: Stage, dq: Tensor | None = None,
) -> Tensor:  # fmt: skip
    """dq of the selected branch for fitting tensors; a given `dq` is added to in place."""
    B, T, H, Dk = q.shape
    S, Hkv, Dv = k.shape[1], k.shape[2], v.shape[3]
    add = dq is not None
    dq = torch.empty_like(q) if dq is None else dq
    if q.numel() == 0:
        return dq
    tile = stage.tile
    unions = make_unions(block_indices, geometry, layout, tile["TOKENS"])
    if stage.is_sm90:
        union_dq_sm90(dout, q, k, v, *rows, dq, *unions, geometry, q_start, scale, add, tile["programs"])
        return dq
    union_dq_kernel[(unions.counts.shape[1], B * Hkv)](
        q, *describe_keys(k, tile["BLOCK_N"]), describe(v, tile["BLOCK_N"]), dout, *rows, dq, unions.starts,
        unions.masks, unions.counts, scale, scale * LOG2E, LOG2E, T, S, q_start,
        H=H, HKV=Hkv, DK=Dk, TAIL=key_tail(Dk), DV=Dv, BLOCK=geometry.select_block_size,
        COUNT=geometry.num_selected_blocks, ADD=add, PRECISION=dot_precision(q), **tile,
    )  # fmt: skip
    return dq
