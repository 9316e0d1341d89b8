"""Forward of the compressed and the window branch: flash attention over the interval of keys that each query sees.

Shapes: q `[B, T, H, Dk]`, k `[B, S, Hkv, Dk]`, v `[B, S, Hkv, Dv]`. A tile holds BLOCK_M rows (token, head) of one
group. Keys that all rows of a tile see go through a loop without masks, the ends of the interval through another.
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
from nsa.ops.triton.dense.forward_sm90 import dense_forward_sm90
from nsa.ops.triton.dense.step import (
    KeyTiles,
    Mask,
    Pattern,
    attend_tile,
    describe,
    describe_keys,
    key_steps,
    masked_start,
    visible_keys,
)
from nsa.ops.triton.gpu import LN2, LOG2E, dot_precision, key_tail
from nsa.ops.triton.layout import Layout, document_pointers
from nsa.ops.triton.plan import Stage


@triton.jit(do_not_specialize=["T", "S", "q_start", "k_start"])
def dense_forward_kernel(
    q_ptr, k_desc, k_tail_desc, v_desc, out_ptr, lse_ptr, doc_ptr, cmp_ptr, scale_log2, T, S, q_start, k_start,
    H: tl.constexpr, HKV: tl.constexpr, DK: tl.constexpr, TAIL: tl.constexpr, DV: tl.constexpr,
    SIZE: tl.constexpr, STRIDE: tl.constexpr, WINDOW: tl.constexpr, PACKED: tl.constexpr, LN2: tl.constexpr,
    PRECISION: tl.constexpr, BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr,
):  # fmt: skip
    """Output and natural log-sum-exp of a tile of BLOCK_M rows of a pair (axis 1 of the grid)."""
    G: tl.constexpr = H // HKV
    tile = tl.num_programs(0) - 1 - tl.program_id(0)  # the heaviest tiles first
    b = tl.program_id(1) // HKV
    group = tl.program_id(1) % HKV
    row = tile * BLOCK_M + tl.arange(0, BLOCK_M)
    live = row < T * G
    t = tl.minimum(row // G, T - 1)  # rows past the end repeat the last token, within every tensor, and are not stored
    row_64 = (b.to(tl.int64) * T + t) * H + group * G + row % G
    MAIN: tl.constexpr = DK - TAIL
    q = tl.load(q_ptr + row_64[:, None] * DK + tl.arange(0, MAIN)[None, :], mask=live[:, None], other=0.0)
    q_tail = q
    if TAIL > 0:
        q_ptr += MAIN
        q_tail = tl.load(q_ptr + row_64[:, None] * DK + tl.arange(0, TAIL)[None, :], mask=live[:, None], other=0.0)

    mask = Mask(doc_ptr, cmp_ptr, S, q_start, k_start)
    PATTERN: tl.constexpr = Pattern(SIZE, STRIDE, WINDOW, PACKED)
    keys = KeyTiles(k_desc, k_tail_desc, v_desc, b * S, group * DK, group * DV)
    first, end = visible_keys(t, mask, PATTERN)
    steps = key_steps(tile, T, mask, PATTERN, G, BLOCK_M, BLOCK_N)
    acc = tl.zeros([BLOCK_M, DV], tl.float32)
    row_max = tl.full([BLOCK_M], float("-inf"), tl.float32)
    row_sum = tl.zeros([BLOCK_M], tl.float32)
    for key_start in tl.range(steps.full_start, steps.full_end, BLOCK_N):
        acc, row_max, row_sum = attend_tile(
            acc, row_max, row_sum, q, q_tail, keys, key_start, first, end, scale_log2, TAIL, False, PRECISION
        )
    for i in tl.range(steps.num_masked):
        acc, row_max, row_sum = attend_tile(
            acc, row_max, row_sum, q, q_tail, keys, masked_start(steps, i, BLOCK_N), first, end, scale_log2, TAIL,
            True, PRECISION,
        )  # fmt: skip

    # Rows that see no key have the sum 0: their output is 0, their log-sum-exp -inf.
    out = acc / tl.where(row_sum == 0.0, 1.0, row_sum)[:, None]
    lse = tl.where(row_sum == 0.0, float("-inf"), (row_max + tl.math.log2(row_sum)) * LN2)
    out_ptrs = out_ptr + row_64[:, None] * DV + tl.arange(0, DV)[None, :]
    tl.store(out_ptrs, out.to(out_ptr.dtype.element_ty), mask=live[:, None])
    tl.store(lse_ptr + row_64, lse, mask=live)


def dense_forward(
    q: Tensor, k: Tensor, v: Tensor, geometry: BlockGeometry, layout: Layout | None, window: int,
    q_start: int, k_start: int, scale: float, stage: Stage,
) -> tuple[Tensor, Tensor]:  # fmt: skip
    """Attention of fitting tensors over a window (window > 0) or over complete compressed blocks (window = 0)."""
    B, T, H, Dk = q.shape
    S, Hkv, Dv = k.shape[1], k.shape[2], v.shape[3]
    out, lse = q.new_empty(B, T, H, Dv), q.new_empty(B, T, H, dtype=torch.float32)
    if out.numel() == 0 or S == 0:
        return out.zero_(), lse.fill_(-torch.inf)
    if stage.is_sm90:
        dense_forward_sm90(q, k, v, out, lse, geometry, layout, window, q_start, k_start, scale, **stage.tile)
        return out, lse
    tile = stage.tile
    documents = document_pointers(layout, q, "doc_start", "cmp_start")
    grid = (triton.cdiv(T * (H // Hkv), tile["BLOCK_M"]), B * Hkv)
    dense_forward_kernel[grid](
        q, *describe_keys(k, tile["BLOCK_N"]), describe(v, tile["BLOCK_N"]), out, lse, *documents,
        scale * LOG2E, T, S, q_start, k_start, H=H, HKV=Hkv, DK=Dk, TAIL=key_tail(Dk), DV=Dv,
        SIZE=geometry.compress_block_size,
        STRIDE=geometry.compress_stride, WINDOW=window, PACKED=layout is not None, LN2=LN2,
        PRECISION=dot_precision(q), **tile,
    )  # fmt: skip
    return out, lse
