"""Batched matrix products, named by which operand is transposed, and the CPU's fastest way to make them.

oneDNN's fp32 products run at up to twice the speed of `torch.bmm` where MKL does not use the processor's widest
vectors, but its operator takes one pair of matrices and costs some microseconds to call. Large products are therefore
made one lane at a time (`one_by_one`), small ones all lanes at once.

Shapes: `[lanes, M, K]` and so on; results are fresh.
"""

from __future__ import annotations

import torch
from torch import Tensor

# The operator that Inductor emits for linear layers; absent from builds without oneDNN.
_LINEAR = getattr(torch.ops.mkldnn, "_linear_pointwise", None) if torch.backends.mkldnn.is_available() else None
MIN_ONE_BY_ONE = 1 << 21  # multiply-adds of one lane
MIN_CONTRACTION = 256  # rows summed over, from which a^T b is faster as (b^T a)^T than from a copy of a^T


def one_by_one(x: Tensor, multiply_adds: int) -> bool:
    """Whether products of this size with operands like `x` are faster one lane at a time."""
    return (
        _LINEAR is not None
        and x.device.type == "cpu"
        and torch.promote_types(x.dtype, torch.float32) == torch.float32
        and multiply_adds >= MIN_ONE_BY_ONE
    )


def nt(a: Tensor, b: Tensor) -> Tensor:
    """a b^T: `[g, M, K], [g, N, K] -> [g, M, N]`."""
    if a.shape[0] == 1 and one_by_one(a, a.numel() * b.shape[1]):
        return _linear(a[0], b[0])
    return torch.bmm(a, b.transpose(1, 2))


def nn(a: Tensor, b: Tensor) -> Tensor:
    """a b: `[g, M, K], [g, K, N] -> [g, M, N]`."""
    if a.shape[0] == 1 and one_by_one(a, a.numel() * b.shape[2]):
        return _linear(a[0], b[0].t())
    return torch.bmm(a, b)


def tn(a: Tensor, b: Tensor) -> Tensor:
    """a^T b: `[g, K, M], [g, K, N] -> [g, M, N]`."""
    if a.shape[0] == 1 and one_by_one(a, a.numel() * b.shape[2]):
        if a.shape[1] >= MIN_CONTRACTION:
            return _linear(b[0].t(), a[0].t()).transpose(1, 2)
        return _linear(a[0].t().contiguous(), b[0].t())
    return torch.bmm(a.transpose(1, 2), b)


def _linear(x: Tensor, weight: Tensor) -> Tensor:
    """x weight^T: `[M, K], [N, K] -> [1, M, N]`."""
    assert _LINEAR is not None
    return _LINEAR(x, weight, None, "none", [], "").unsqueeze(0)
