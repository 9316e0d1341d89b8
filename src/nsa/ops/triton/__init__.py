"""The Triton backend: the functions that `nsa.ops.registry` calls, `<stage>_forward` and `<stage>_backward`.

Reading order: `layout.py` (which keys a query sees, packed documents) and `gpu.py` (devices, tensors fit for kernels);
`plan.py` (which kernels run for which shapes on which GPU, and why) and `tiles.py` (their tiles); `compress.py` (mean
pooling) and `gates.py` (the gated sum); `dense/` (compressed and window branch), `topk/` (the choice of blocks),
`selected/` (the selected branch), each with the kernels for every GPU and, in `*_sm90.py`, those in Gluon for Hopper,
which share `sm90.py`; `decode/` (one step of a paged cache).

Arguments and shapes are those of the operators in `nsa.ops.registry`; `geometry` is `BlockGeometry.as_tuple()`. `plan`
is what runs; without one, what `nsa.ops.triton.plan` chooses for the tensors.
Nothing here waits for the device, keeps state between calls, or depends on the order in which programs run.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from nsa.geometry import BlockGeometry
from nsa.ops.triton import compress, decode
from nsa.ops.triton.dense import backward as dense_backward, forced, forward as dense_forward
from nsa.ops.triton.gates import Gated, gate_backward
from nsa.ops.triton.gpu import KEY_SIZES, fit
from nsa.ops.triton.layout import make_layout
from nsa.ops.triton.plan import Plan, plan_call
from nsa.ops.triton.selected import backward as selected_backward, forward as selected_forward, union as unions
from nsa.ops.triton.topk import choice

Geometry = Sequence[int]
Triple = tuple[Tensor, Tensor, Tensor]


def mean_pool_forward(x: Tensor, cu_seqlens: Tensor | None, geometry: Geometry, num_compressed: int) -> Tensor:
    shape = BlockGeometry(*geometry)
    with torch.cuda.device_of(x):
        layout = make_layout(cu_seqlens, shape, x.shape[1], num_compressed)
        return compress.mean_pool(x, shape, layout, num_compressed)


def mean_pool_backward(dout: Tensor, cu_seqlens: Tensor | None, geometry: Geometry, length: int) -> Tensor:
    shape = BlockGeometry(*geometry)
    with torch.cuda.device_of(dout):
        layout = make_layout(cu_seqlens, shape, length, dout.shape[1])
        return compress.mean_pool_backward(dout, shape, layout, length)


def compressed_attention_forward(
    q: Tensor, k: Tensor, v: Tensor, cu_seqlens: Tensor | None, geometry: Geometry, q_start: int, scale: float,
    plan: Plan | None = None,
) -> tuple[Tensor, Tensor]:  # fmt: skip
    return _dense_forward(q, k, v, cu_seqlens, BlockGeometry(*geometry), 0, q_start, 0, scale, plan)


def compressed_attention_backward(
    dout: Tensor, dlse: Tensor | None, q: Tensor, k: Tensor, v: Tensor, out: Tensor, lse: Tensor,
    cu_seqlens: Tensor | None, geometry: Geometry, q_start: int, scale: float, plan: Plan | None = None,
) -> Triple:  # fmt: skip
    shape = BlockGeometry(*geometry)
    return _dense_backward(dout, dlse, q, k, v, out, lse, cu_seqlens, shape, 0, q_start, 0, scale, plan)


def window_attention_forward(
    q: Tensor, k: Tensor, v: Tensor, cu_seqlens: Tensor | None, geometry: Geometry, q_start: int, k_start: int,
    scale: float, plan: Plan | None = None,
) -> tuple[Tensor, Tensor]:  # fmt: skip
    shape = BlockGeometry(*geometry)
    return _dense_forward(q, k, v, cu_seqlens, shape, shape.window_size, q_start, k_start, scale, plan)


def window_attention_backward(
    dout: Tensor, dlse: Tensor | None, q: Tensor, k: Tensor, v: Tensor, out: Tensor, lse: Tensor,
    cu_seqlens: Tensor | None, geometry: Geometry, q_start: int, k_start: int, scale: float,
    plan: Plan | None = None,
) -> Triple:  # fmt: skip
    shape = BlockGeometry(*geometry)
    window = shape.window_size
    return _dense_backward(dout, dlse, q, k, v, out, lse, cu_seqlens, shape, window, q_start, k_start, scale, plan)


def select_blocks_forward(
    q: Tensor, k_cmp: Tensor, lse: Tensor, cu_seqlens: Tensor | None, geometry: Geometry, q_start: int, scale: float,
    plan: Plan | None = None,
) -> Tensor:  # fmt: skip
    shape = BlockGeometry(*geometry)
    plan = plan or plan_call(q, k_cmp, k_cmp, shape, cu_seqlens, num_compressed=k_cmp.shape[1], q_start=q_start)
    with torch.cuda.device_of(q):
        layout = make_layout(cu_seqlens, shape, q.shape[1], k_cmp.shape[1])
        queries, keys = fit(q, KEY_SIZES), fit(k_cmp, KEY_SIZES)
        return choice.select_blocks(queries, keys, lse, shape, layout, q_start, scale, plan.topk)


def selected_attention_forward(
    q: Tensor, k: Tensor, v: Tensor, block_indices: Tensor, cu_seqlens: Tensor | None, geometry: Geometry,
    q_start: int, scale: float, plan: Plan | None = None,
) -> tuple[Tensor, Tensor]:  # fmt: skip
    shape = BlockGeometry(*geometry)
    stage = (plan or plan_call(q, k, v, shape, cu_seqlens)).listed.forward
    with torch.cuda.device_of(q):
        layout = make_layout(cu_seqlens, shape, q.shape[1], 0)
        out, lse = selected_forward.select_forward(
            fit(q, KEY_SIZES), fit(k, KEY_SIZES), fit(v), block_indices, shape, layout, q_start, scale, stage
        )
        return _cut(out, v), lse


def selected_attention_backward(
    dout: Tensor, dlse: Tensor | None, q: Tensor, k: Tensor, v: Tensor, out: Tensor, lse: Tensor, block_indices: Tensor,
    cu_seqlens: Tensor | None, geometry: Geometry, q_start: int, scale: float, plan: Plan | None = None,
) -> Triple:  # fmt: skip
    shape = BlockGeometry(*geometry)
    listed = (plan or plan_call(q, k, v, shape, cu_seqlens)).listed
    with torch.cuda.device_of(q):
        layout = make_layout(cu_seqlens, shape, q.shape[1], 0)
        dout, rows = _rows(dout, dlse, out, lse)
        queries, keys, values = fit(q, KEY_SIZES), fit(k, KEY_SIZES), fit(v)
        dq, dk, dv = selected_backward.select_backward(
            dout, queries, keys, values, rows, block_indices, shape, layout, q_start, scale, listed
        )
        return _cut(dq, q), _cut(dk, k), _cut(dv, v)


def attention_forward(
    q: Tensor, k: Tensor, v: Tensor, k_cmp: Tensor, v_cmp: Tensor, k_win: Tensor, v_win: Tensor, gates: Tensor,
    cu_seqlens: Tensor | None, geometry: Geometry, scale: float, plan: Plan | None = None,
) -> tuple[Tensor, ...]:  # fmt: skip
    """All stages with what they share made once: layout, fitting tensors, forced blocks and gates."""
    shape = BlockGeometry(*geometry)
    plan = plan or plan_call(q, k, v, shape, cu_seqlens, num_compressed=k_cmp.shape[1])
    with torch.cuda.device_of(q):
        layout = make_layout(cu_seqlens, shape, q.shape[1], k_cmp.shape[1])
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
        return *(_cut(x, v) for x in (out, out_cmp, out_slc, out_win)), lse_cmp, lse_slc, lse_win, blocks


def attention_backward(
    dout: Tensor, q: Tensor, k: Tensor, v: Tensor, k_cmp: Tensor, v_cmp: Tensor, k_win: Tensor, v_win: Tensor,
    gates: Tensor, out_cmp: Tensor, out_slc: Tensor, out_win: Tensor, lse_cmp: Tensor, lse_slc: Tensor,
    lse_win: Tensor, block_indices: Tensor, cu_seqlens: Tensor | None, geometry: Geometry, scale: float,
    plan: Plan | None = None,
) -> tuple[Tensor, ...]:  # fmt: skip
    """Gradients of all tensors in the order of `attention_forward`; one dQ is added up by the three branches."""
    shape = BlockGeometry(*geometry)
    plan = plan or plan_call(q, k, v, shape, cu_seqlens, num_compressed=k_cmp.shape[1])
    with torch.cuda.device_of(q):
        layout = make_layout(cu_seqlens, shape, q.shape[1], k_cmp.shape[1])
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
        inputs = (q, k, v, k_cmp, v_cmp, k_win, v_win)
        return *(_cut(x, like) for x, like in zip(grads, inputs, strict=True)), dgates


def _dense_forward(
    q: Tensor, k: Tensor, v: Tensor, cu_seqlens: Tensor | None, geometry: BlockGeometry, window: int,
    q_start: int, k_start: int, scale: float, plan: Plan | None,
) -> tuple[Tensor, Tensor]:  # fmt: skip
    plan = plan or plan_call(q, k, v, geometry, cu_seqlens, num_compressed=0 if window else k.shape[1])
    stage = plan.window.forward if window else plan.compressed.forward
    with torch.cuda.device_of(q):
        layout = make_layout(cu_seqlens, geometry, q.shape[1], k.shape[1])
        out, lse = dense_forward.dense_forward(
            fit(q, KEY_SIZES), fit(k, KEY_SIZES), fit(v), geometry, layout, window, q_start, k_start, scale, stage
        )
        return _cut(out, v), lse


def _dense_backward(
    dout: Tensor, dlse: Tensor | None, q: Tensor, k: Tensor, v: Tensor, out: Tensor, lse: Tensor,
    cu_seqlens: Tensor | None, geometry: BlockGeometry, window: int, q_start: int, k_start: int, scale: float,
    plan: Plan | None,
) -> Triple:  # fmt: skip
    plan = plan or plan_call(q, k, v, geometry, cu_seqlens, num_compressed=0 if window else k.shape[1])
    branch = plan.window if window else plan.compressed
    with torch.cuda.device_of(q):
        layout = make_layout(cu_seqlens, geometry, q.shape[1], k.shape[1])
        dout, rows = _rows(dout, dlse, out, lse)
        q_fit, k_fit, v_fit = fit(q, KEY_SIZES), fit(k, KEY_SIZES), fit(v)
        dq, dk, dv = dense_backward.dense_backward(
            dout, q_fit, k_fit, v_fit, rows, geometry, layout, window, q_start, k_start, scale, branch
        )
        return _cut(dq, q), _cut(dk, k), _cut(dv, v)


def _rows(dout: Tensor, dlse: Tensor | None, out: Tensor, lse: Tensor) -> tuple[Tensor, dense_backward.Rows]:
    """The fitting gradient of a stage's output, and what its backward needs of each row."""
    dout = fit(dout)
    return dout, dense_backward.Rows(lse, dense_backward.make_delta(fit(out), dout, dlse))


def _cut(x: Tensor, like: Tensor) -> Tensor:
    """`x` without the columns that `fit` added."""
    return x if x.shape[-1] == like.shape[-1] else x[..., : like.shape[-1]].contiguous()


def paged_decode_forward(q: Tensor, *rest: Any) -> tuple[Tensor, Tensor]:
    with torch.cuda.device_of(q):
        return decode.paged_decode_forward(q, *rest)
