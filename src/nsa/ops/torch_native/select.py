"""The choice of blocks: compressed probabilities, a stencil to block importance, an exact top-n.

Shapes: q `[B, T, H, Dk]`, k_cmp `[B, N, K, Dk]`, lse `[B, T, H]`; a tile has C queries, N' visible compressed tokens
and J candidate blocks. Result int32 `[B, T, K, n]`.
"""

from __future__ import annotations

import torch
from torch import Tensor

from nsa.geometry import BlockGeometry
from nsa.ops.torch_native import tiles
from nsa.ops.torch_native.masks import CompressedMask
from nsa.ops.torch_native.products import nt


def forward(q: Tensor, k_cmp: Tensor, lse: Tensor, geometry: BlockGeometry, q_start: int, scale: float) -> Tensor:
    """The n blocks of each query and group, ascending, padded with -1 (Eq. 8-12)."""
    num_groups, num_heads = k_cmp.shape[2], q.shape[2] // k_cmp.shape[2]
    chosen = q.new_empty(q.shape[0], q.shape[1], num_groups, geometry.num_selected_blocks, dtype=torch.int32)
    mask = CompressedMask(geometry)
    q_view, lse_view = tiles.by_group(q, num_groups), tiles.by_group(lse, num_groups)
    keys = tiles.keys_by_group(k_cmp)
    chosen_view = chosen.transpose(1, 2)
    for tile in tiles.plan(q, num_groups, _EveryQuery(geometry), q_start):
        stop = min(tile.keys.stop, geometry.num_compressed(q_start + tile.queries.stop))
        tile = tile._replace(keys=slice(0, stop))
        scores = nt(tiles.rows(q_view, tile).mul_(scale * tiles.LOG2_E), tiles.key_rows(keys, tile))
        scores = tiles.scores_view(scores, tile, num_heads)
        mask.hide(scores, tile)
        tile_lse = tiles.safe_lse(lse_view[tile.batch, tile.groups, :, tile.queries])
        p = scores.sub_(tile_lse.unsqueeze(-1)).exp2_().sum(dim=2)
        importance = block_importance(p, geometry, geometry.num_select_blocks(q_start + tile.queries.stop))
        chosen_view[tile.batch, tile.groups, tile.queries] = choose(importance, geometry, tile.first)
    return chosen


class _EveryQuery(CompressedMask):
    """As the compressed branch, but queries that see no compressed token still choose blocks."""

    def keys(self, first: int, last: int) -> tuple[int, int]:
        return 0, max(1, super().keys(first, last)[1])


def block_importance(p: Tensor, geometry: BlockGeometry, num_blocks: int) -> Tensor:
    """Eq. 9: `[..., N'] -> [..., J]`, a strided stencil over the compressed tokens that touch a block."""
    span, before = geometry.strides_per_select, -geometry.overlap_start
    # From the first block's first neighbour (before 0) to the last block's last.
    padded = p.new_zeros(*p.shape[:-1], num_blocks * span + before)
    padded[..., before : before + p.shape[-1]] = p
    importance = p.new_zeros(*p.shape[:-1], num_blocks)
    for offset, weight in enumerate(geometry.overlap_weights):
        importance.add_(padded[..., offset::span][..., :num_blocks], alpha=weight)
    return importance


def choose(importance: Tensor, geometry: BlockGeometry, first: int) -> Tensor:
    """Forced blocks, then the most important candidates, ties to the lower index: `[..., C, J] -> [..., C, n]`."""
    num_blocks, device = importance.shape[-1], importance.device
    block = torch.arange(num_blocks, device=device)
    own = torch.arange(first, first + importance.shape[-2], device=device)[:, None] // geometry.select_block_size
    forced = (block < geometry.num_init_blocks) | (block > own - geometry.num_local_blocks)
    ranks = importance.masked_fill(forced, torch.inf).masked_fill_(block > own, -torch.inf)
    index = ranked(ranks, min(geometry.num_selected_blocks, num_blocks))
    index = index.masked_fill(index > own, num_blocks).sort(dim=-1).values
    index = index.masked_fill(index == num_blocks, -1).to(torch.int32)
    return torch.nn.functional.pad(index, (0, geometry.num_selected_blocks - index.shape[-1]), value=-1)


def ranked(ranks: Tensor, count: int) -> Tensor:
    """Indices of the `count` largest, ties to the lower index, in no particular order; -inf ranks below everything."""
    if ranks.dtype != torch.float32:
        return ranks.sort(dim=-1, descending=True, stable=True).indices[..., :count]
    # The bits of fp32 numbers >= 0 sort as integers (and -inf is negative); the low half makes every key distinct.
    num_blocks = ranks.shape[-1]
    descending = torch.arange(num_blocks - 1, -1, -1, device=ranks.device)
    keys = ranks.view(torch.int32).to(torch.int64).bitwise_left_shift_(32).bitwise_or_(descending)
    chosen = keys.topk(count, dim=-1, sorted=False).values
    return chosen.bitwise_and_(0xFFFFFFFF).neg_().add_(num_blocks - 1)
