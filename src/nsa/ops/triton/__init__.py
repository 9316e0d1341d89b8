"""The Triton backend: the functions that `nsa.ops.registry` calls, `<stage>_forward` and `<stage>_backward`.

Reading order: common (which keys a query sees), dense_fwd and dense_bwd (compressed and window branch; hopper_fwd and
hopper_bwd are the same for Hopper), score_topk (the choice of blocks), invert (its inversion), select_fwd and
select_bwd (selected branch), combine (gates), compress (mean pooling).

Arguments and shapes are those of the operators in `nsa.ops.registry`; `geometry` is `BlockGeometry.as_tuple()`. Nothing
here waits for the device, keeps state between calls, or depends on the order in which programs run.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from nsa.geometry import BlockGeometry
from nsa.ops.triton import combine, compress, dense_bwd, dense_fwd, score_topk, select_bwd, select_fwd
from nsa.ops.triton.common import KEY_SIZES, fit, make_layout

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
    q: Tensor, k: Tensor, v: Tensor, cu_seqlens: Tensor | None, geometry: Geometry, q_start: int, scale: float
) -> tuple[Tensor, Tensor]:
    return _dense_forward(q, k, v, cu_seqlens, BlockGeometry(*geometry), 0, q_start, 0, scale)


def compressed_attention_backward(
    dout: Tensor, dlse: Tensor | None, q: Tensor, k: Tensor, v: Tensor, out: Tensor, lse: Tensor,
    cu_seqlens: Tensor | None, geometry: Geometry, q_start: int, scale: float,
) -> Triple:  # fmt: skip
    shape = BlockGeometry(*geometry)
    return _dense_backward(dout, dlse, q, k, v, out, lse, cu_seqlens, shape, 0, q_start, 0, scale)


def window_attention_forward(
    q: Tensor, k: Tensor, v: Tensor, cu_seqlens: Tensor | None, geometry: Geometry, q_start: int, k_start: int,
    scale: float,
) -> tuple[Tensor, Tensor]:  # fmt: skip
    shape = BlockGeometry(*geometry)
    return _dense_forward(q, k, v, cu_seqlens, shape, shape.window_size, q_start, k_start, scale)


def window_attention_backward(
    dout: Tensor, dlse: Tensor | None, q: Tensor, k: Tensor, v: Tensor, out: Tensor, lse: Tensor,
    cu_seqlens: Tensor | None, geometry: Geometry, q_start: int, k_start: int, scale: float,
) -> Triple:  # fmt: skip
    shape = BlockGeometry(*geometry)
    window = shape.window_size
    return _dense_backward(dout, dlse, q, k, v, out, lse, cu_seqlens, shape, window, q_start, k_start, scale)


def select_blocks_forward(
    q: Tensor, k_cmp: Tensor, lse: Tensor, cu_seqlens: Tensor | None, geometry: Geometry, q_start: int, scale: float
) -> Tensor:
    shape = BlockGeometry(*geometry)
    with torch.cuda.device_of(q):
        layout = make_layout(cu_seqlens, shape, q.shape[1], k_cmp.shape[1])
        return score_topk.select_blocks(fit(q, KEY_SIZES), fit(k_cmp, KEY_SIZES), lse, shape, layout, q_start, scale)


def selected_attention_forward(
    q: Tensor, k: Tensor, v: Tensor, block_indices: Tensor, cu_seqlens: Tensor | None, geometry: Geometry,
    q_start: int, scale: float,
) -> tuple[Tensor, Tensor]:  # fmt: skip
    shape = BlockGeometry(*geometry)
    with torch.cuda.device_of(q):
        layout = make_layout(cu_seqlens, shape, q.shape[1], 0)
        out, lse = select_fwd.select_forward(
            fit(q, KEY_SIZES), fit(k, KEY_SIZES), fit(v), block_indices, shape, layout, q_start, scale
        )
        return _cut(out, v), lse


def selected_attention_backward(
    dout: Tensor, dlse: Tensor | None, q: Tensor, k: Tensor, v: Tensor, out: Tensor, lse: Tensor, block_indices: Tensor,
    cu_seqlens: Tensor | None, geometry: Geometry, q_start: int, scale: float,
) -> Triple:  # fmt: skip
    shape = BlockGeometry(*geometry)
    with torch.cuda.device_of(q):
        layout = make_layout(cu_seqlens, shape, q.shape[1], 0)
        dq, dk, dv = select_bwd.select_backward(
            fit(dout),
            dlse,
            fit(q, KEY_SIZES),
            fit(k, KEY_SIZES),
            fit(v),
            fit(out),
            lse,
            block_indices,
            shape,
            layout,
            q_start,
            scale,
        )
        return _cut(dq, q), _cut(dk, k), _cut(dv, v)


def combine_forward(out_cmp: Tensor, out_slc: Tensor, out_win: Tensor, gates: Tensor) -> Tensor:
    with torch.cuda.device_of(gates):
        return combine.combine(out_cmp, out_slc, out_win, gates)


def combine_backward(
    dout: Tensor, out_cmp: Tensor, out_slc: Tensor, out_win: Tensor, gates: Tensor
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    with torch.cuda.device_of(gates):
        return combine.combine_backward(dout, out_cmp, out_slc, out_win, gates)


def _dense_forward(
    q: Tensor, k: Tensor, v: Tensor, cu_seqlens: Tensor | None, geometry: BlockGeometry, window: int,
    q_start: int, k_start: int, scale: float,
) -> tuple[Tensor, Tensor]:  # fmt: skip
    with torch.cuda.device_of(q):
        layout = make_layout(cu_seqlens, geometry, q.shape[1], k.shape[1])
        out, lse = dense_fwd.dense_forward(
            fit(q, KEY_SIZES), fit(k, KEY_SIZES), fit(v), geometry, layout, window, q_start, k_start, scale
        )
        return _cut(out, v), lse


def _dense_backward(
    dout: Tensor, dlse: Tensor | None, q: Tensor, k: Tensor, v: Tensor, out: Tensor, lse: Tensor,
    cu_seqlens: Tensor | None, geometry: BlockGeometry, window: int, q_start: int, k_start: int, scale: float,
) -> Triple:  # fmt: skip
    with torch.cuda.device_of(q):
        layout = make_layout(cu_seqlens, geometry, q.shape[1], k.shape[1])
        dq, dk, dv = dense_bwd.dense_backward(
            fit(dout),
            dlse,
            fit(q, KEY_SIZES),
            fit(k, KEY_SIZES),
            fit(v),
            fit(out),
            lse,
            geometry,
            layout,
            window,
            q_start,
            k_start,
            scale,
        )
        return _cut(dq, q), _cut(dk, k), _cut(dv, v)


def _cut(x: Tensor, like: Tensor) -> Tensor:
    """`x` without the columns that `fit` added."""
    return x if x.shape[-1] == like.shape[-1] else x[..., : like.shape[-1]].contiguous()
