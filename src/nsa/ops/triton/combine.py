"""The gradient of the gated sum of the branches, in one pass: of the gates, and what the branches need of each row.

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
def gate_backward_kernel(
    dout_ptr, cmp_ptr, slc_ptr, win_ptr, gate_ptr, dgate_ptr, delta_ptr, row_gate_ptr, num_rows,
    DV: tl.constexpr, PADDED: tl.constexpr, ROWS: tl.constexpr,
):  # fmt: skip
    row = tl.program_id(0).to(tl.int64) * ROWS + tl.arange(0, ROWS)
    column = tl.arange(0, PADDED)[None, :]
    live = row < num_rows
    inside = live[:, None] & (column < DV)
    place = row[:, None] * DV + column
    dout = tl.load(dout_ptr + place, mask=inside, other=0.0).to(tl.float32)
    for i in tl.static_range(3):
        branch_ptr = cmp_ptr if i == 0 else slc_ptr if i == 1 else win_ptr
        branch = tl.load(branch_ptr + place, mask=inside, other=0.0).to(tl.float32)
        dgate = tl.sum(branch * dout, 1)
        gate = tl.load(gate_ptr + row * 3 + i, mask=live, other=0.0).to(tl.float32)
        tl.store(dgate_ptr + row * 3 + i, dgate.to(dgate_ptr.dtype.element_ty), mask=live)
        tl.store(delta_ptr + i * num_rows + row, dgate, mask=live)
        tl.store(row_gate_ptr + i * num_rows + row, gate, mask=live)


def gate_backward(
    dout: Tensor, out_cmp: Tensor, out_slc: Tensor, out_win: Tensor, gates: Tensor
) -> tuple[Tensor, Tensor, Tensor]:
    """dgates, and for each branch the rows' delta = sum(out_branch * dout) and gate, fp32 `[3, B, T, H]`.

    With P the probabilities of a branch and g its gate, dV = (g P)^T dout and dS = g P (dout V^T - delta): the
    gradients of the branches' outputs need no tensors of their own.
    """
    branches = [x.contiguous() for x in (out_cmp, out_slc, out_win)]
    dgates = torch.empty_like(gates, memory_format=torch.contiguous_format)
    delta = torch.empty(3, *dout.shape[:3], dtype=torch.float32, device=dout.device)
    row_gates = torch.empty_like(delta)
    if dout.numel():
        num_rows, padded = delta[0].numel(), triton.next_power_of_2(dout.shape[-1])
        rows = max(1, ELEMENTS // padded)
        gate_backward_kernel[(triton.cdiv(num_rows, rows),)](
            dout.contiguous(), *branches, gates.contiguous(), dgates, delta, row_gates, num_rows,
            DV=dout.shape[-1], PADDED=padded, ROWS=rows,
        )  # fmt: skip
    return dgates, delta, row_gates
