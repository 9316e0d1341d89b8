"""The compression operators: each complete block of l tokens, every d tokens, becomes one token (section 3.3.1).

All map `[B, T, Hkv, D] -> [B, N, Hkv, D]`, also for packed documents (B = 1, `cu_seqlens`), whose compressed tokens
stand one after another, followed by unused rows up to `num_compressed`. Keys and values get an operator each.

    >>> import torch
    >>> from nsa import BlockGeometry
    >>> operator = build_compression("conv", BlockGeometry(8, 4, 16, 4), num_kv_heads=2, head_dim=32)
    >>> operator(torch.randn(1, 50, 2, 32)).shape
    torch.Size([1, 11, 2, 32])
"""

from __future__ import annotations

import torch
from torch import Tensor, nn

from nsa.geometry import BlockGeometry
from nsa.ops.api import mean_pool
from nsa.ops.packed import document_of


def build_compression(kind: str, geometry: BlockGeometry, num_kv_heads: int, head_dim: int) -> nn.Module:
    """The operator "mean", "conv" or "mlp".

    Raises:
        ValueError: `kind` is none of them.
    """
    if kind == "mean":
        return MeanCompression(geometry)
    if kind == "conv":
        return ConvCompression(geometry, num_kv_heads, head_dim)
    if kind == "mlp":
        return MLPCompression(geometry, head_dim)
    raise ValueError(f"compression must be 'mean', 'conv' or 'mlp', not {kind!r}")


class MeanCompression(nn.Module):
    """The mean of each block; no parameters."""

    def __init__(self, geometry: BlockGeometry) -> None:
        super().__init__()
        self.geometry = geometry

    def forward(
        self, x: Tensor, cu_seqlens: Tensor | None = None, num_compressed: int | None = None, backend: str = "auto"
    ) -> Tensor:
        return mean_pool(x, self.geometry, cu_seqlens, num_compressed=num_compressed, backend=backend)


class ConvCompression(nn.Module):
    """A depthwise convolution of kernel l and stride d, at first the mean, then a residual MLP, at first 0."""

    def __init__(self, geometry: BlockGeometry, num_kv_heads: int, head_dim: int) -> None:
        super().__init__()
        self.geometry = geometry
        size = geometry.compress_block_size
        self.weight = nn.Parameter(torch.full((size, num_kv_heads, head_dim), 1 / size))
        self.up = nn.Linear(head_dim, 2 * head_dim)
        self.down = nn.Linear(2 * head_dim, head_dim)
        self.reset_to_mean()

    def reset_to_mean(self) -> None:
        """Make the operator the mean again."""
        nn.init.constant_(self.weight, 1 / self.geometry.compress_block_size)
        nn.init.zeros_(self.down.weight)
        nn.init.zeros_(self.down.bias)

    def forward(
        self, x: Tensor, cu_seqlens: Tensor | None = None, num_compressed: int | None = None, backend: str = "auto"
    ) -> Tensor:
        blocks = gather_blocks(x, self.geometry, cu_seqlens, num_compressed)
        pooled = torch.einsum("bnlkd,lkd->bnkd", blocks, self.weight.to(x.dtype))
        return pooled + self.down(nn.functional.gelu(self.up(pooled)))


class MLPCompression(nn.Module):
    """The paper's operator: learned encoding of the position inside the block, flatten, MLP (Eq. 7)."""

    def __init__(self, geometry: BlockGeometry, head_dim: int) -> None:
        super().__init__()
        self.geometry = geometry
        self.position = nn.Parameter(torch.empty(geometry.compress_block_size, head_dim))
        self.up = nn.Linear(geometry.compress_block_size * head_dim, 2 * head_dim)
        self.down = nn.Linear(2 * head_dim, head_dim)
        self.reset_position()

    def reset_position(self) -> None:
        nn.init.normal_(self.position, std=0.02)

    def forward(
        self, x: Tensor, cu_seqlens: Tensor | None = None, num_compressed: int | None = None, backend: str = "auto"
    ) -> Tensor:
        blocks = gather_blocks(x, self.geometry, cu_seqlens, num_compressed)
        blocks = blocks + self.position.to(x.dtype).unsqueeze(1)
        return self.down(nn.functional.gelu(self.up(blocks.transpose(2, 3).flatten(3))))


def gather_blocks(
    x: Tensor, geometry: BlockGeometry, cu_seqlens: Tensor | None, num_compressed: int | None = None
) -> Tensor:
    """The tokens of each complete compressed block, `[B, T, Hkv, D] -> [B, N, l, Hkv, D]`; N as `block_starts` says."""
    size = geometry.compress_block_size
    if cu_seqlens is None and x.shape[1] >= size:
        return x.unfold(1, size, geometry.compress_stride).movedim(-1, 2)
    starts = block_starts(x, geometry, cu_seqlens, num_compressed)
    index = starts.unsqueeze(1) + torch.arange(size, device=x.device)
    return x[:, index.flatten()].unflatten(1, (starts.numel(), size))


def block_starts(
    x: Tensor, geometry: BlockGeometry, cu_seqlens: Tensor | None, num_compressed: int | None = None
) -> Tensor:
    """Index along T of the first token of each compressed block, `[N]`.

    Packed input gives `num_compressed` entries, `geometry.max_num_compressed(T)` unless given; those past the last
    document's point at some token and are to be ignored. Nothing is read on the host.
    """
    size, stride = geometry.compress_block_size, geometry.compress_stride
    if cu_seqlens is None:
        return torch.arange(geometry.num_compressed(x.shape[1]), device=x.device) * stride
    count = geometry.max_num_compressed(x.shape[1]) if num_compressed is None else num_compressed
    lengths = cu_seqlens.diff()
    per_document = torch.where(lengths < size, 0, (lengths - size) // stride + 1)
    ends = per_document.cumsum(0)
    row = torch.arange(count, device=x.device)
    document = document_of(row, nn.functional.pad(ends, (1, 0)))
    start = cu_seqlens[document] + (row - (ends - per_document)[document]) * stride
    return start.clamp(max=max(0, x.shape[1] - size))
