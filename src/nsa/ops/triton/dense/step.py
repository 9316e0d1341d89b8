"""One step of the plain dense kernels, forward and backward, where their loops run, and the tiles that they load.

Kernels hand these functions what belongs together as a named tuple, which costs nothing once compiled. Constants go in
one of their own, `X: tl.constexpr = Pattern(...)`: an assignment without `tl.constexpr` makes tensors of them.
"""

# Kernels are typed by Triton, not by Python.
# pyright: reportArgumentType=false, reportCallIssue=false, reportAttributeAccessIssue=false, reportReturnType=false
# pyright: reportGeneralTypeIssues=false, reportPossiblyUnboundVariable=false, reportAssignmentType=false
from __future__ import annotations

from typing import Any, NamedTuple

import triton
import triton.language as tl
from torch import Tensor
from triton.tools.tensor_descriptor import TensorDescriptor

from nsa.ops.triton.gpu import key_tail
from nsa.ops.triton.layout import key_interval


class KeyTiles(NamedTuple):
    """Where a pair's keys and values are loaded from.

    Attributes:
        k, k_tail, v: descriptors of `describe_keys` and `describe`.
        first_row: row of the pair's key 0 in the matrices that these see.
        k_column, v_column: its first columns there.
    """

    k: Any
    k_tail: Any
    v: Any
    first_row: Any
    k_column: Any
    v_column: Any


class Mask(NamedTuple):
    """What decides which keys a query sees, as in `key_interval`."""

    doc_ptr: Any
    cmp_ptr: Any
    S: Any
    q_start: Any
    k_start: Any


class Pattern(NamedTuple):
    """Constants of a mask, as in `key_interval`: compressed blocks of SIZE each STRIDE tokens, or a WINDOW > 0."""

    SIZE: Any
    STRIDE: Any
    WINDOW: Any
    PACKED: Any


class Steps(NamedTuple):
    """Steps of BLOCK keys or rows: full ones from `full_start` to `full_end`, masked ones on both sides of them.

    Attributes:
        begin, end: of all keys or rows, the latter one past the last.
        num_left: masked steps from `begin` to `full_start`.
        full_start, full_end: what lies between needs no mask.
        num_masked: those on the left, then those from `full_end` on.
    """

    begin: Any
    end: Any
    num_left: Any
    full_start: Any
    full_end: Any
    num_masked: Any


@triton.jit
def visible_keys(t, mask, PATTERN: tl.constexpr):
    """Keys [first, end) that query t sees, one or a tensor of them."""
    return key_interval(
        t, mask.doc_ptr, mask.cmp_ptr, mask.S, mask.q_start, mask.k_start, PATTERN.SIZE, PATTERN.STRIDE,
        PATTERN.WINDOW, PATTERN.PACKED,
    )  # fmt: skip


@triton.jit
def cut_steps(begin, num_left, full_limit, end, BLOCK: tl.constexpr):
    """Steps over [begin, end), of which whole ones between the first `num_left` and `full_limit` need no mask."""
    full_start = begin + num_left * BLOCK
    # Both ends are whole steps from `begin`: no key is taken twice, and the last step may reach past `end`.
    full_end = full_start + tl.maximum(full_limit - full_start, 0) // BLOCK * BLOCK
    num_masked = num_left + tl.cdiv(tl.maximum(end - full_end, 0), BLOCK)
    return Steps(begin, end, num_left, full_start, full_end, num_masked)


@triton.jit
def masked_start(steps, i, BLOCK: tl.constexpr):
    """First key or row of the i-th masked step."""
    # One loop for both sides: a second copy of its body would double the code.
    left, right = steps.begin + i * BLOCK, steps.full_end + (i - steps.num_left) * BLOCK
    return tl.where(i < steps.num_left, left, right)


@triton.jit
def key_steps(tile, T, mask, PATTERN: tl.constexpr, G: tl.constexpr, BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr):
    """Steps over all keys that the rows of a tile see."""
    # Intervals never decrease: the first token's begins and ends first, the last one's last.
    t_low = (tile * BLOCK_M) // G
    t_high = tl.minimum((tile * BLOCK_M + BLOCK_M - 1) // G, T - 1)
    first_low, end_low = visible_keys(t_low, mask, PATTERN)
    first_high, end_high = visible_keys(t_high, mask, PATTERN)
    return cut_steps(first_low, tl.cdiv(first_high - first_low, BLOCK_N), end_low, end_high, BLOCK_N)


def describe(x: Tensor, rows: int, columns: int | None = None) -> TensorDescriptor:
    """Tiles of `rows` tokens and a head (or `columns` of it) of `[B, S, Hkv, D]`, seen as a matrix `[B*S, Hkv*D]`."""
    B, S, heads, dim = x.shape
    return TensorDescriptor(x, [B * S, heads * dim], [heads * dim, 1], [rows, dim if columns is None else columns])


def describe_keys(k: Tensor, rows: int) -> tuple[TensorDescriptor, TensorDescriptor]:
    """Tiles of the first power of two of a key's columns, and of its tail (the same again where there is none)."""
    tail = key_tail(k.shape[-1])
    main = describe(k, rows, k.shape[-1] - tail)  # a tile's sides are powers of two: 192 = 128 + 64
    return main, describe(k, rows, tail) if tail else main


@triton.jit
def attend_tile(
    acc, row_max, row_sum, q, q_tail, keys, key_start, first, end, scale_log2, TAIL: tl.constexpr,
    MASKED: tl.constexpr, PRECISION: tl.constexpr,
):  # fmt: skip
    """One step of the online softmax, in base 2: rows `[BLOCK_M, D]` by the keys (`KeyTiles`) from `key_start` on.

    `first` and `end` `[BLOCK_M]` are the keys that a row sees, read if MASKED. Gives the new acc, row_max and row_sum.
    """
    MAIN: tl.constexpr = q.shape[1]
    k = keys.k.load([keys.first_row + key_start, keys.k_column])
    s = tl.dot(q, tl.trans(k), input_precision=PRECISION)
    if TAIL > 0:
        k = keys.k_tail.load([keys.first_row + key_start, keys.k_column + MAIN])
        s = tl.dot(q_tail, tl.trans(k), s, input_precision=PRECISION)
    if MASKED:
        key = key_start + tl.arange(0, k.shape[0])
        s = tl.where((key[None, :] >= first[:, None]) & (key[None, :] < end[:, None]), s, float("-inf"))
    new_max = tl.maximum(row_max, tl.max(s, 1) * scale_log2)
    safe_max = new_max
    if MASKED:  # a row that has seen no key yet: -inf less -inf would be NaN
        safe_max = tl.where(new_max == float("-inf"), 0.0, new_max)
    p = tl.math.exp2(s * scale_log2 - safe_max[:, None])
    alpha = tl.math.exp2(row_max - safe_max)
    row_sum = row_sum * alpha + tl.sum(p, 1)
    v = keys.v.load([keys.first_row + key_start, keys.v_column])
    acc = tl.dot(p.to(v.dtype), v, acc * alpha[:, None], input_precision=PRECISION)
    return acc, new_max, row_sum


@triton.jit
def query_step(
    dq, dq_tail, q, q_tail, dout, lse, delta, keys, key_start, first, end, scale_log2, TAIL: tl.constexpr,
    MASKED: tl.constexpr, PRECISION: tl.constexpr,
):  # fmt: skip
    """What the keys from `key_start` on add to dQ of a tile of rows, before the scale; the rest as in `attend_tile`.

    `lse` `[BLOCK_M]` is in base 2, `delta` that of `delta_kernel`.
    """
    MAIN: tl.constexpr = q.shape[1]
    k = keys.k.load([keys.first_row + key_start, keys.k_column])
    v = keys.v.load([keys.first_row + key_start, keys.v_column])
    s = tl.dot(q, tl.trans(k), input_precision=PRECISION)
    if TAIL > 0:
        k_tail = keys.k_tail.load([keys.first_row + key_start, keys.k_column + MAIN])
        s = tl.dot(q_tail, tl.trans(k_tail), s, input_precision=PRECISION)
    p = tl.math.exp2(s * scale_log2 - lse[:, None])
    if MASKED:  # after the exponential: a row that sees nothing has lse = -inf and p = inf here
        key = key_start + tl.arange(0, k.shape[0])
        p = tl.where((key[None, :] >= first[:, None]) & (key[None, :] < end[:, None]), p, 0.0)
    ds = p * (tl.dot(dout, tl.trans(v), input_precision=PRECISION) - delta[:, None])
    dq = tl.dot(ds.to(k.dtype), k, dq, input_precision=PRECISION)
    if TAIL > 0:
        dq_tail = tl.dot(ds.to(k.dtype), k_tail, dq_tail, input_precision=PRECISION)
    return dq, dq_tail
