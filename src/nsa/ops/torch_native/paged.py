"""A decode step from a paged cache in plain PyTorch; nothing of the lengths is read on the host.

It gathers every page of every row, so its work is that of the longest row that the block table could hold. It is the
oracle of the kernels and the path of CPUs.

Legend: B rows, Q queries of a step, H query heads, K key/value groups, R = H/K, M pages a row, N compressed tokens.
"""

from __future__ import annotations

import torch
from torch import Tensor

from nsa.geometry import BlockGeometry
from nsa.ops.cache_view import PagedView
from nsa.ops.torch_native.select import block_importance, choose


def paged_decode_forward(
    q: Tensor, gates: Tensor, view: PagedView, geometry: BlockGeometry, scale: float
) -> tuple[Tensor, Tensor]:
    """Outputs `[B, Q, H, Dv]` and chosen blocks int32 `[B, Q, K, n]`; arguments as in `nsa.ops.paged`."""
    k, v, k_cmp, v_cmp, block_table, lengths, k_win, v_win = view
    num_queries, dtype = q.shape[1], torch.promote_types(q.dtype, torch.float32)
    query = (q.to(dtype) * scale).unflatten(2, (k.shape[1], -1)).transpose(1, 2).transpose(2, 3)  # [B,K,R,Q,D]
    position = lengths.long().unsqueeze(1) - num_queries + torch.arange(num_queries, device=q.device)  # [B,Q]
    keys, values = (_rows(x, block_table).to(dtype) for x in (k, v))
    counts = (position + 1 - geometry.compress_block_size).div(geometry.compress_stride, rounding_mode="floor") + 1
    k_rows, v_rows = (_rows(x, block_table).to(dtype) for x in (k_cmp, v_cmp))
    index = torch.arange(k_rows.shape[2], device=q.device)
    out_cmp, p = _attend(query, k_rows, v_rows, (index < counts.unsqueeze(-1)).unsqueeze(1))
    # [B,K,N,Q]: the heads of a group choose together.
    importance = block_importance(p.sum(2).transpose(-1, -2), geometry, block_table.shape[1]).transpose(-1, -2)
    chosen = choose(importance.contiguous(), geometry, position.unsqueeze(1))
    chosen = chosen.masked_fill(position[:, None, :, None] < 0, -1)  # padding
    token = torch.arange(keys.shape[2], device=q.device)
    past = (token <= position.unsqueeze(-1)).unsqueeze(1)  # [B,1,Q,S]
    blocks = torch.arange(block_table.shape[1], device=q.device)
    is_chosen = (chosen.unsqueeze(-1) == blocks).any(-2).repeat_interleave(geometry.select_block_size, dim=-1)
    out_slc, _ = _attend(query, keys, values, past & is_chosen)
    near = past & (token > position.unsqueeze(-1) - geometry.window_size).unsqueeze(1)
    if k_win is not None and v_win is not None:
        keys, values = k_win.to(dtype), v_win.to(dtype)
        slot = torch.arange(k_win.shape[2], device=q.device)
        newest = lengths.long().view(-1, 1, 1) - 1
        held = (newest - (newest - slot) % k_win.shape[2]).unsqueeze(1)  # the newest position that a slot can hold
        at = position[:, None, :, None]
        near = (held >= 0) & (held <= at) & (held > at - geometry.window_size)
    out_win, _ = _attend(query, keys, values, near)
    outs = (x.permute(0, 3, 1, 2, 4).flatten(2, 3) for x in (out_cmp, out_slc, out_win))
    weights = gates.to(dtype).unsqueeze(-2).unbind(-1)
    out = sum(weight * x for weight, x in zip(weights, outs, strict=True))
    return out.to(v.dtype), chosen.transpose(1, 2).contiguous()  # pyright: ignore[reportAttributeAccessIssue]


def _rows(pages: Tensor, block_table: Tensor) -> Tensor:
    """The pages of each row one after another: `[P, K, tokens, D]` to `[B, K, M * tokens, D]`."""
    return pages[block_table.long()].transpose(1, 2).flatten(2, 3)


def _attend(q: Tensor, k: Tensor, v: Tensor, visible: Tensor) -> tuple[Tensor, Tensor]:
    """Softmax over the visible keys; `[B,K,R,Q,D]` and its weights. `visible` is `[B, 1 or K, Q, S]`.

    What no query sees may be anything, NaN too; a query that sees nothing gets zeros.
    """
    seen = visible.any(-2).unsqueeze(-1)  # [B, 1 or K, S, 1]
    k, v = k.masked_fill(~seen, 0.0), v.masked_fill(~seen, 0.0)
    visible = visible.unsqueeze(2)
    scores = (q @ k.unsqueeze(2).transpose(-1, -2)).masked_fill(~visible, -torch.inf)
    p = scores.softmax(dim=-1).masked_fill(~visible, 0.0)
    return p @ v.unsqueeze(2), p
