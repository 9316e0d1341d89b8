"""One step of the plain dense kernels, forward and backward, and the tiles that they load by descriptor."""

# Kernels are typed by Triton, not by Python.
# pyright: reportArgumentType=false, reportCallIssue=false, reportAttributeAccessIssue=false, reportReturnType=false
# pyright: reportGeneralTypeIssues=false, reportPossiblyUnboundVariable=false, reportAssignmentType=false
from __future__ import annotations

import triton
import triton.language as tl
from torch import Tensor
from triton.tools.tensor_descriptor import TensorDescriptor

from nsa.ops.triton.gpu import key_tail


@triton.jit
def query_step(
    dq, dq_tail, q, q_tail, dout, lse, delta, k_desc, k_tail_desc, v_desc, key_start, first_row, column_k,
    column_v, first, end, scale_log2, TAIL: tl.constexpr, MAIN: tl.constexpr,
    MASKED: tl.constexpr, BLOCK_N: tl.constexpr, PRECISION: tl.constexpr,
):  # fmt: skip
    k = k_desc.load([first_row + key_start, column_k])
    v = v_desc.load([first_row + key_start, column_v])
    s = tl.dot(q, tl.trans(k), input_precision=PRECISION)
    if TAIL > 0:
        k_tail = k_tail_desc.load([first_row + key_start, column_k + MAIN])
        s = tl.dot(q_tail, tl.trans(k_tail), s, input_precision=PRECISION)
    p = tl.math.exp2(s * scale_log2 - lse[:, None])
    if MASKED:
        key = key_start + tl.arange(0, BLOCK_N)
        p = tl.where((key[None, :] >= first[:, None]) & (key[None, :] < end[:, None]), p, 0.0)
    ds = p * (tl.dot(dout, tl.trans(v), input_precision=PRECISION) - delta[:, None])
    dq = tl.dot(ds.to(k.dtype), k, dq, input_precision=PRECISION)
    if TAIL > 0:
        dq_tail = tl.dot(ds.to(k.dtype), k_tail, dq_tail, input_precision=PRECISION)
    return dq, dq_tail


def describe(x: Tensor, rows: int, columns: int | None = None) -> TensorDescriptor:
    """Tiles of `rows` tokens and a head (or `columns` of it) of `[B, S, Hkv, D]`, seen as a matrix `[B*S, Hkv*D]`."""
    B, S, heads, dim = x.shape
    return TensorDescriptor(x, [B * S, heads * dim], [heads * dim, 1], [rows, dim if columns is None else columns])


def describe_keys(k: Tensor, rows: int) -> tuple[TensorDescriptor, TensorDescriptor]:
    """Tiles of the first power of two of a key's columns, and of its tail (the same again where there is none)."""
    tail = key_tail(k.shape[-1])
    main = describe(k, rows, k.shape[-1] - tail)
    return main, describe(k, rows, tail) if tail else main


@triton.jit
def attend_tile(
    acc, best, total, q, q_tail, k_desc, k_tail_desc, v_desc, key_start, first_row, column_k, column_v, first, end,
    scale_log2, TAIL: tl.constexpr, MAIN: tl.constexpr, MASKED: tl.constexpr, BLOCK_N: tl.constexpr,
    PRECISION: tl.constexpr,
):  # fmt: skip
    """One step of the online softmax, in base 2; `best` is the running maximum, `total` the sum."""
    k = k_desc.load([first_row + key_start, column_k])
    s = tl.dot(q, tl.trans(k), input_precision=PRECISION)
    if TAIL > 0:
        k = k_tail_desc.load([first_row + key_start, column_k + MAIN])
        s = tl.dot(q_tail, tl.trans(k), s, input_precision=PRECISION)
    if MASKED:
        key = key_start + tl.arange(0, BLOCK_N)
        s = tl.where((key[None, :] >= first[:, None]) & (key[None, :] < end[:, None]), s, float("-inf"))
    new_best = tl.maximum(best, tl.max(s, 1) * scale_log2)
    safe = new_best
    if MASKED:
        safe = tl.where(new_best == float("-inf"), 0.0, new_best)
    p = tl.math.exp2(s * scale_log2 - safe[:, None])
    decay = tl.math.exp2(best - safe)
    total = total * decay + tl.sum(p, 1)
    v = v_desc.load([first_row + key_start, column_v])
    acc = tl.dot(p.to(v.dtype), v, acc * decay[:, None], input_precision=PRECISION)
    return acc, new_best, total
