"""The choice of blocks: compressed probabilities, a stencil to block importance, an exact top-n.

Equal keys must give bit-equal importance, or ties would not go to the lower index. Products and exp2 treat the ends of
their operands differently. Hence keys are rows here and their number is a multiple of 32, as the mask gives it; exp2
runs over whole vectors; and sums are made one addition after the other.

Shapes: q `[B, T, H, Dk]`, k_cmp `[B, N, K, Dk]`, lse `[B, T, H]`; a tile has C queries, N' compressed tokens and J
candidate blocks. Result int32 `[B, T, K, n]`.
"""

from __future__ import annotations

import torch
from torch import Tensor

from nsa.geometry import BlockGeometry
from nsa.ops.torch_native import tiles
from nsa.ops.torch_native.masks import CompressedMask
from nsa.ops.torch_native.products import nt

UNSPLIT = 1 << 15  # elements that PyTorch gives to one thread, in whole vectors


def forward(q: Tensor, k_cmp: Tensor, lse: Tensor, geometry: BlockGeometry, q_start: int, scale: float) -> Tensor:
    """The n blocks of each query and group, ascending, padded with -1 (Eq. 8-12)."""
    num_groups = k_cmp.shape[2]
    chosen = q.new_empty(q.shape[0], q.shape[1], num_groups, geometry.num_selected_blocks, dtype=torch.int32)
    mask = _EveryQuery(geometry)
    q_view, lse_view, chosen_view = (
        tiles.by_group(q, num_groups),
        tiles.by_group(lse, num_groups),
        chosen.transpose(1, 2),
    )
    plan = tiles.plan(q, num_groups, mask, q_start)
    keys = tiles.keys_by_group(k_cmp, plan)
    for tile in plan:
        scores = nt(tiles.key_rows(keys, tile), tiles.rows(q_view, tile).mul_(scale * tiles.LOG2_E))
        mask.hide(tiles.scores_view(scores.transpose(1, 2), tile, q_view.shape[2]), tile)
        scores.sub_(tiles.safe_lse(tiles.lane_vector(lse_view, tile)).unsqueeze(1))
        for part in scores.flatten().split(UNSPLIT):
            part.exp2_()
        p, *others = scores.unflatten(2, (q_view.shape[2], -1)).unbind(2)
        for other in others:
            p.add_(other)
        importance = block_importance(p, geometry, geometry.num_select_blocks(q_start + tile.queries.stop))
        positions = torch.arange(tile.first, q_start + tile.queries.stop, device=q.device)
        index = choose(importance.transpose(1, 2).contiguous(), geometry, positions)
        chosen_view[tile.batch, tile.groups, tile.queries] = index.unflatten(
            0, (-1, tile.groups.stop - tile.groups.start)
        )
    return chosen


class _EveryQuery(CompressedMask):
    """As the compressed branch, but queries that see no compressed token have a tile too, of hidden keys."""

    def keys(self, first: int, last: int) -> tuple[int, int]:
        return 0, max(32, super().keys(first, last)[1])


def block_importance(p: Tensor, geometry: BlockGeometry, num_blocks: int) -> Tensor:
    """Eq. 9: `[..., N', C] -> [..., J, C]`, a strided stencil over the compressed tokens that touch a block."""
    span, before = geometry.strides_per_select, -geometry.overlap_start
    # From the first block's first neighbour (before 0) to the last block's last.
    padded = p.new_zeros(*p.shape[:-2], num_blocks * span + before, p.shape[-1])
    count = min(p.shape[-2], num_blocks * span)
    padded[..., before : before + count, :] = p[..., :count, :]
    importance = p.new_zeros(*p.shape[:-2], num_blocks, p.shape[-1])
    for offset, weight in enumerate(geometry.overlap_weights):
        # Multiplied first: add_(alpha) may fuse or not from element to element.
        importance.add_(padded[..., offset::span, :][..., :num_blocks, :] * weight)
    return importance


def choose(importance: Tensor, geometry: BlockGeometry, positions: Tensor) -> Tensor:
    """Forced blocks, then the most important candidates, ties to the lower index: `[..., C, J] -> [..., C, n]`.

    `positions` `[..., C]` are the queries'.
    """
    num_blocks, device = importance.shape[-1], importance.device
    block = torch.arange(num_blocks, device=device)
    own = (positions // geometry.select_block_size).unsqueeze(-1)
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
