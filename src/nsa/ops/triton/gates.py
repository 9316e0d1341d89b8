"""The gradient of the gated sum of the branches (Eq. 5), branch by branch: of its gate, of its output, and delta.

Shapes: out, dout `[B, T, H, Dv]`, gates `[B, T, H, 3]`; row = a token's head.
"""

# Kernels are typed by Triton, not by Python.
# pyright: reportArgumentType=false, reportCallIssue=false, reportAttributeAccessIssue=false, reportReturnType=false
# pyright: reportGeneralTypeIssues=false, reportPossiblyUnboundVariable=false
from __future__ import annotations

from typing import NamedTuple

import triton
import triton.language as tl
from torch import Tensor

from nsa.ops.triton.tiles import Tile


@triton.jit(do_not_specialize=["num_rows"])
def gate_backward_kernel(
    dout_ptr, out_ptr, gate_ptr, dbranch_ptr, dgate_ptr, delta_ptr, num_rows,
    DV: tl.constexpr, PADDED: tl.constexpr, ROWS: tl.constexpr, BRANCH: tl.constexpr,
):  # fmt: skip
    """Gradients of a branch's gate and output, and delta, for ROWS rows of a program; BRANCH is the gate's column."""
    # A million tokens of 64 heads of 128 are 2**33 elements.
    row = tl.program_id(0).to(tl.int64) * ROWS + tl.arange(0, ROWS)
    column = tl.arange(0, PADDED)[None, :]
    live = row < num_rows
    inside = live[:, None] & (column < DV)
    offset = row[:, None] * DV + column
    dout = tl.load(dout_ptr + offset, mask=inside, other=0.0).to(tl.float32)
    out = tl.load(out_ptr + offset, mask=inside, other=0.0).to(tl.float32)
    gate = tl.load(gate_ptr + row * 3 + BRANCH, mask=live, other=0.0).to(tl.float32)
    # delta is of the rounded gradient, as dP will be, so that the two cancel where they should.
    dbranch = (gate[:, None] * dout).to(dbranch_ptr.dtype.element_ty)
    tl.store(dbranch_ptr + offset, dbranch, mask=inside)
    tl.store(dgate_ptr + row * 3 + BRANCH, tl.sum(out * dout, 1).to(dgate_ptr.dtype.element_ty), mask=live)
    tl.store(delta_ptr + row, tl.sum(out * dbranch.to(tl.float32), 1), mask=live)


def gate_backward(
    dout: Tensor,
    out: Tensor,
    gates: Tensor,
    branch: int,
    dbranch: Tensor,
    dgates: Tensor,
    delta: Tensor,
    tile: Tile,
) -> None:
    """Write what a branch's backward takes, into buffers that the branches share; all contiguous.

    Args:
        dout: gradient of the gated sum.
        out: the branch's output.
        branch: 0 compressed, 1 selected, 2 window.
        dbranch: becomes the gradient of `out`, gate * dout.
        dgates: its column `branch` becomes that gate's gradient, sum(out * dout).
        delta: fp32 `[B, T, H]`, becomes sum(out * dbranch), see `Rows`.
    """
    if num_rows := delta.numel():
        gate_backward_kernel[(triton.cdiv(num_rows, tile["ROWS"]),)](
            dout, out, gates, dbranch, dgates, delta, num_rows, DV=dout.shape[-1], BRANCH=branch, **tile
        )


class Gated(NamedTuple):
    """What the gated sum needs beside the selected branch, and where it goes; `[B, T, H, Dv]`, gates `[B, T, H, 3]`."""

    out_cmp: Tensor
    out_win: Tensor
    gates: Tensor
    out: Tensor


def gate_pointers(gated: Gated | None, unused: Tensor) -> Gated:
    """What a kernel gets for `gated`; without it `unused` in each place, which it does not read then."""
    return gated or Gated(unused, unused, unused, unused)


@triton.jit
def add_branches(out, cmp_ptr, win_ptr, gate_ptr, row, offset, live):
    """The gated sum of the branches (Eq. 5) for rows whose elements lie at `offset`; fp32 `out` is the selected one."""
    # Gates lie in the order compressed, selected, window. Fp32 throughout: the sum is rounded once, when stored.
    gate_ptr += row * 3
    out *= tl.load(gate_ptr + 1, mask=live, other=0.0).to(tl.float32)[:, None]
    gate = tl.load(gate_ptr, mask=live, other=0.0).to(tl.float32)[:, None]
    out += gate * tl.load(cmp_ptr + offset, mask=live[:, None], other=0.0).to(tl.float32)
    gate = tl.load(gate_ptr + 2, mask=live, other=0.0).to(tl.float32)[:, None]
    return out + gate * tl.load(win_ptr + offset, mask=live[:, None], other=0.0).to(tl.float32)


@triton.jit
def gated_sum(out, cmp_ptr, win_ptr, gate_ptr, sum_ptr, row, offset, live):
    """Store the gated sum of rows that the program holds, at the end of the selected branch."""
    out = add_branches(out, cmp_ptr, win_ptr, gate_ptr, row, offset, live)
    tl.store(sum_ptr + offset, out.to(sum_ptr.dtype.element_ty), mask=live[:, None])


class Rows(NamedTuple):
    """What the gradient of a branch needs of each query and head, fp32 `[B, T, H]`.

    Attributes:
        lse: natural log-sum-exp of the branch.
        delta: sum(out * dout) - dlse, so that dS = P (dP - delta).
    """

    lse: Tensor
    delta: Tensor
