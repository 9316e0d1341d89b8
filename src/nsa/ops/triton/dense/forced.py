"""Forward of the selected branch's forced blocks: the same keys for all queries of a block, so that tiles are dense.

A query sees two intervals of keys: its document's first blocks, and its own block with those before it, up to itself.
Both ends of both never decrease, packed documents included. On Hopper `forward_sm90.py` attends to them.

Shapes: q `[B, T, H, Dk]`, k `[B, S, Hkv, Dk]`, v `[B, S, Hkv, Dv]`; a tile holds BLOCK_M rows (token, head of a group).
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
from nsa.ops.triton.dense.forward_sm90 import dense_forward_sm90
from nsa.ops.triton.dense.step import KeyTiles, attend_tile, describe, describe_keys
from nsa.ops.triton.gpu import LN2, LOG2E, dot_precision, key_tail
from nsa.ops.triton.layout import Layout, document_pointers, local_start, num_early
from nsa.ops.triton.plan import Stage


@triton.jit
def forced_interval(
    t, doc_ptr, S, q_start, BLOCK: tl.constexpr, INIT: tl.constexpr, LOCAL: tl.constexpr, PACKED: tl.constexpr,
    LOCAL_PART: tl.constexpr,
):  # fmt: skip
    """Keys [first, end) of the local blocks (LOCAL_PART) or of the initial blocks before them."""
    doc = t * 0
    if PACKED:
        doc = tl.load(doc_ptr + t)
    first = local_start(t + q_start, doc, BLOCK, LOCAL)
    end = t + q_start + 1
    if not LOCAL_PART:
        first = doc
        end = doc + num_early(t + q_start, doc, BLOCK, INIT, LOCAL)
    return tl.minimum(first, S), tl.minimum(tl.maximum(first, end), S)


@triton.jit(do_not_specialize=["T", "S", "q_start"])
def forced_forward_kernel(
    q_ptr, k_desc, k_tail_desc, v_desc, out_ptr, lse_ptr, doc_ptr, scale_log2, T, S, q_start,
    H: tl.constexpr, HKV: tl.constexpr, DK: tl.constexpr, TAIL: tl.constexpr, DV: tl.constexpr,
    BLOCK: tl.constexpr, INIT: tl.constexpr, LOCAL: tl.constexpr, PACKED: tl.constexpr, LN2: tl.constexpr,
    PRECISION: tl.constexpr, BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr,
):  # fmt: skip
    """Output and natural log-sum-exp of a tile of BLOCK_M rows of a pair (axis 1 of the grid), over forced blocks."""
    G: tl.constexpr = H // HKV
    MAIN: tl.constexpr = DK - TAIL
    tile = tl.program_id(0)
    b = tl.program_id(1) // HKV
    group = tl.program_id(1) % HKV
    row = tile * BLOCK_M + tl.arange(0, BLOCK_M)
    live = row < T * G
    t = tl.minimum(row // G, T - 1)  # rows past the end repeat the last token, within every tensor, and are not stored
    row_64 = (b.to(tl.int64) * T + t) * H + group * G + row % G
    q = tl.load(q_ptr + row_64[:, None] * DK + tl.arange(0, MAIN)[None, :], mask=live[:, None], other=0.0)
    q_tail = q
    if TAIL > 0:
        q_ptr += MAIN
        q_tail = tl.load(q_ptr + row_64[:, None] * DK + tl.arange(0, TAIL)[None, :], mask=live[:, None], other=0.0)
    t_low = (tile * BLOCK_M) // G
    t_high = tl.minimum((tile * BLOCK_M + BLOCK_M - 1) // G, T - 1)
    keys = KeyTiles(k_desc, k_tail_desc, v_desc, b * S, group * DK, group * DV)
    acc = tl.zeros([BLOCK_M, DV], tl.float32)
    row_max = tl.full([BLOCK_M], float("-inf"), tl.float32)
    row_sum = tl.zeros([BLOCK_M], tl.float32)
    for local_part in tl.static_range(2):
        first, end = forced_interval(t, doc_ptr, S, q_start, BLOCK, INIT, LOCAL, PACKED, local_part)
        low, _ = forced_interval(t_low, doc_ptr, S, q_start, BLOCK, INIT, LOCAL, PACKED, local_part)
        _, high = forced_interval(t_high, doc_ptr, S, q_start, BLOCK, INIT, LOCAL, PACKED, local_part)
        for key_start in tl.range(low, high, BLOCK_N):
            # A tile in which a document begins skips what lies between the documents' first blocks.
            seen = True
            if PACKED:
                seen = tl.max(((first < key_start + BLOCK_N) & (end > key_start)).to(tl.int32), 0) > 0
            if seen:  # masked throughout: a tile has few steps here, and most of them hold an end of the interval
                acc, row_max, row_sum = attend_tile(
                    acc, row_max, row_sum, q, q_tail, keys, key_start, first, end, scale_log2, TAIL, True, PRECISION
                )
    # Outside any document a row sees no key, and its sum is 0.
    out = acc / tl.where(row_sum == 0.0, 1.0, row_sum)[:, None]
    lse = tl.where(row_sum == 0.0, float("-inf"), (row_max + tl.math.log2(row_sum)) * LN2)
    out_ptrs = out_ptr + row_64[:, None] * DV + tl.arange(0, DV)[None, :]
    tl.store(out_ptrs, out.to(out_ptr.dtype.element_ty), mask=live[:, None])
    tl.store(lse_ptr + row_64, lse, mask=live)


def forced_forward(
    q: Tensor, k: Tensor, v: Tensor, geometry: BlockGeometry, layout: Layout | None, q_start: int, scale: float,
    stage: Stage,
) -> tuple[Tensor, Tensor]:  # fmt: skip
    """Attention of fitting tensors over the forced blocks alone: output and natural log-sum-exp."""
    B, T, H, Dk = q.shape
    S, Hkv, Dv = k.shape[1], k.shape[2], v.shape[3]
    out, lse = q.new_empty(B, T, H, Dv), q.new_empty(B, T, H, dtype=torch.float32)
    if out.numel() == 0:
        return out, lse
    if stage.is_sm90:
        dense_forward_sm90(q, k, v, out, lse, geometry, layout, 0, q_start, 0, scale, forced=True, **stage.tile)
        return out, lse
    tile = stage.tile
    forced_forward_kernel[(triton.cdiv(T * (H // Hkv), tile["BLOCK_M"]), B * Hkv)](
        q, *describe_keys(k, tile["BLOCK_N"]), describe(v, tile["BLOCK_N"]), out, lse,
        *document_pointers(layout, q, "doc_start"), scale * LOG2E, T, S, q_start,
        H=H, HKV=Hkv, DK=Dk, TAIL=key_tail(Dk), DV=Dv, BLOCK=geometry.select_block_size, INIT=geometry.num_init_blocks,
        LOCAL=geometry.num_local_blocks, PACKED=layout is not None, LN2=LN2, PRECISION=dot_precision(q), **tile,
    )  # fmt: skip
    return out, lse
