"""Backward of the compressed and the window branch, without atomics: seven products in two kernels.

One kernel holds a tile of keys and runs over the rows that see it (dK, dV in registers), the other a tile of rows and
runs over its keys (dQ). The first compressed tokens are seen by almost all rows: the rows are cut into `splits`, each
writes its own fp32 dK and dV, and these are added in order, so that the result is bitwise repeatable.

Shapes: q, dq `[B, T, H, Dk]`, out, dout `[B, T, H, Dv]`, lse, delta `[B, T, H]`, k `[B, S, Hkv, Dk]`.
"""

# Kernels are typed by Triton, not by Python.
# pyright: reportArgumentType=false, reportCallIssue=false, reportAttributeAccessIssue=false, reportReturnType=false
# pyright: reportGeneralTypeIssues=false, reportPossiblyUnboundVariable=false, reportAssignmentType=false
from __future__ import annotations

from typing import Any, NamedTuple

import torch
import triton
import triton.language as tl
from torch import Tensor
from triton.tools.tensor_descriptor import TensorDescriptor

from nsa.geometry import BlockGeometry
from nsa.ops.triton.dense.dkdv_sm90 import dense_dkdv_sm90
from nsa.ops.triton.dense.dq_sm90 import dense_dq_sm90
from nsa.ops.triton.dense.step import (
    KeyTiles,
    Mask,
    Pattern,
    cut_steps,
    describe,
    describe_keys,
    key_steps,
    masked_start,
    query_step,
    visible_keys,
)
from nsa.ops.triton.gates import Rows
from nsa.ops.triton.gpu import LOG2E, dot_precision, key_tail
from nsa.ops.triton.layout import Layout, document_pointers, query_interval
from nsa.ops.triton.plan import Dense
from nsa.ops.triton.tiles import Tile


@triton.jit(do_not_specialize=["num_rows"])
def delta_kernel(
    out_ptr, dout_ptr, dlse_ptr, delta_ptr, num_rows, DV: tl.constexpr, DLSE: tl.constexpr, ROWS: tl.constexpr
):
    """delta = sum(out * dout) - dlse, so that dS = P (dP - delta) covers the log-sum-exp's gradient too."""
    row = tl.program_id(0).to(tl.int64) * ROWS + tl.arange(0, ROWS)
    offset = row[:, None] * DV + tl.arange(0, DV)[None, :]
    live = row < num_rows
    out = tl.load(out_ptr + offset, mask=live[:, None], other=0.0).to(tl.float32)
    dout = tl.load(dout_ptr + offset, mask=live[:, None], other=0.0).to(tl.float32)
    delta = tl.sum(out * dout, 1)
    if DLSE:  # d lse / d s = P, so that its gradient enters dS beside delta
        delta -= tl.load(dlse_ptr + row, mask=live, other=0.0)
    tl.store(delta_ptr + row, delta, mask=live)


def make_delta(out: Tensor, dout: Tensor, dlse: Tensor | None) -> Tensor:
    """fp32 `[B, T, H]` from `[B, T, H, Dv]`."""
    delta = torch.empty(out.shape[:3], dtype=torch.float32, device=out.device)
    dlse_fit = None if dlse is None else dlse.float().contiguous()
    rows = 16
    delta_kernel[(triton.cdiv(delta.numel(), rows),)](
        out, dout, out if dlse_fit is None else dlse_fit, delta, delta.numel(),
        DV=out.shape[3], DLSE=dlse is not None, ROWS=rows,
    )  # fmt: skip
    return delta


class KeyTile(NamedTuple):
    """The keys and values that a program of `dense_dkdv_kernel` holds, and their numbers `[BLOCK_N]`."""

    k: Any
    k_tail: Any
    v: Any
    key: Any


class QueryTiles(NamedTuple):
    """Where the rows of a pair are loaded from.

    Attributes:
        q, q_tail, dout: descriptors of `describe_rows` with TMA, else pointers (one for q and its tail).
        lse_ptr, delta_ptr: one number a row.
        first_token: of the batch row among all tokens; int64.
        first_head: of the group among the heads.
    """

    q: Any
    q_tail: Any
    dout: Any
    lse_ptr: Any
    delta_ptr: Any
    first_token: Any
    first_head: Any


class RowShape(NamedTuple):
    """Constants of a step of BLOCK_M rows: H heads, G of a group, keys of DK columns, of which TAIL are the tail."""

    H: Any
    G: Any
    DK: Any
    TAIL: Any
    DV: Any
    BLOCK_M: Any


@triton.jit
def _key_step(
    dk, dk_tail, dv, held, rows, mask, row_start, row_end, scale_log2, log2e, SHAPE: tl.constexpr,
    PATTERN: tl.constexpr, TMA: tl.constexpr, MASKED: tl.constexpr, PRECISION: tl.constexpr,
):  # fmt: skip
    """What rows [row_start, row_start + BLOCK_M) before row_end add to dK (before the scale) and dV of the keys held.

    Scores are held transposed, `[BLOCK_N, BLOCK_M]`, so that p and dS are the left operands of the products with dout
    and q.
    """
    BLOCK_M: tl.constexpr = SHAPE.BLOCK_M
    TAIL: tl.constexpr = SHAPE.TAIL
    MAIN: tl.constexpr = SHAPE.DK - TAIL
    row = row_start + tl.arange(0, BLOCK_M)
    if MASKED:
        live = row < row_end
        row = tl.minimum(row, row_end - 1)  # loads need no mask then
    t = row // SHAPE.G
    row_64 = (rows.first_token + t) * SHAPE.H + rows.first_head + row % SHAPE.G
    if TMA:
        box = [(rows.first_token + row_start // SHAPE.G).to(tl.int32), rows.first_head, 0]
        q = tl.reshape(rows.q.load(box), [BLOCK_M, MAIN])
    else:
        q = tl.load(rows.q + row_64[:, None] * SHAPE.DK + tl.arange(0, MAIN)[None, :])
    lse = tl.load(rows.lse_ptr + row_64) * log2e
    s = tl.dot(held.k, tl.trans(q), input_precision=PRECISION)
    if TAIL > 0:
        if TMA:
            q_tail = tl.reshape(rows.q_tail.load([box[0], rows.first_head, MAIN]), [BLOCK_M, TAIL])
        else:
            q_tail = tl.load(rows.q + row_64[:, None] * SHAPE.DK + MAIN + tl.arange(0, TAIL)[None, :])
        s = tl.dot(held.k_tail, tl.trans(q_tail), s, input_precision=PRECISION)
    p = tl.math.exp2(s * scale_log2 - lse[None, :])
    if MASKED:  # after the exponential: a row that sees nothing has lse = -inf and p = inf here
        first, end = visible_keys(t, mask, PATTERN)
        seen = (held.key[:, None] >= first[None, :]) & (held.key[:, None] < end[None, :]) & live[None, :]
        p = tl.where(seen, p, 0.0)
    if TMA:
        dout = tl.reshape(rows.dout.load(box), [BLOCK_M, SHAPE.DV])
    else:
        dout = tl.load(rows.dout + row_64[:, None] * SHAPE.DV + tl.arange(0, SHAPE.DV)[None, :])
    dv = tl.dot(p.to(dout.dtype), dout, dv, input_precision=PRECISION)
    delta = tl.load(rows.delta_ptr + row_64)
    ds = p * (tl.dot(held.v, tl.trans(dout), input_precision=PRECISION) - delta[None, :])
    dk = tl.dot(ds.to(q.dtype), q, dk, input_precision=PRECISION)
    if TAIL > 0:
        dk_tail = tl.dot(ds.to(q.dtype), q_tail, dk_tail, input_precision=PRECISION)
    return dk, dk_tail, dv


@triton.jit
def row_steps(
    mask, first_ptr, end_ptr, T, split, split_rows, PATTERN: tl.constexpr, G: tl.constexpr, BLOCK_M: tl.constexpr,
    BLOCK_N: tl.constexpr,
):  # fmt: skip
    """Steps over the rows of a split that see any of a program's keys; pointers as in `query_interval`."""
    # Queries' intervals never decrease: the first key is seen first, and first out of sight.
    key_low = tl.program_id(0) * BLOCK_N
    key_high = tl.minimum(key_low + BLOCK_N, mask.S) - 1
    t_low, t_low_end = query_interval(
        key_low, first_ptr, end_ptr, T, mask.q_start, mask.k_start, PATTERN.SIZE, PATTERN.STRIDE, PATTERN.WINDOW,
        PATTERN.PACKED,
    )  # fmt: skip
    t_high, t_high_end = query_interval(
        key_high, first_ptr, end_ptr, T, mask.q_start, mask.k_start, PATTERN.SIZE, PATTERN.STRIDE, PATTERN.WINDOW,
        PATTERN.PACKED,
    )  # fmt: skip
    if PATTERN.PACKED and PATTERN.WINDOW > 0:  # outside any document nothing is seen: masks throughout
        t_low_end = tl.where(tl.load(mask.doc_ptr + key_high) < T, t_low_end, 0)
    row_low = tl.maximum(t_low * G, split * split_rows)
    row_end = tl.minimum(t_high_end * G, (split + 1) * split_rows)
    num_left = tl.cdiv(tl.maximum(tl.minimum(t_high * G, row_end) - row_low, 0), BLOCK_M)
    return cut_steps(row_low, num_left, tl.minimum(t_low_end * G, row_end), row_end, BLOCK_M)


@triton.jit(do_not_specialize=["T", "S", "q_start", "k_start", "split_rows"])
def dense_dkdv_kernel(
    q_ptr, q_tail_ptr, k_ptr, v_ptr, dout_ptr, lse_ptr, delta_ptr, dk_ptr, dv_ptr, doc_ptr, cmp_ptr,
    first_ptr, end_ptr, scale, scale_log2, log2e, T, S, q_start, k_start, split_rows,
    H: tl.constexpr, HKV: tl.constexpr, DK: tl.constexpr, TAIL: tl.constexpr, DV: tl.constexpr,
    SIZE: tl.constexpr, STRIDE: tl.constexpr, WINDOW: tl.constexpr, PACKED: tl.constexpr,
    PRECISION: tl.constexpr, TMA: tl.constexpr, BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr,
):  # fmt: skip
    """dK and dV of BLOCK_N keys of a pair (axis 1 of the grid) from `split_rows` rows (axis 2)."""
    G: tl.constexpr = H // HKV
    b = (tl.program_id(1) // HKV).to(tl.int64)
    group = tl.program_id(1) % HKV
    split = tl.program_id(2)
    key = tl.program_id(0) * BLOCK_N + tl.arange(0, BLOCK_N)
    live_key = (key < S)[:, None]
    key_row = (b * S + key) * HKV + group
    MAIN: tl.constexpr = DK - TAIL
    k_offset = key_row[:, None] * DK + tl.arange(0, MAIN)[None, :]
    v_offset = key_row[:, None] * DV + tl.arange(0, DV)[None, :]
    k = tl.load(k_ptr + k_offset, mask=live_key, other=0.0)
    dk = tl.zeros([BLOCK_N, MAIN], tl.float32)
    k_tail, dk_tail, tail_offset = k, dk, k_offset
    if TAIL > 0:
        tail_offset = key_row[:, None] * DK + MAIN + tl.arange(0, TAIL)[None, :]
        k_tail = tl.load(k_ptr + tail_offset, mask=live_key, other=0.0)
        dk_tail = tl.zeros([BLOCK_N, TAIL], tl.float32)
    v = tl.load(v_ptr + v_offset, mask=live_key, other=0.0)

    held = KeyTile(k, k_tail, v, key)
    rows = QueryTiles(q_ptr, q_tail_ptr, dout_ptr, lse_ptr, delta_ptr, b * T, group * G)
    SHAPE: tl.constexpr = RowShape(H, G, DK, TAIL, DV, BLOCK_M)
    mask = Mask(doc_ptr, cmp_ptr, S, q_start, k_start)
    PATTERN: tl.constexpr = Pattern(SIZE, STRIDE, WINDOW, PACKED)
    steps = row_steps(mask, first_ptr, end_ptr, T, split, split_rows, PATTERN, G, BLOCK_M, BLOCK_N)
    dv = tl.zeros([BLOCK_N, DV], tl.float32)
    for row_start in tl.range(steps.full_start, steps.full_end, BLOCK_M):
        dk, dk_tail, dv = _key_step(
            dk, dk_tail, dv, held, rows, mask, row_start, steps.end, scale_log2, log2e, SHAPE, PATTERN, TMA, False,
            PRECISION,
        )  # fmt: skip
    for i in tl.range(steps.num_masked):
        dk, dk_tail, dv = _key_step(
            dk, dk_tail, dv, held, rows, mask, masked_start(steps, i, BLOCK_M), steps.end, scale_log2, log2e, SHAPE,
            PATTERN, TMA, True, PRECISION,
        )  # fmt: skip

    # Each split has a dK and dV of its own, which are added in order afterwards; atomics would have no order.
    shift = split * (tl.num_programs(1) // HKV).to(tl.int64) * S * HKV
    tl.store(dk_ptr + shift * DK + k_offset, (dk * scale).to(dk_ptr.dtype.element_ty), mask=live_key)
    if TAIL > 0:
        tl.store(dk_ptr + shift * DK + tail_offset, (dk_tail * scale).to(dk_ptr.dtype.element_ty), mask=live_key)
    tl.store(dv_ptr + shift * DV + v_offset, dv.to(dv_ptr.dtype.element_ty), mask=live_key)


@triton.jit(do_not_specialize=["T", "S", "q_start", "k_start"])
def dense_dq_kernel(
    q_ptr, k_desc, k_tail_desc, v_desc, dout_ptr, lse_ptr, delta_ptr, dq_ptr, doc_ptr, cmp_ptr,
    scale, scale_log2, log2e, T, S, q_start, k_start,
    H: tl.constexpr, HKV: tl.constexpr, DK: tl.constexpr, TAIL: tl.constexpr, DV: tl.constexpr,
    SIZE: tl.constexpr, STRIDE: tl.constexpr, WINDOW: tl.constexpr, PACKED: tl.constexpr,
    ADD: tl.constexpr, PRECISION: tl.constexpr, BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr,
):  # fmt: skip
    """dQ of a tile of rows; ADD puts it on top of what `dq_ptr` holds."""
    G: tl.constexpr = H // HKV
    tile = tl.num_programs(0) - 1 - tl.program_id(0)  # the heaviest tiles first
    b = tl.program_id(1) // HKV
    group = tl.program_id(1) % HKV
    row = tile * BLOCK_M + tl.arange(0, BLOCK_M)
    live = row < T * G
    t = tl.minimum(row // G, T - 1)  # rows past the end repeat the last token, within every tensor, and are not stored
    row_64 = (b.to(tl.int64) * T + t) * H + group * G + row % G
    MAIN: tl.constexpr = DK - TAIL
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

    mask = Mask(doc_ptr, cmp_ptr, S, q_start, k_start)
    PATTERN: tl.constexpr = Pattern(SIZE, STRIDE, WINDOW, PACKED)
    keys = KeyTiles(k_desc, k_tail_desc, v_desc, b * S, group * DK, group * DV)
    first, end = visible_keys(t, mask, PATTERN)
    steps = key_steps(tile, T, mask, PATTERN, G, BLOCK_M, BLOCK_N)
    for key_start in tl.range(steps.full_start, steps.full_end, BLOCK_N):
        dq, dq_tail = query_step(
            dq, dq_tail, q, q_tail, dout, lse, delta, keys, key_start, first, end, scale_log2, TAIL, False, PRECISION
        )
    for i in tl.range(steps.num_masked):
        dq, dq_tail = query_step(
            dq, dq_tail, q, q_tail, dout, lse, delta, keys, masked_start(steps, i, BLOCK_N), first, end, scale_log2,
            TAIL, True, PRECISION,
        )  # fmt: skip
    dq *= scale  # once here, not at each step
    if ADD:
        dq += tl.load(dq_ptr + q_offset, mask=live[:, None], other=0.0).to(tl.float32)
    tl.store(dq_ptr + q_offset, dq.to(dq_ptr.dtype.element_ty), mask=live[:, None])
    if TAIL > 0:
        dq_tail *= scale
        if ADD:
            dq_tail += tl.load(dq_ptr + tail_offset, mask=live[:, None], other=0.0).to(tl.float32)
        tl.store(dq_ptr + tail_offset, dq_tail.to(dq_ptr.dtype.element_ty), mask=live[:, None])


def describe_rows(x: Tensor, rows: int, group_size: int, columns: int) -> TensorDescriptor:
    """Boxes of `rows` rows, whole tokens with one group's heads, of `[B, T, H, D]` seen as `[B*T, H, D]`."""
    B, T, heads, dim = x.shape
    return TensorDescriptor(x, [B * T, heads, dim], [heads * dim, dim, 1], [rows // group_size, group_size, columns])


def dense_backward(
    dout: Tensor, q: Tensor, k: Tensor, v: Tensor, rows: Rows, geometry: BlockGeometry, layout: Layout | None,
    window: int, q_start: int, k_start: int, scale: float, plan: Dense, dq: Tensor | None = None,
) -> tuple[Tensor, Tensor, Tensor]:  # fmt: skip
    """dq, dk, dv of `dense_forward`, for fitting tensors; a given `dq` is added to in place."""
    if q.numel() == 0 or k.numel() == 0:
        return torch.zeros_like(q) if dq is None else dq, torch.zeros_like(k), torch.zeros_like(v)
    dtype = q.dtype if plan.splits == 1 else torch.float32  # what is added up is rounded once
    dk = torch.empty(plan.splits, *k.shape, dtype=dtype, device=q.device)
    dv = torch.empty(plan.splits, *v.shape, dtype=dtype, device=q.device)
    what = (geometry, layout, window, q_start, k_start, scale)
    if plan.dkdv.is_sm90:
        dense_dkdv_sm90(dout, q, k, v, *rows, dk, dv, *what)
    else:
        _launch_dkdv(dout, q, k, v, rows, dk, dv, *what, plan.dkdv.tile)
    add = dq is not None
    dq = torch.empty_like(q) if dq is None else dq
    if plan.dq.is_sm90:
        dense_dq_sm90(dout, q, k, v, *rows, dq, *what, add, **plan.dq.tile)
    else:
        _launch_dq(dout, q, k, v, rows, dq, *what, add, plan.dq.tile)
    if plan.splits == 1:
        return dq, dk[0], dv[0]
    return dq, dk.sum(0).to(k.dtype), dv.sum(0).to(v.dtype)


def _launch_dkdv(
    dout: Tensor, q: Tensor, k: Tensor, v: Tensor, rows: Rows, dk: Tensor, dv: Tensor, geometry: BlockGeometry,
    layout: Layout | None, window: int, q_start: int, k_start: int, scale: float, tile: Tile,
) -> None:  # fmt: skip
    """Write dk and dv `[splits, B, S, Hkv, D]` of each split's rows."""
    B, T, H, Dk = q.shape
    S, Hkv, Dv = k.shape[1], k.shape[2], v.shape[3]
    G, tail, splits, block_m = H // Hkv, key_tail(Dk), dk.shape[0], tile["BLOCK_M"]
    doc_end = "doc_end" if window else "cmp_doc_end"
    documents = document_pointers(layout, q, "doc_start", "cmp_start", "cmp_token", doc_end)
    q_rows, tail_rows, dout_rows = q, q, dout
    if tile["TMA"]:  # one box a step is faster than an address for each row
        q_rows, dout_rows = describe_rows(q, block_m, G, Dk - tail), describe_rows(dout, block_m, G, Dv)
        tail_rows = describe_rows(q, block_m, G, tail) if tail else q_rows
    dense_dkdv_kernel[(triton.cdiv(S, tile["BLOCK_N"]), B * Hkv, splits)](
        q_rows, tail_rows, k, v, dout_rows, *rows, dk, dv, *documents, scale, scale * LOG2E, LOG2E, T, S, q_start,
        k_start, triton.cdiv(T, splits) * G,
        **_constants(q, k, v, geometry, layout, window), **tile,
    )  # fmt: skip


def _launch_dq(
    dout: Tensor, q: Tensor, k: Tensor, v: Tensor, rows: Rows, dq: Tensor, geometry: BlockGeometry,
    layout: Layout | None, window: int, q_start: int, k_start: int, scale: float, add: bool, tile: Tile,
) -> None:  # fmt: skip
    """Write dq, or add to it."""
    B, T, H, _ = q.shape
    S, Hkv = k.shape[1], k.shape[2]
    documents = document_pointers(layout, q, "doc_start", "cmp_start")
    dense_dq_kernel[(triton.cdiv(T * (H // Hkv), tile["BLOCK_M"]), B * Hkv)](
        q, *describe_keys(k, tile["BLOCK_N"]), describe(v, tile["BLOCK_N"]), dout, *rows, dq, *documents, scale,
        scale * LOG2E, LOG2E, T, S, q_start, k_start,
        ADD=add, **_constants(q, k, v, geometry, layout, window), **tile,
    )  # fmt: skip


def _constants(
    q: Tensor, k: Tensor, v: Tensor, geometry: BlockGeometry, layout: Layout | None, window: int
) -> dict[str, Any]:
    """What both kernels are compiled for."""
    return {
        "H": q.shape[2], "HKV": k.shape[2], "DK": q.shape[3], "TAIL": key_tail(q.shape[3]), "DV": v.shape[3],
        "SIZE": geometry.compress_block_size, "STRIDE": geometry.compress_stride, "WINDOW": window,
        "PACKED": layout is not None, "PRECISION": dot_precision(q),
    }  # fmt: skip
