"""Attention over the chosen blocks.

Shapes: q `[B, T, H, Dk]`, k `[B, q_start+T, K, Dk]`, v likewise with Dv, block_indices int32 `[B, T, K, n]`.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from nsa.geometry import BlockGeometry
from nsa.ops.torch_native import tiles
from nsa.ops.torch_native.masks import Tile, add_bias


def forward(
    q: Tensor, k: Tensor, v: Tensor, block_indices: Tensor, geometry: BlockGeometry, q_start: int, scale: float
) -> tuple[Tensor, Tensor]:
    """Softmax attention over the keys of the chosen blocks at positions up to the query's own."""
    return tiles.forward(q, k, v, SelectedMask(geometry, block_indices, q_start), q_start, scale)


def backward(
    dout: Tensor,
    dlse: Tensor | None,
    q: Tensor,
    k: Tensor,
    v: Tensor,
    out: Tensor,
    lse: Tensor,
    block_indices: Tensor,
    geometry: BlockGeometry,
    q_start: int,
    scale: float,
) -> tuple[Tensor, Tensor, Tensor]:
    """Gradients of q, k and v."""
    mask = SelectedMask(geometry, block_indices, q_start)
    return tiles.backward(dout, dlse, q, k, v, out, lse, mask, q_start, scale)


@dataclass(frozen=True)
class SelectedMask:
    """Key s is visible to t when block s // l' is chosen and s <= t."""

    geometry: BlockGeometry
    block_indices: Tensor
    q_start: int

    def keys(self, first: int, last: int) -> tuple[int, int]:
        return 0, last + 1

    def hide(self, scores: Tensor, tile: Tile) -> None:
        size, num_keys = self.geometry.select_block_size, scores.shape[-1]
        index = self.block_indices[tile.batch, tile.queries, tile.groups].transpose(1, 2).long()
        num_blocks = -(-num_keys // size)
        # Column num_blocks takes the -1 of unused slots.
        index = torch.where(index < 0, num_blocks, index)
        hidden = torch.ones(*index.shape[:3], num_blocks + 1, dtype=torch.bool, device=index.device)
        hidden.scatter_(3, index, False)
        hidden = hidden[..., :num_blocks].repeat_interleave(size, dim=-1)[..., :num_keys]
        queries = torch.arange(tile.first, tile.first + scores.shape[-2], device=scores.device)
        hidden |= torch.arange(num_keys, device=scores.device) > queries[:, None]
        add_bias(scores, hidden.unsqueeze(2))
