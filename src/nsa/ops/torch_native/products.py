"""Batched matrix products named by which operand is transposed.

Shapes: `[lanes, M, K]` and so on; results are fresh.
"""

from __future__ import annotations

import torch
from torch import Tensor


def nt(a: Tensor, b: Tensor) -> Tensor:
    """a b^T: `[g, M, K], [g, N, K] -> [g, M, N]`."""
    return torch.bmm(a, b.transpose(1, 2))


def nn(a: Tensor, b: Tensor) -> Tensor:
    """a b: `[g, M, K], [g, K, N] -> [g, M, N]`."""
    return torch.bmm(a, b)


def tn(a: Tensor, b: Tensor) -> Tensor:
    """a^T b: `[g, K, M], [g, K, N] -> [g, M, N]`."""
    return torch.bmm(a.transpose(1, 2), b)
