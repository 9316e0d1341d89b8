"""Rotary position embedding (arXiv 2104.09864), applied to each head by itself.

The half-split layout of Llama: feature i is rotated with feature i + D/2. Shapes: `[B, T, H, D]` heads, `[B, T, D]` or
`[1, T, D]` cosines and sines.
"""

from __future__ import annotations

import torch
from torch import Tensor, nn


class RotaryEmbedding(nn.Module):
    """Cosines and sines for positions.

    Holds no buffer: the frequencies follow from the base, so that neither a dtype cast nor loading can damage them.

    Args:
        head_dim: D, size of a head; even.
        base: wavelength base, often 10,000.
        scaling_factor: linear position interpolation (arXiv 2306.15595): positions are divided by it.

    Raises:
        ValueError: an odd head size, or a base or factor that is not positive.
    """

    def __init__(self, head_dim: int, base: float = 10000.0, scaling_factor: float = 1.0) -> None:
        super().__init__()
        if head_dim % 2:
            raise ValueError(f"rotary embedding pairs features, so head_dim must be even, not {head_dim}")
        if base <= 0 or scaling_factor <= 0:
            raise ValueError(f"rope base {base} and scaling factor {scaling_factor} must be positive")
        self.head_dim, self.base, self.scaling_factor = head_dim, base, scaling_factor

    def forward(self, positions: Tensor, dtype: torch.dtype = torch.float32) -> tuple[Tensor, Tensor]:
        """`[B, T]` positions to cosines and sines `[B, T, D]`, in fp32, or fp64 if `dtype` is."""
        dtype = torch.promote_types(dtype, torch.float32)
        exponent = torch.arange(0, self.head_dim, 2, device=positions.device, dtype=dtype) / self.head_dim
        return rotations(positions.to(dtype) / self.scaling_factor, self.base**-exponent)

    def extra_repr(self) -> str:
        return f"head_dim={self.head_dim}, base={self.base}, scaling_factor={self.scaling_factor}"


def rotations(positions: Tensor, frequencies: Tensor) -> tuple[Tensor, Tensor]:
    """Cosines and sines `[B, T, D]` of positions `[B, T]` times angles per position `[D/2]`, in their dtype."""
    angles = positions.unsqueeze(-1) * frequencies
    angles = torch.cat([angles, angles], dim=-1)
    return angles.cos(), angles.sin()


def apply_rope(x: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
    """Rotate every head of `[B, T, H, D]` by `[B, T, D]` cosines and sines; keeps the dtype of `x`."""
    dtype = torch.promote_types(x.dtype, cos.dtype)
    first, second = x.to(dtype).chunk(2, dim=-1)
    rotated = torch.cat([-second, first], dim=-1)
    return (x.to(dtype) * cos.unsqueeze(2) + rotated * sin.unsqueeze(2)).to(x.dtype)
