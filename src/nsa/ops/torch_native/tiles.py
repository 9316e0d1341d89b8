"""The one attention loop: tiles of queries against the range of keys that a mask lets them see.

The heads of a group are rows of one product against the keys they share. Scores are in base 2, because exp2 is a third
of the cost of exp on the CPU. The backward pass holds its scores transposed, `[S, R*C]`: then four of its five products
have rows in memory order.

Shapes: q `[B, T, H, Dk]`, k `[B, S, K, Dk]`, v `[B, S, K, Dv]`, lse `[B, T, H]`; a tile has C queries of b batch rows
and k groups, rows R*C with the heads outermost. Precision: everything is computed in at least fp32.
"""

from __future__ import annotations

import math

import torch
from torch import Tensor

from nsa.ops.torch_native.masks import Mask, Tile
from nsa.ops.torch_native.products import nn, nt, one_by_one, tn

LOG2_E, LN_2 = math.log2(math.e), math.log(2.0)
TILE_ELEMENTS, TILE_ROWS = 1 << 19, 512


def compute_dtype(x: Tensor) -> torch.dtype:
    return torch.promote_types(x.dtype, torch.float32)


def by_group(x: Tensor, num_groups: int) -> Tensor:
    """`[B, T, H, ...] -> [B, K, R, T, ...]`, a view."""
    return x.unflatten(2, (num_groups, -1)).movedim(1, 3)


def keys_by_group(x: Tensor, tiles: list[Tile] | None = None) -> Tensor:
    """`[B, S, K, D] -> [B, K, S', D]`, contiguous, in at least fp32, with rows of zeros as far as the tiles reach."""
    num_rows = max([x.shape[1], *(tile.keys.stop for tile in tiles or [])])
    keys = torch.empty(x.shape[0], x.shape[2], num_rows, x.shape[3], dtype=compute_dtype(x), device=x.device)
    keys[:, :, : x.shape[1]] = x.transpose(1, 2)
    keys[:, :, x.shape[1] :] = 0
    return keys


def rows(x: Tensor, tile: Tile) -> Tensor:
    """The tile's rows of `[B, K, R, T, D]`: `[b*k, R*C, D]`, a contiguous copy in at least fp32."""
    part = x[tile.batch, tile.groups, :, tile.queries]
    copy = torch.empty(part.shape, dtype=compute_dtype(x), device=x.device).copy_(part)
    return copy.flatten(0, 1).flatten(1, 2)


def scores_view(scores: Tensor, tile: Tile, num_heads: int) -> Tensor:
    """`[b*k, R*C, S] -> [b, k, R, C, S]`."""
    num_groups = tile.groups.stop - tile.groups.start
    return scores.unflatten(1, (num_heads, -1)).unflatten(0, (-1, num_groups))


def plan(q: Tensor, num_groups: int, mask: Mask, q_start: int) -> list[Tile]:
    """Tiles of TILE_ROWS rows a group and about TILE_ELEMENTS scores; the first queries, blind, may be in none."""
    tiles = []
    num_rows, length, num_heads = q.shape[0], q.shape[1], q.shape[2] // num_groups
    num_queries = min(mask.max_queries, max(16, TILE_ROWS // num_heads))
    for t0 in range(0, length, num_queries):
        t1 = min(length, t0 + num_queries)
        start, stop = mask.keys(q_start + t0, q_start + t1 - 1)
        if stop <= start:
            continue
        num_scores = num_heads * (t1 - t0) * (stop - start)
        lanes = 1 if one_by_one(q, num_scores * q.shape[3]) else max(1, TILE_ELEMENTS // num_scores)
        batch_step = max(1, lanes // num_groups)
        group_step = num_groups if lanes >= num_groups else 1
        for b0 in range(0, num_rows, batch_step):
            for g0 in range(0, num_groups, group_step):
                batch, groups = slice(b0, min(num_rows, b0 + batch_step)), slice(g0, g0 + group_step)
                tiles.append(Tile(batch, groups, slice(t0, t1), slice(start, stop), q_start + t0))
    return tiles


def num_blind(tiles: list[Tile], q: Tensor) -> int:
    """Queries before the first tile: those that see no key."""
    return tiles[0].queries.start if tiles else q.shape[1]


def key_rows(x: Tensor, tile: Tile) -> Tensor:
    """The tile's keys or values of `[B, K, S, D]`: `[b*k, S, D]`, a view."""
    return x[tile.batch, tile.groups, tile.keys].flatten(0, 1)


def forward(q: Tensor, k: Tensor, v: Tensor, mask: Mask, q_start: int, scale: float) -> tuple[Tensor, Tensor]:
    """Softmax attention under `mask`: out `[B, T, H, Dv]` and natural log-sum-exp `[B, T, H]`."""
    num_groups, num_heads = k.shape[2], q.shape[2] // k.shape[2]
    out = q.new_empty(*q.shape[:3], v.shape[3])
    lse = q.new_empty(q.shape[:3], dtype=compute_dtype(q))
    q_view, out_view, lse_view = (by_group(x, num_groups) for x in (q, out, lse))
    tiles = plan(q, num_groups, mask, q_start)
    keys, values = keys_by_group(k, tiles), keys_by_group(v, tiles)
    out[:, : num_blind(tiles, q)] = 0
    lse[:, : num_blind(tiles, q)] = -torch.inf
    for tile in tiles:
        scores = nt(rows(q_view, tile).mul_(scale * LOG2_E), key_rows(keys, tile))
        mask.hide(scores_view(scores, tile, num_heads), tile)
        o, tile_lse = softmax_product(scores, key_rows(values, tile))
        out_view[tile.batch, tile.groups, :, tile.queries] = scores_view(o, tile, num_heads)
        lse_view[tile.batch, tile.groups, :, tile.queries] = scores_view(tile_lse, tile, num_heads).squeeze(-1)
    return out, lse


def softmax_product(scores: Tensor, values: Tensor) -> tuple[Tensor, Tensor]:
    """softmax2(scores) values, and the natural log-sum-exp; overwrites `scores`. Rows of -inf give 0 and -inf."""
    limits = torch.finfo(scores.dtype)
    top = scores.amax(dim=-1, keepdim=True).clamp_(min=limits.min)
    p = scores.sub_(top).exp2_()
    total = p.sum(dim=-1, keepdim=True)
    out = nn(p, values).div_(total.clamp(min=limits.tiny))
    return out, total.log2_().add_(top).mul_(LN_2)


def backward(
    dout: Tensor,
    dlse: Tensor | None,
    q: Tensor,
    k: Tensor,
    v: Tensor,
    out: Tensor,
    lse: Tensor,
    mask: Mask,
    q_start: int,
    scale: float,
) -> tuple[Tensor, Tensor, Tensor]:
    """Gradients of q, k and v; probabilities are recomputed from `lse`."""
    num_groups, num_heads = k.shape[2], q.shape[2] // k.shape[2]
    dq = torch.empty_like(q, memory_format=torch.contiguous_format)
    q_view, dq_view, dout_view, out_view, lse_view = (by_group(x, num_groups) for x in (q, dq, dout, out, lse))
    dlse_view = None if dlse is None else by_group(dlse, num_groups)
    tiles = plan(q, num_groups, mask, q_start)
    keys, values = keys_by_group(k, tiles), keys_by_group(v, tiles)
    dkeys, dvalues = torch.zeros_like(keys), torch.zeros_like(values)
    dq[:, : num_blind(tiles, q)] = 0
    for tile in tiles:
        q_rows, do = rows(q_view, tile).mul_(scale * LOG2_E), rows(dout_view, tile)
        delta = (scores_view(do, tile, num_heads) * out_view[tile.batch, tile.groups, :, tile.queries]).sum(dim=-1)
        delta = delta.flatten(0, 1).flatten(1, 2)
        if dlse_view is not None:
            delta -= lane_vector(dlse_view, tile)
        tile_keys, tile_values = key_rows(keys, tile), key_rows(values, tile)
        scores = nt(tile_keys, q_rows)
        mask.hide(scores_view(scores.transpose(1, 2), tile, num_heads), tile)
        p = scores.sub_(safe_lse(lane_vector(lse_view, tile)).unsqueeze(1)).exp2_()
        key_rows(dvalues, tile).add_(nn(p, do))
        ds = nt(tile_values, do).sub_(delta.unsqueeze(1)).mul_(p)
        key_rows(dkeys, tile).add_(nn(ds, q_rows))
        dq_view[tile.batch, tile.groups, :, tile.queries] = scores_view(tn(ds, tile_keys), tile, num_heads).mul_(scale)
    # The rows of q carried scale * log2(e).
    return dq, key_gradient(dkeys.mul_(LN_2), k), key_gradient(dvalues, v)


def lane_vector(x: Tensor, tile: Tile) -> Tensor:
    """The tile's part of `[B, K, R, T]`: `[b*k, R*C]`."""
    return x[tile.batch, tile.groups, :, tile.queries].reshape(
        -1, x.shape[2] * (tile.queries.stop - tile.queries.start)
    )


def safe_lse(lse: Tensor) -> Tensor:
    """Base-2 log-sum-exp that makes the probabilities of a row without keys 0: -inf becomes +inf."""
    return torch.where(lse == -torch.inf, torch.inf, lse * LOG2_E)


def key_gradient(grad: Tensor, like: Tensor) -> Tensor:
    """`[B, K, S', D] -> [B, S, K, D]` in the dtype of `like`, a fresh contiguous tensor."""
    return grad[:, :, : like.shape[1]].transpose(1, 2).to(like.dtype).contiguous()
