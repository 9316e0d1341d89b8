"""A backend with one operator for a whole call, on the CPU: what the torch backend computes stage by stage.

It has no other stage, so that a call that goes by stages fails.
"""

from __future__ import annotations

import pytest
import torch
from torch import Tensor

from nsa.ops import registry, routing, stages, torch_native
from nsa.ops.call import AttentionInputs, BranchResults, Call
from nsa.ops.torch_native import mean_pool_backward as mean_pool_backward, mean_pool_forward as mean_pool_forward


def stand_in_for_triton(monkeypatch: pytest.MonkeyPatch) -> None:
    """Make this backend "triton", which "auto" then takes on the CPU."""
    monkeypatch.setitem(registry.BACKEND_MODULES, "triton", __name__)
    monkeypatch.setattr(routing, "_why_not_triton", lambda *_: None)


def attention_forward(inputs: AttentionInputs, call: Call) -> tuple[Tensor, BranchResults]:
    q, k, v, k_cmp, v_cmp, k_win, v_win, gates = inputs
    out_cmp, lse_cmp = torch_native.compressed_attention_forward(q, k_cmp, v_cmp, call)
    blocks = torch_native.select_blocks_forward(q, k_cmp, lse_cmp, call)
    out_slc, lse_slc = torch_native.selected_attention_forward(q, k, v, blocks, call)
    out_win, lse_win = torch_native.window_attention_forward(q, k_win, v_win, call)
    branches = BranchResults(out_cmp, out_slc, out_win, lse_cmp, lse_slc, lse_win, blocks)
    return stages.combine(out_cmp, out_slc, out_win, gates), branches


def attention_backward(
    dout: Tensor, inputs: AttentionInputs, branches: BranchResults, call: Call
) -> tuple[Tensor, ...]:
    q, k, v, k_cmp, v_cmp, k_win, v_win, gates = inputs
    outs, (lse_cmp, lse_slc, lse_win), blocks = branches[:3], branches[3:6], branches.block_indices
    dgates = torch.stack([(dout * out).sum(-1) for out in outs], dim=-1)
    dcmp, dslc, dwin = (dout * gate.unsqueeze(-1) for gate in gates.unbind(-1))
    cmp = torch_native.compressed_attention_backward(dcmp, None, q, k_cmp, v_cmp, outs[0], lse_cmp, call)
    slc = torch_native.selected_attention_backward(dslc, None, q, k, v, outs[1], lse_slc, blocks, call)
    win = torch_native.window_attention_backward(dwin, None, q, k_win, v_win, outs[2], lse_win, call)
    return cmp[0] + slc[0] + win[0], *slc[1:], *cmp[1:], *win[1:], dgates
