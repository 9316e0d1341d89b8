"""Mean pooling of compressed blocks and its gradient, by sums over strides.

A block of l tokens is l/d strides of d tokens, so the sums over strides are made once and every block adds l/d of them.
Shapes: x `[B, T, K, D]`, pooled `[B, N, K, D]`.
"""

from __future__ import annotations

import torch
from torch import Tensor

from nsa.geometry import BlockGeometry


def forward(x: Tensor, geometry: BlockGeometry) -> Tensor:
    """Mean of each complete block, summed in at least fp32."""
    stride, reach = geometry.compress_stride, geometry.compress_block_size // geometry.compress_stride
    count = geometry.num_compressed(x.shape[1])
    if count == 0:
        return x.new_zeros(x.shape[0], 0, *x.shape[2:])
    dtype = torch.promote_types(x.dtype, torch.float32)
    used = x[:, : (count + reach - 1) * stride]
    strides = used.unflatten(1, (-1, stride)).sum(dim=2, dtype=dtype)
    total = strides[:, :count].clone()
    for offset in range(1, reach):
        total += strides[:, offset : offset + count]
    return total.div_(geometry.compress_block_size).to(x.dtype)


def backward(dout: Tensor, geometry: BlockGeometry, length: int) -> Tensor:
    """Each token gets the gradients of the blocks that hold it, over l."""
    stride, reach = geometry.compress_stride, geometry.compress_block_size // geometry.compress_stride
    count = geometry.num_compressed(length)
    dx = dout.new_zeros(dout.shape[0], length, *dout.shape[2:])
    if count == 0:
        return dx
    dtype = torch.promote_types(dout.dtype, torch.float32)
    strides = dout.new_zeros(dout.shape[0], count + reach - 1, *dout.shape[2:], dtype=dtype)
    for offset in range(reach):
        strides[:, offset : offset + count] += dout
    strides.div_(geometry.compress_block_size)
    dx[:, : strides.shape[1] * stride].unflatten(1, (-1, stride)).copy_(strides.unsqueeze(2))
    return dx
