"""The Triton backend: the functions that `nsa.ops.registry` calls, `<stage>_forward` and `<stage>_backward`.

Reading order: `layout.py` (which keys a query sees, packed documents) and `gpu.py` (devices, tensors fit for kernels);
`plan.py` (which kernels run for which shapes on which GPU, and why) and `tiles.py` (their tiles); `compress.py` (mean
pooling) and `gates.py` (the gated sum); `dense/` (compressed and window branch), `topk/` (the choice of blocks),
`selected/` (the selected branch), each with the kernels for every GPU and, in `*_sm90.py`, those in Gluon for Hopper,
which share `sm90.py`; `decode/` (one step of a paged cache).

The functions and their arguments are those of `nsa.ops.registry.FusedBackend`, shapes those of `nsa.ops.api`; `plan` is
what runs, unless given what `plan.py` chooses for the tensors. Nothing here waits for the device, keeps state between
calls, or depends on the order in which programs run.
"""

from __future__ import annotations

from dataclasses import replace

import torch
from torch import Tensor

from nsa.geometry import BlockGeometry
from nsa.ops.cache_view import PagedView
from nsa.ops.call import AttentionInputs, BranchResults, Call
from nsa.ops.triton import compress, decode
from nsa.ops.triton.dense import backward as dense_backward, forced, forward as dense_forward
from nsa.ops.triton.gates import Gated, gate_backward
from nsa.ops.triton.gpu import KEY_SIZES, fit
from nsa.ops.triton.layout import make_layout
from nsa.ops.triton.plan import Dense, Plan, plan_call
from nsa.ops.triton.selected import backward as selected_backward, forward as selected_forward, union as unions
from nsa.ops.triton.topk import choice

Triple = tuple[Tensor, Tensor, Tensor]


def mean_pool_forward(x: Tensor, cu_seqlens: Tensor | None, geometry: BlockGeometry, num_compressed: int) -> Tensor:
    with torch.cuda.device_of(x):
        layout = make_layout(cu_seqlens, geometry, x.shape[1], num_compressed)
        return compress.mean_pool(x, geometry, layout, num_compressed)


def mean_pool_backward(dout: Tensor, cu_seqlens: Tensor | None, geometry: BlockGeometry, length: int) -> Tensor:
    with torch.cuda.device_of(dout):
        layout = make_layout(cu_seqlens, geometry, length, dout.shape[1])
        return compress.mean_pool_backward(dout, geometry, layout, length)


def compressed_attention_forward(
    q: Tensor, k: Tensor, v: Tensor, call: Call, plan: Plan | None = None
) -> tuple[Tensor, Tensor]:
    return _dense_forward(q, k, v, 0, replace(call, k_start=0), plan)  # k_start is the window's


def compressed_attention_backward(
    dout: Tensor, dlse: Tensor | None, q: Tensor, k: Tensor, v: Tensor, out: Tensor, lse: Tensor, call: Call,
    plan: Plan | None = None,
) -> Triple:  # fmt: skip
    return _dense_backward(dout, dlse, q, k, v, out, lse, 0, replace(call, k_start=0), plan)


def window_attention_forward(
    q: Tensor, k: Tensor, v: Tensor, call: Call, plan: Plan | None = None
) -> tuple[Tensor, Tensor]:
    return _dense_forward(q, k, v, call.geometry.window_size, call, plan)


def window_attention_backward(
    dout: Tensor, dlse: Tensor | None, q: Tensor, k: Tensor, v: Tensor, out: Tensor, lse: Tensor, call: Call,
    plan: Plan | None = None,
) -> Triple:  # fmt: skip
    return _dense_backward(dout, dlse, q, k, v, out, lse, call.geometry.window_size, call, plan)


def select_blocks_forward(q: Tensor, k_cmp: Tensor, lse: Tensor, call: Call, plan: Plan | None = None) -> Tensor:
    shape, num_compressed = call.geometry, k_cmp.shape[1]
    if plan is None:
        plan = plan_call(q, k_cmp, k_cmp, shape, call.cu_seqlens, num_compressed=num_compressed, q_start=call.q_start)
    with torch.cuda.device_of(q):
        layout = make_layout(call.cu_seqlens, shape, q.shape[1], num_compressed)
        queries, keys = fit(q, KEY_SIZES), fit(k_cmp, KEY_SIZES)
        return choice.select_blocks(queries, keys, lse, shape, layout, call.q_start, call.scale, plan.topk)


def selected_attention_forward(
    q: Tensor, k: Tensor, v: Tensor, block_indices: Tensor, call: Call, plan: Plan | None = None
) -> tuple[Tensor, Tensor]:
    stage = (plan or plan_call(q, k, v, call.geometry, call.cu_seqlens)).listed.forward
    with torch.cuda.device_of(q):
        layout = make_layout(call.cu_seqlens, call.geometry, q.shape[1], 0)
        inputs, tail = (fit(q, KEY_SIZES), fit(k, KEY_SIZES), fit(v)), (layout, call.q_start, call.scale, stage)
        out, lse = selected_forward.select_forward(*inputs, block_indices, call.geometry, *tail)
        return _cut(out, v), lse


def selected_attention_backward(
    dout: Tensor, dlse: Tensor | None, q: Tensor, k: Tensor, v: Tensor, out: Tensor, lse: Tensor, block_indices: Tensor,
    call: Call, plan: Plan | None = None,
) -> Triple:  # fmt: skip
    listed = (plan or plan_call(q, k, v, call.geometry, call.cu_seqlens)).listed
    with torch.cuda.device_of(q):
        layout = make_layout(call.cu_seqlens, call.geometry, q.shape[1], 0)
        dout, rows = _rows(dout, dlse, out, lse)
        inputs, tail = (fit(q, KEY_SIZES), fit(k, KEY_SIZES), fit(v)), (layout, call.q_start, call.scale, listed)
        dq, dk, dv = selected_backward.select_backward(dout, *inputs, rows, block_indices, call.geometry, *tail)
        return _cut(dq, q), _cut(dk, k), _cut(dv, v)


def attention_forward(inputs: AttentionInputs, call: Call, plan: Plan | None = None) -> tuple[Tensor, BranchResults]:
    """All stages with what they share made once: layout, fitting tensors, forced blocks and gates."""
    q, k, v, k_cmp, v_cmp, k_win, v_win, gates = inputs
    shape, scale = call.geometry, call.scale
    plan = plan or plan_call(q, k, v, shape, call.cu_seqlens, num_compressed=k_cmp.shape[1])
    with torch.cuda.device_of(q):
        layout = make_layout(call.cu_seqlens, shape, q.shape[1], k_cmp.shape[1])
        queries, keys, values = fit(q, KEY_SIZES), fit(k, KEY_SIZES), fit(v)
        keys_cmp, values_cmp = fit(k_cmp, KEY_SIZES), fit(v_cmp)
        keys_win, values_win = (keys, values) if k_win is k and v_win is v else (fit(k_win, KEY_SIZES), fit(v_win))
        out_cmp, lse_cmp = dense_forward.dense_forward(
            queries, keys_cmp, values_cmp, shape, layout, 0, 0, 0, scale, plan.compressed.forward
        )
        blocks = choice.select_blocks(queries, keys_cmp, lse_cmp, shape, layout, 0, scale, plan.topk)
        out_win, lse_win = dense_forward.dense_forward(
            queries, keys_win, values_win, shape, layout, shape.window_size, 0, 0, scale, plan.window.forward
        )
        out = torch.empty_like(out_cmp)
        gated = Gated(out_cmp, out_win, gates.contiguous(), out)
        selected = (queries, keys, values, blocks, shape, layout, 0, scale, plan.selected.forward)
        if plan.selected.forced is None:
            out_slc, lse_slc = unions.union_forward(*selected, gated)
        else:
            known = forced.forced_forward(queries, keys, values, shape, layout, 0, scale, plan.selected.forced)
            out_slc, lse_slc = selected_forward.select_forward(*selected, known, gated)
        out, out_cmp, out_slc, out_win = (_cut(x, v) for x in (out, out_cmp, out_slc, out_win))
        return out, BranchResults(out_cmp, out_slc, out_win, lse_cmp, lse_slc, lse_win, blocks)


def attention_backward(
    dout: Tensor, inputs: AttentionInputs, branches: BranchResults, call: Call, plan: Plan | None = None
) -> tuple[Tensor, ...]:
    """Gradients in the order of `inputs`; one dQ is added up by the three branches."""
    q, k, v, k_cmp, v_cmp, k_win, v_win, gates = inputs
    out_cmp, out_slc, out_win, lse_cmp, lse_slc, lse_win, block_indices = branches
    shape, scale = call.geometry, call.scale
    plan = plan or plan_call(q, k, v, shape, call.cu_seqlens, num_compressed=k_cmp.shape[1])
    with torch.cuda.device_of(q):
        layout = make_layout(call.cu_seqlens, shape, q.shape[1], k_cmp.shape[1])
        dout, gates, queries = dout.contiguous(), gates.contiguous(), fit(q, KEY_SIZES)
        dgates, delta = torch.empty_like(gates), torch.empty_like(lse_cmp)
        dbranch = torch.empty_like(dout)  # of one branch after another

        def rows(out: Tensor, lse: Tensor, branch: int) -> tuple[Tensor, dense_backward.Rows]:
            gate_backward(dout, out.contiguous(), gates, branch, dbranch, dgates, delta, plan.gates.tile)
            return fit(dbranch), dense_backward.Rows(lse, delta)

        gradient, of_cmp = rows(out_cmp, lse_cmp, 0)
        dq, dk_cmp, dv_cmp = dense_backward.dense_backward(
            gradient, queries, fit(k_cmp, KEY_SIZES), fit(v_cmp), of_cmp, shape, layout, 0, 0, 0, scale, plan.compressed
        )
        gradient, of_win = rows(out_win, lse_win, 2)
        window, keys = shape.window_size, (fit(k_win, KEY_SIZES), fit(v_win))
        dq, dk_win, dv_win = dense_backward.dense_backward(
            gradient, queries, *keys, of_win, shape, layout, window, 0, 0, scale, plan.window, dq
        )
        gradient, of_slc = rows(out_slc, lse_slc, 1)
        selected = (gradient, queries, fit(k, KEY_SIZES), fit(v), of_slc, block_indices, shape, layout, 0, scale)
        if plan.selected.dq:
            unions.union_dq(*selected, plan.selected.dq, dq)
        dq, dk, dv = selected_backward.select_backward(*selected, plan.selected, dq)
        grads = (dq, dk, dv, dk_cmp, dv_cmp, dk_win, dv_win)
        return *(_cut(x, like) for x, like in zip(grads, inputs, strict=False)), dgates


def _dense_forward(
    q: Tensor, k: Tensor, v: Tensor, window: int, call: Call, plan: Plan | None
) -> tuple[Tensor, Tensor]:
    stage = _dense_plan(q, k, v, window, call, plan).forward
    with torch.cuda.device_of(q):
        layout = make_layout(call.cu_seqlens, call.geometry, q.shape[1], k.shape[1])
        inputs, tail = (fit(q, KEY_SIZES), fit(k, KEY_SIZES), fit(v)), (call.q_start, call.k_start, call.scale, stage)
        out, lse = dense_forward.dense_forward(*inputs, call.geometry, layout, window, *tail)
        return _cut(out, v), lse


def _dense_backward(
    dout: Tensor, dlse: Tensor | None, q: Tensor, k: Tensor, v: Tensor, out: Tensor, lse: Tensor, window: int,
    call: Call, plan: Plan | None,
) -> Triple:  # fmt: skip
    branch = _dense_plan(q, k, v, window, call, plan)
    with torch.cuda.device_of(q):
        layout = make_layout(call.cu_seqlens, call.geometry, q.shape[1], k.shape[1])
        dout, rows = _rows(dout, dlse, out, lse)
        inputs, tail = (fit(q, KEY_SIZES), fit(k, KEY_SIZES), fit(v)), (call.q_start, call.k_start, call.scale, branch)
        dq, dk, dv = dense_backward.dense_backward(dout, *inputs, rows, call.geometry, layout, window, *tail)
        return _cut(dq, q), _cut(dk, k), _cut(dv, v)


def _dense_plan(q: Tensor, k: Tensor, v: Tensor, window: int, call: Call, plan: Plan | None) -> Dense:
    """The window's or the compressed branch's part of the plan."""
    if plan is None:
        num_compressed = 0 if window else k.shape[1]
        plan = plan_call(q, k, v, call.geometry, call.cu_seqlens, num_compressed=num_compressed)
    return plan.window if window else plan.compressed


def _rows(dout: Tensor, dlse: Tensor | None, out: Tensor, lse: Tensor) -> tuple[Tensor, dense_backward.Rows]:
    """The fitting gradient of a stage's output, and what its backward needs of each row."""
    dout = fit(dout)
    return dout, dense_backward.Rows(lse, dense_backward.make_delta(fit(out), dout, dlse))


def _cut(x: Tensor, like: Tensor) -> Tensor:
    """`x` without the columns that `fit` added."""
    return x if x.shape[-1] == like.shape[-1] else x[..., : like.shape[-1]].contiguous()


def paged_decode_forward(
    q: Tensor, gates: Tensor, view: PagedView, geometry: BlockGeometry, scale: float
) -> tuple[Tensor, Tensor]:
    with torch.cuda.device_of(q):
        return decode.paged_decode_forward(q, gates, view, geometry, scale)
