"""The gated sum of the three branches and its gradient, each in one pass over memory.

Shapes: out_cmp, out_slc, out_win, dout `[B, T, H, Dv]`, gates `[B, T, H, 3]`; row = a token's head.
"""

# Kernels are typed by Triton, not by Python.
# pyright: reportArgumentType=false, reportCallIssue=false, reportAttributeAccessIssue=false, reportReturnType=false
# pyright: reportGeneralTypeIssues=false, reportPossiblyUnboundVariable=false
from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

ELEMENTS = 4096


@triton.jit(do_not_specialize=["num_rows"])
def combine_kernel(
    cmp_ptr, slc_ptr, win_ptr, gate_ptr, out_ptr, num_rows, DV: tl.constexpr, PADDED: tl.constexpr, ROWS: tl.constexpr
):
    row = tl.program_id(0).to(tl.int64) * ROWS + tl.arange(0, ROWS)
    column = tl.arange(0, PADDED)[None, :]
    live = row < num_rows
    inside = live[:, None] & (column < DV)
    place = row[:, None] * DV + column
    g_cmp = tl.load(gate_ptr + row * 3, mask=live, other=0.0).to(tl.float32)[:, None]
    g_slc = tl.load(gate_ptr + row * 3 + 1, mask=live, other=0.0).to(tl.float32)[:, None]
    g_win = tl.load(gate_ptr + row * 3 + 2, mask=live, other=0.0).to(tl.float32)[:, None]
    out = g_cmp * tl.load(cmp_ptr + place, mask=inside, other=0.0).to(tl.float32)
    out += g_slc * tl.load(slc_ptr + place, mask=inside, other=0.0).to(tl.float32)
    out += g_win * tl.load(win_ptr + place, mask=inside, other=0.0).to(tl.float32)
    tl.store(out_ptr + place, out.to(out_ptr.dtype.element_ty), mask=inside)


@triton.jit
def _branch_gradient(branch, dout, gate_ptr, dbranch_ptr, dgate_ptr, place, live, inside):
    gate = tl.load(gate_ptr, mask=live, other=0.0).to(tl.float32)
    tl.store(dbranch_ptr + place, (gate[:, None] * dout).to(dbranch_ptr.dtype.element_ty), mask=inside)
    tl.store(dgate_ptr, tl.sum(branch.to(tl.float32) * dout, 1).to(dgate_ptr.dtype.element_ty), mask=live)


@triton.jit(do_not_specialize=["num_rows"])
def combine_backward_kernel(
    dout_ptr, cmp_ptr, slc_ptr, win_ptr, gate_ptr, dcmp_ptr, dslc_ptr, dwin_ptr, dgate_ptr, num_rows,
    DV: tl.constexpr, PADDED: tl.constexpr, ROWS: tl.constexpr,
):  # fmt: skip
    row = tl.program_id(0).to(tl.int64) * ROWS + tl.arange(0, ROWS)
    column = tl.arange(0, PADDED)[None, :]
    live = row < num_rows
    inside = live[:, None] & (column < DV)
    place = row[:, None] * DV + column
    dout = tl.load(dout_ptr + place, mask=inside, other=0.0).to(tl.float32)
    b_cmp = tl.load(cmp_ptr + place, mask=inside, other=0.0)
    b_slc = tl.load(slc_ptr + place, mask=inside, other=0.0)
    b_win = tl.load(win_ptr + place, mask=inside, other=0.0)
    gate = gate_ptr + row * 3
    dgate = dgate_ptr + row * 3
    _branch_gradient(b_cmp, dout, gate, dcmp_ptr, dgate, place, live, inside)
    _branch_gradient(b_slc, dout, gate + 1, dslc_ptr, dgate + 1, place, live, inside)
    _branch_gradient(b_win, dout, gate + 2, dwin_ptr, dgate + 2, place, live, inside)


def combine(out_cmp: Tensor, out_slc: Tensor, out_win: Tensor, gates: Tensor) -> Tensor:
    """`[B,T,H,Dv]` x 3 and `[B,T,H,3]` -> `[B,T,H,Dv]`, summed in fp32."""
    branches = [x.contiguous() for x in (out_cmp, out_slc, out_win)]
    out = torch.empty_like(branches[0])
    if out.numel():
        grid, sizes = _sizes(out)
        combine_kernel[grid](*branches, gates.contiguous(), out, out.numel() // out.shape[-1], **sizes)
    return out


def combine_backward(
    dout: Tensor, out_cmp: Tensor, out_slc: Tensor, out_win: Tensor, gates: Tensor
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """Gradients of `combine` in the order of its arguments."""
    branches = [x.contiguous() for x in (out_cmp, out_slc, out_win)]
    gates = gates.contiguous()
    grads = (*(torch.empty_like(x) for x in branches), torch.empty_like(gates))
    if dout.numel():
        grid, sizes = _sizes(dout)
        rows = dout.numel() // dout.shape[-1]
        combine_backward_kernel[grid](dout.contiguous(), *branches, gates, *grads, rows, **sizes)
    return grads


def _sizes(out: Tensor) -> tuple[tuple[int], dict[str, int]]:
    padded = triton.next_power_of_2(out.shape[-1])
    rows = max(1, ELEMENTS // padded)
    return (triton.cdiv(out.numel() // out.shape[-1], rows),), {"DV": out.shape[-1], "PADDED": padded, "ROWS": rows}
