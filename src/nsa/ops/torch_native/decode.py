"""Attention from a cache: one new token for each row, all rows at once.

Legend: B rows, H query heads, K key/value groups, R = H/K, N compressed tokens, J selection blocks,
n chosen blocks. Rows are left-aligned and may differ in length. A step touches the compressed stream, the chosen blocks
and the window, never the whole cache.
"""

from __future__ import annotations

import torch
from torch import Tensor

from nsa.geometry import BlockGeometry
from nsa.ops.cache_view import CacheView
from nsa.ops.call import Call
from nsa.ops.torch_native.select import block_importance, choose


def decode_step(q: Tensor, view: CacheView, call: Call) -> tuple[tuple[Tensor, Tensor, Tensor], Tensor]:
    """One query for each row, `q` `[B,1,H,Dk]`; returns the branches' outputs `[B,1,H,Dv]` and blocks `[B,1,K,n]`."""
    groups, geometry = view.k.shape[2], call.geometry
    dtype = torch.promote_types(q.dtype, torch.float32)
    q = (q[:, 0].to(dtype) * call.scale).unflatten(1, (groups, -1))  # [B,K,R,D]
    last = torch.tensor(view.lengths, device=q.device) - 1
    out_cmp, p_cmp = compressed_step(q, view, geometry)
    blocks = choose_step(p_cmp, last, max(view.lengths), geometry)
    out_slc = selected_step(q, view, blocks, last, geometry)
    out_win = window_step(q, view, geometry)
    outs = (x.flatten(1, 2).unsqueeze(1).to(view.v.dtype) for x in (out_cmp, out_slc, out_win))
    return tuple(outs), blocks.unsqueeze(1)  # pyright: ignore[reportReturnType]


def _softmax_over(q: Tensor, k: Tensor, visible: Tensor | None) -> Tensor:
    """Weights `[B,K,R,S]` of keys `[B,K,S,D]`; rows without a visible key get zeros. `visible` is `[B,1 or K,1,S]`."""
    scores = q @ k.to(q.dtype).transpose(-1, -2)
    if visible is None:
        return scores.softmax(dim=-1)
    # A row that sees nothing has only -inf, whose softmax is NaN; its weights are 0.
    return scores.masked_fill(~visible, -torch.inf).softmax(dim=-1).masked_fill(~visible, 0.0)


def compressed_step(q: Tensor, view: CacheView, geometry: BlockGeometry) -> tuple[Tensor, Tensor]:
    """Output `[B,K,R,D]` of the compressed branch and its weights `[B,K,R,N]`; `q` `[B,K,R,D]` is scaled already."""
    counts = [geometry.num_compressed(length) for length in view.lengths]
    most = max(counts)
    k, v = view.k_cmp[:, :most].transpose(1, 2), view.v_cmp[:, :most].transpose(1, 2)
    visible = None
    if min(counts) < most:
        index = torch.arange(most, device=q.device)
        visible = (index < torch.tensor(counts, device=q.device).unsqueeze(1))[:, None, None, :]
    p = _softmax_over(q, k, visible)
    return p @ v.to(p.dtype), p


def choose_step(p_cmp: Tensor, last: Tensor, longest: int, geometry: BlockGeometry) -> Tensor:
    """The n blocks of each row and group, ascending, -1 for none, `[B,K,n]` (Eq. 9, 10, forced blocks, top-n)."""
    grouped = p_cmp.sum(dim=2).unsqueeze(-1)
    importance = block_importance(grouped, geometry, geometry.num_select_blocks(longest)).squeeze(-1)
    return choose(importance, geometry, last.unsqueeze(-1))


def selected_step(q: Tensor, view: CacheView, blocks: Tensor, last: Tensor, geometry: BlockGeometry) -> Tensor:
    """Output `[B,K,R,D]` of the selected branch; `last` `[B]` is the position of each row's query."""
    offset = torch.arange(geometry.select_block_size, device=q.device)
    position = (blocks.unsqueeze(-1) * geometry.select_block_size + offset).flatten(2)  # [B,K,n*l']
    visible = (position >= 0) & (position <= last.view(-1, 1, 1))
    position = position.clamp(min=0, max=view.k.shape[1] - 1)
    stream = torch.arange(q.shape[0] * q.shape[1], device=q.device).view(*q.shape[:2], 1) * view.k.shape[1]
    index = (stream + position).flatten()
    # The cache lies heads first, so that flattening it copies nothing.
    k, v = (x.transpose(1, 2).flatten(0, 2).index_select(0, index) for x in (view.k, view.v))
    k, v = (x.view(*position.shape, -1) for x in (k, v))  # [B,K,n*l',D]
    p = _softmax_over(q, k, visible.unsqueeze(2))
    return p @ v.to(p.dtype)


def window_step(q: Tensor, view: CacheView, geometry: BlockGeometry) -> Tensor:
    """Output `[B,K,R,D]` of the window branch."""
    ends = [length - start for length, start in zip(view.lengths, view.win_start, strict=True)]
    firsts = [max(0, end - min(geometry.window_size, length)) for end, length in zip(ends, view.lengths, strict=True)]
    low, high = min(firsts), max(ends)
    k, v = view.k_win[:, low:high].transpose(1, 2), view.v_win[:, low:high].transpose(1, 2)
    visible = None
    if len(set(firsts)) > 1 or len(set(ends)) > 1:
        index = torch.arange(low, high, device=q.device)
        first, end = (torch.tensor(x, device=q.device).unsqueeze(1) for x in (firsts, ends))
        visible = ((index >= first) & (index < end))[:, None, None, :]
    p = _softmax_over(q, k, visible)
    return p @ v.to(p.dtype)
