"""Backward of the compressed and the window branch, without atomics: seven products in two kernels.

One kernel holds a tile of keys and runs over the rows that see it (dK, dV in registers), the other a tile of rows and
runs over its keys (dQ). The first compressed tokens are seen by almost all rows: the rows are cut into `splits`, each
writes its own fp32 dK and dV, and these are added in order, so that the result is bitwise repeatable.

Shapes: q, dq `[B, T, H, Dk]`, out, dout `[B, T, H, Dv]`, lse, delta `[B, T, H]`, k `[B, S, Hkv, Dk]`.
"""

# Kernels are typed by Triton, not by Python.
# pyright: reportArgumentType=false, reportCallIssue=false, reportAttributeAccessIssue=false, reportReturnType=false
# pyright: reportGeneralTypeIssues=false, reportPossiblyUnboundVariable=false
from __future__ import annotations

from typing import Any

import torch
import triton
import triton.language as tl
from torch import Tensor
from triton.tools.tensor_descriptor import TensorDescriptor

from nsa.geometry import BlockGeometry
from nsa.ops.triton.dense.dkdv_sm90 import dense_dkdv_sm90
from nsa.ops.triton.dense.dq_sm90 import dense_dq_sm90
from nsa.ops.triton.dense.step import describe, describe_keys, query_step
from nsa.ops.triton.gates import Rows
from nsa.ops.triton.gpu import LOG2E, dot_precision, key_tail
from nsa.ops.triton.layout import Layout, document_pointers, key_interval, query_interval
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
    if DLSE:
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


@triton.jit
def _key_step(
    dk, dk_tail, dv, k, k_tail, v, q_ptr, q_tail_ptr, dout_ptr, lse_ptr, delta_ptr, doc_ptr, cmp_ptr,
    row_start, row_end, batch_row, head, key, scale_log2, log2e, T, S, q_start, k_start,
    H: tl.constexpr, G: tl.constexpr, DK: tl.constexpr, TAIL: tl.constexpr, DV: tl.constexpr, SIZE: tl.constexpr,
    STRIDE: tl.constexpr, WINDOW: tl.constexpr, PACKED: tl.constexpr, TMA: tl.constexpr,
    MASKED: tl.constexpr, PRECISION: tl.constexpr, BLOCK_M: tl.constexpr,
):  # fmt: skip
    MAIN: tl.constexpr = DK - TAIL
    row = row_start + tl.arange(0, BLOCK_M)
    if MASKED:
        live = row < row_end
        row = tl.minimum(row, row_end - 1)
    t = row // G
    row_64 = (batch_row + t) * H + head + row % G
    if TMA:
        box = [(batch_row + row_start // G).to(tl.int32), head, 0]
        q = tl.reshape(q_ptr.load(box), [BLOCK_M, MAIN])
    else:
        q = tl.load(q_ptr + row_64[:, None] * DK + tl.arange(0, MAIN)[None, :])
    lse = tl.load(lse_ptr + row_64) * log2e
    s = tl.dot(k, tl.trans(q), input_precision=PRECISION)
    if TAIL > 0:
        if TMA:
            q_tail = tl.reshape(q_tail_ptr.load([box[0], head, MAIN]), [BLOCK_M, TAIL])
        else:
            q_tail = tl.load(q_ptr + row_64[:, None] * DK + MAIN + tl.arange(0, TAIL)[None, :])
        s = tl.dot(k_tail, tl.trans(q_tail), s, input_precision=PRECISION)
    p = tl.math.exp2(s * scale_log2 - lse[None, :])
    if MASKED:
        first, end = key_interval(t, doc_ptr, cmp_ptr, S, q_start, k_start, SIZE, STRIDE, WINDOW, PACKED)
        seen = (key[:, None] >= first[None, :]) & (key[:, None] < end[None, :]) & live[None, :]
        p = tl.where(seen, p, 0.0)
    if TMA:
        dout = tl.reshape(dout_ptr.load(box), [BLOCK_M, DV])
    else:
        dout = tl.load(dout_ptr + row_64[:, None] * DV + tl.arange(0, DV)[None, :])
    dv = tl.dot(p.to(dout.dtype), dout, dv, input_precision=PRECISION)
    delta = tl.load(delta_ptr + row_64)
    ds = p * (tl.dot(v, tl.trans(dout), input_precision=PRECISION) - delta[None, :])
    dk = tl.dot(ds.to(q.dtype), q, dk, input_precision=PRECISION)
    if TAIL > 0:
        dk_tail = tl.dot(ds.to(q.dtype), q_tail, dk_tail, input_precision=PRECISION)
    return dk, dk_tail, dv


@triton.jit(do_not_specialize=["T", "S", "q_start", "k_start", "split_rows"])
def dense_dkdv_kernel(
    q_ptr, q_tail_ptr, k_ptr, v_ptr, dout_ptr, lse_ptr, delta_ptr, dk_ptr, dv_ptr, doc_ptr, cmp_ptr,
    first_ptr, end_ptr, scale, scale_log2, log2e, T, S, q_start, k_start, split_rows,
    H: tl.constexpr, HKV: tl.constexpr, DK: tl.constexpr, TAIL: tl.constexpr, DV: tl.constexpr,
    SIZE: tl.constexpr, STRIDE: tl.constexpr, WINDOW: tl.constexpr, PACKED: tl.constexpr,
    PRECISION: tl.constexpr, TMA: tl.constexpr, BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr,
):  # fmt: skip
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

    key_low = tl.program_id(0) * BLOCK_N
    key_high = tl.minimum(key_low + BLOCK_N, S) - 1
    t_low, t_low_end = query_interval(key_low, first_ptr, end_ptr, T, q_start, k_start, SIZE, STRIDE, WINDOW, PACKED)
    t_high, t_high_end = query_interval(key_high, first_ptr, end_ptr, T, q_start, k_start, SIZE, STRIDE, WINDOW, PACKED)
    if PACKED and WINDOW > 0:  # outside any document nothing is seen: masks throughout
        t_low_end = tl.where(tl.load(doc_ptr + key_high) < T, t_low_end, 0)
    row_low = tl.maximum(t_low * G, split * split_rows)
    row_end = tl.minimum(t_high_end * G, (split + 1) * split_rows)
    num_left = tl.cdiv(tl.maximum(tl.minimum(t_high * G, row_end) - row_low, 0), BLOCK_M)
    full_start = row_low + num_left * BLOCK_M
    full_end = full_start + tl.maximum(tl.minimum(t_low_end * G, row_end) - full_start, 0) // BLOCK_M * BLOCK_M
    num_masked = num_left + tl.cdiv(tl.maximum(row_end - full_end, 0), BLOCK_M)

    dv = tl.zeros([BLOCK_N, DV], tl.float32)
    for row_start in tl.range(full_start, full_end, BLOCK_M):
        dk, dk_tail, dv = _key_step(
            dk, dk_tail, dv, k, k_tail, v, q_ptr, q_tail_ptr, dout_ptr, lse_ptr, delta_ptr, doc_ptr, cmp_ptr,
            row_start, row_end, b * T, group * G, key, scale_log2, log2e, T, S, q_start, k_start,
            H, G, DK, TAIL, DV, SIZE, STRIDE, WINDOW, PACKED, TMA, False, PRECISION, BLOCK_M,
        )  # fmt: skip
    for i in tl.range(num_masked):
        row_start = tl.where(i < num_left, row_low + i * BLOCK_M, full_end + (i - num_left) * BLOCK_M)
        dk, dk_tail, dv = _key_step(
            dk, dk_tail, dv, k, k_tail, v, q_ptr, q_tail_ptr, dout_ptr, lse_ptr, delta_ptr, doc_ptr, cmp_ptr,
            row_start, row_end, b * T, group * G, key, scale_log2, log2e, T, S, q_start, k_start,
            H, G, DK, TAIL, DV, SIZE, STRIDE, WINDOW, PACKED, TMA, True, PRECISION, BLOCK_M,
        )  # fmt: skip

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
    tile = tl.num_programs(0) - 1 - tl.program_id(0)
    b = tl.program_id(1) // HKV
    group = tl.program_id(1) % HKV
    row = tile * BLOCK_M + tl.arange(0, BLOCK_M)
    live = row < T * G
    t = tl.minimum(row // G, T - 1)
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

    first, end = key_interval(t, doc_ptr, cmp_ptr, S, q_start, k_start, SIZE, STRIDE, WINDOW, PACKED)
    t_low = (tile * BLOCK_M) // G
    t_high = tl.minimum((tile * BLOCK_M + BLOCK_M - 1) // G, T - 1)
    first_low, end_low = key_interval(t_low, doc_ptr, cmp_ptr, S, q_start, k_start, SIZE, STRIDE, WINDOW, PACKED)
    first_high, end_high = key_interval(t_high, doc_ptr, cmp_ptr, S, q_start, k_start, SIZE, STRIDE, WINDOW, PACKED)
    num_left = tl.cdiv(first_high - first_low, BLOCK_N)
    full_start = first_low + num_left * BLOCK_N
    full_end = full_start + tl.maximum(end_low - full_start, 0) // BLOCK_N * BLOCK_N
    num_masked = num_left + tl.cdiv(tl.maximum(end_high - full_end, 0), BLOCK_N)

    for key_start in tl.range(full_start, full_end, BLOCK_N):
        dq, dq_tail = query_step(
            dq, dq_tail, q, q_tail, dout, lse, delta, k_desc, k_tail_desc, v_desc, key_start, b * S, group * DK,
            group * DV, first, end, scale_log2, TAIL, MAIN, False, BLOCK_N, PRECISION,
        )  # fmt: skip
    for i in tl.range(num_masked):
        key_start = tl.where(i < num_left, first_low + i * BLOCK_N, full_end + (i - num_left) * BLOCK_N)
        dq, dq_tail = query_step(
            dq, dq_tail, q, q_tail, dout, lse, delta, k_desc, k_tail_desc, v_desc, key_start, b * S, group * DK,
            group * DV, first, end, scale_log2, TAIL, MAIN, True, BLOCK_N, PRECISION,
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
    dtype = q.dtype if plan.splits == 1 else torch.float32
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
    if tile["TMA"]:
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
