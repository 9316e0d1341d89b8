"""The backend's stages, and all of it, with a plan that is given: operators take the device's own."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from nsa import BlockGeometry
from nsa.ops import triton as backend
from nsa.ops.call import AttentionInputs, BranchResults, Call
from nsa.ops.triton.gpu import Device, read_device
from nsa.ops.triton.plan import Plan, Shapes, make_plan

OTHER_CAPABILITY = (8, 0)  # of GPUs without Hopper's own kernels


def plan_for(
    q: Tensor, k_cmp: Tensor, v: Tensor, geometry: BlockGeometry, cu: Tensor | None, q_start: int = 0,
    unions: bool | None = None, capability: tuple[int, int] | None = None,
) -> Plan:  # fmt: skip
    """The plan of a call, with unions or without, and for a device of another capability."""
    device: Device = read_device(q.device)
    batch, tokens, heads, size = q.shape
    num_docs = batch if cu is None else cu.numel() - 1
    sizes = (batch, tokens, heads, k_cmp.shape[2], size, v.shape[3], q.dtype)
    shapes = Shapes(*sizes, geometry, num_docs, k_cmp.shape[1], q_start)
    return make_plan(shapes, device._replace(capability=capability or device.capability), unions)


class _Stage(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, q: Tensor, k: Tensor, v: Tensor, name: str, plan: Plan, others: tuple) -> tuple:
        out, lse = getattr(backend, f"{name}_forward")(q, k, v, *others, plan=plan)
        ctx.save_for_backward(q, k, v, out, lse)
        ctx.what = (name, plan, others)
        return out, lse

    @staticmethod
    def backward(ctx: Any, dout: Tensor, dlse: Tensor) -> tuple:
        name, plan, others = ctx.what
        grads = getattr(backend, f"{name}_backward")(dout, dlse, *ctx.saved_tensors, *others, plan=plan)
        return *grads, None, None, None


def run_stage(plan: Plan, name: str, q: Tensor, k: Tensor, v: Tensor, *others: Any) -> tuple[Tensor, Tensor]:
    """What `torch.ops.nsa.<name>` gives, by the plan's kernels."""
    return _Stage.apply(q, k, v, name, plan, others)


class _Whole(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, plan: Plan, call: Call, *inputs: Tensor) -> Tensor:
        out, branches = backend.attention_forward(AttentionInputs(*inputs), call, plan=plan)
        ctx.save_for_backward(*inputs, *branches)
        ctx.what = (plan, call)
        return out

    @staticmethod
    def backward(ctx: Any, dout: Tensor) -> tuple:
        plan, call = ctx.what
        count = len(AttentionInputs._fields)
        inputs, branches = AttentionInputs(*ctx.saved_tensors[:count]), BranchResults(*ctx.saved_tensors[count:])
        return None, None, *backend.attention_backward(dout, inputs, branches, call, plan=plan)


def run_whole(plan: Plan, inputs: tuple[Tensor, ...], call: Call) -> Tensor:
    """The output of `torch.ops.nsa.attention`, by the plan's kernels."""
    return _Whole.apply(plan, call, *inputs)
