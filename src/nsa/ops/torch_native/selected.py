"""Attention over the chosen blocks: the cheaper of two routes.

Short sequences go through the tiles with all keys and a mask of the chosen blocks; long ones block by block
(`blockwise`), each block of keys against the queries that chose it.

Shapes: q `[B, T, H, Dk]`, k `[B, q_start+T, K, Dk]`, v likewise with Dv, block_indices int32 `[B, T, K, n]`.
"""

from __future__ import annotations

import torch
from torch import Tensor

from nsa.geometry import BlockGeometry
from nsa.ops.torch_native import blockwise, tiles
from nsa.ops.torch_native.masks import Biases, Tile, bias_like, hide_future

# Measured on the CPU: a score costs this much more block by block, and visiting a block as much as so many scores.
BLOCKWISE_COST, VISIT_COST = 1.4, 100_000


def forward(
    q: Tensor, k: Tensor, v: Tensor, block_indices: Tensor, geometry: BlockGeometry, q_start: int, scale: float
) -> tuple[Tensor, Tensor]:
    """Softmax attention over the keys of the chosen blocks at positions up to the query's own."""
    if blockwise_is_cheaper(q, k, geometry, q_start):
        return blockwise.forward(q, k, v, block_indices, geometry, q_start, scale)
    return tiles.forward(q, k, v, SelectedMask(geometry, block_indices), q_start, scale)


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
    if blockwise_is_cheaper(q, k, geometry, q_start):
        return blockwise.backward(dout, dlse, q, k, v, out, lse, block_indices, geometry, q_start, scale)
    return tiles.backward(dout, dlse, q, k, v, out, lse, SelectedMask(geometry, block_indices), q_start, scale)


def blockwise_is_cheaper(q: Tensor, k: Tensor, geometry: BlockGeometry, q_start: int) -> bool:
    """Compare the scores that each route computes for one group, with what a visit of a block costs."""
    length, num_heads = q.shape[1], q.shape[2] // k.shape[2]
    all_keys = num_heads * length * (q_start + (length + tiles.TILE_ROWS / num_heads) / 2)
    chosen_keys = num_heads * length * geometry.num_selected_blocks * geometry.select_block_size
    visits = geometry.num_select_blocks(q_start + length)
    return BLOCKWISE_COST * chosen_keys + VISIT_COST * visits < all_keys


class SelectedMask:
    """Key s is visible to t when block s // l' is chosen and s <= t."""

    max_queries = 256

    def __init__(self, geometry: BlockGeometry, block_indices: Tensor) -> None:
        self.block_size, self.block_indices, self.biases = geometry.select_block_size, block_indices, Biases()

    def keys(self, first: int, last: int) -> tuple[int, int]:
        return 0, last + 1

    def hide(self, scores: Tensor, tile: Tile) -> None:
        hide_future(self.biases, scores)
        size, num_keys = self.block_size, scores.shape[-1]
        num_blocks = -(-num_keys // size)
        index = self.block_indices[tile.batch, tile.queries, tile.groups].transpose(1, 2).long()
        # The column after the last takes unused slots (-1) and blocks after the tile.
        index = torch.where((index < 0) | (index >= num_blocks), num_blocks, index)
        hidden = torch.ones(*index.shape[:3], num_blocks + 1, dtype=torch.bool, device=index.device)
        bias = bias_like(scores, hidden.scatter_(3, index, False)[..., :num_blocks]).unsqueeze(2)
        whole = num_keys // size
        scores[..., : whole * size].unflatten(-1, (whole, size)).add_(bias[..., :whole].unsqueeze(-1))
        if whole < num_blocks:
            scores[..., whole * size :].add_(bias[..., whole:])
