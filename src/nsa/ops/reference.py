"""The specification in plain PyTorch: slow, obvious, any floating dtype, differentiable by autograd.

Every other backend is held against this file. It builds full score matrices and boolean masks from positions, one
document at a time, so read it to learn what the operator computes, not how to compute it fast.

Legend: B batch, T queries, S keys, N compressed tokens, J selection blocks, n chosen blocks, H query heads, K key/value
groups (Hkv), R = H/K heads of a group, D head size. Queries are at positions q_start .. q_start+T-1; keys at k_start ..
"""

from __future__ import annotations

from collections.abc import Callable
from itertools import pairwise

import torch
from torch import Tensor

from nsa.geometry import BlockGeometry


def mean_pool(x: Tensor, geometry: BlockGeometry, cu_seqlens: Tensor | None, num_compressed: int) -> Tensor:
    """Mean of each complete compressed block; `[B,T,K,D] -> [B,N,K,D]`, zero rows up to `num_compressed`."""
    pooled = []
    for start, end in _documents(cu_seqlens, x.shape[1]):
        for i in range(geometry.num_compressed(end - start)):
            first = start + i * geometry.compress_stride
            pooled.append(x[:, first : first + geometry.compress_block_size].mean(dim=1))
    out = x.new_zeros(x.shape[0], num_compressed, *x.shape[2:])
    if pooled:
        out = torch.cat([torch.stack(pooled, dim=1), out[:, len(pooled) :]], dim=1)
    return out


def compressed_attention(
    q: Tensor,
    k_cmp: Tensor,
    v_cmp: Tensor,
    geometry: BlockGeometry,
    cu_seqlens: Tensor | None,
    q_start: int,
    scale: float,
) -> tuple[Tensor, Tensor]:
    """Attention over the compressed tokens whose block has ended: token i is visible to t when i d + l - 1 <= t."""

    def document(q: Tensor, k_cmp: Tensor, v_cmp: Tensor) -> tuple[Tensor, Tensor]:
        return _attend(q, k_cmp, v_cmp, _visible_compressed(q, k_cmp, geometry, q_start), scale)

    out, lse = _per_document(document, geometry, cu_seqlens, (q,), (k_cmp, v_cmp))
    return out, lse


def select_blocks(
    q: Tensor,
    k_cmp: Tensor,
    lse: Tensor,
    geometry: BlockGeometry,
    cu_seqlens: Tensor | None,
    q_start: int,
    scale: float,
) -> Tensor:
    """The chosen blocks of each query and group, int32 `[B,T,K,n]`, ascending, padded with -1 (Eq. 8-12)."""

    def document(q: Tensor, lse: Tensor, k_cmp: Tensor) -> tuple[Tensor]:
        importance = importance_scores(q, k_cmp, lse, geometry, q_start, scale)
        return (choose(importance, geometry, q_start),)

    return _per_document(document, geometry, cu_seqlens, (q, lse), (k_cmp,))[0]


def importance_scores(
    q: Tensor, k_cmp: Tensor, lse: Tensor, geometry: BlockGeometry, q_start: int, scale: float
) -> Tensor:
    """Group-summed importance of every selection block for one document, `[B,T,K,J]` (Eq. 9, 10)."""
    T, N = q.shape[1], k_cmp.shape[1]
    num_blocks = geometry.num_select_blocks(q_start + T)
    visible = _visible_compressed(q, k_cmp, geometry, q_start)
    scores = _scores(q, k_cmp, scale).masked_fill(~visible, -torch.inf)
    lse = lse.to(scores.dtype).unflatten(2, (k_cmp.shape[2], -1)).unsqueeze(-1)
    p_cmp = torch.where(visible, torch.exp(scores - lse), 0.0)  # [B,T,K,R,N]
    overlap = torch.zeros(N, num_blocks, dtype=p_cmp.dtype, device=q.device)
    size, stride, block = geometry.compress_block_size, geometry.compress_stride, geometry.select_block_size
    for i in range(N):
        for position in range(i * stride, i * stride + size):
            if position // block < num_blocks:
                overlap[i, position // block] += 1
    return (p_cmp @ (overlap / stride)).sum(dim=3)


def choose(importance: Tensor, geometry: BlockGeometry, q_start: int) -> Tensor:
    """Forced blocks first, then the most important candidates, ties to the lower index; `[B,T,K,J] -> [B,T,K,n]`."""
    num_rows = importance.shape[1]
    chosen = torch.full((*importance.shape[:3], geometry.num_selected_blocks), -1, dtype=torch.int32)
    ranked = importance.detach().sort(dim=-1, descending=True, stable=True).indices.cpu()
    for row in range(num_rows):
        own = (q_start + row) // geometry.select_block_size
        forced = {j for j in range(geometry.num_init_blocks) if j <= own}
        forced |= {own - j for j in range(geometry.num_local_blocks) if own >= j}
        count = min(geometry.num_selected_blocks, own + 1)
        for b in range(importance.shape[0]):
            for group in range(importance.shape[2]):
                others = [j for j in ranked[b, row, group].tolist() if j <= own and j not in forced]
                blocks = sorted([*forced, *others[: count - len(forced)]])
                chosen[b, row, group, :count] = torch.tensor(blocks, dtype=torch.int32)
    return chosen.to(importance.device)


def selected_attention(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    block_indices: Tensor,
    geometry: BlockGeometry,
    cu_seqlens: Tensor | None,
    q_start: int,
    scale: float,
) -> tuple[Tensor, Tensor]:
    """Attention over the keys of the chosen blocks at positions up to the query's own (section 3.3.2)."""

    def document(q: Tensor, block_indices: Tensor, k: Tensor, v: Tensor) -> tuple[Tensor, Tensor]:
        q_pos, k_pos = _positions(q, q_start), _positions(k, 0)
        key_block = k_pos // geometry.select_block_size
        in_block = (block_indices.unsqueeze(-1) == key_block).any(dim=3)  # [B,T,K,S]
        causal = k_pos <= q_pos[:, None]
        return _attend(q, k, v, (in_block & causal[:, None, :]).unsqueeze(3), scale)

    out, lse = _per_document(document, None, cu_seqlens, (q, block_indices), (k, v))
    return out, lse


def window_attention(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    geometry: BlockGeometry,
    cu_seqlens: Tensor | None,
    q_start: int,
    k_start: int,
    scale: float,
) -> tuple[Tensor, Tensor]:
    """Attention over positions max(0, t-w+1) .. t."""

    def document(q: Tensor, k: Tensor, v: Tensor) -> tuple[Tensor, Tensor]:
        distance = _positions(q, q_start)[:, None] - _positions(k, k_start)
        visible = (distance >= 0) & (distance < geometry.window_size)
        return _attend(q, k, v, visible[:, None, None, :], scale)

    out, lse = _per_document(document, None, cu_seqlens, (q,), (k, v))
    return out, lse


def _positions(x: Tensor, start: int) -> Tensor:
    return torch.arange(start, start + x.shape[1], device=x.device)


def _visible_compressed(q: Tensor, k_cmp: Tensor, geometry: BlockGeometry, q_start: int) -> Tensor:
    last = _positions(k_cmp, 0) * geometry.compress_stride + geometry.compress_block_size - 1
    return (last <= _positions(q, q_start)[:, None])[:, None, None, :]  # [T,1,1,N]


def _scores(q: Tensor, k: Tensor, scale: float) -> Tensor:
    """scale q.k in at least fp32, `[B,T,K,R,S]`."""
    dtype = torch.promote_types(q.dtype, torch.float32)
    q = q.to(dtype).unflatten(2, (k.shape[2], -1))
    return torch.einsum("btkrd,bskd->btkrs", q, k.to(dtype)) * scale


def _attend(q: Tensor, k: Tensor, v: Tensor, visible: Tensor, scale: float) -> tuple[Tensor, Tensor]:
    """Masked softmax attention; rows that see nothing give 0 and a log-sum-exp of -inf. `visible` -> `[B,T,K,R,S]`."""
    # One more key, which nobody sees, spares a case for no keys at all.
    k, v = (torch.nn.functional.pad(x, (0, 0, 0, 0, 0, 1)) for x in (k, v))
    visible = torch.nn.functional.pad(visible, (0, 1), value=False)
    scores = _scores(q, k, scale)
    visible = visible.expand_as(scores)
    some = visible.any(dim=-1)
    # A row without keys scores its first column 0 instead, so that no NaN enters the graph; its result is masked out.
    scores = torch.where(visible, scores, torch.where(some.unsqueeze(-1), -torch.inf, 0.0))
    lse = scores.logsumexp(dim=-1)
    p = torch.exp(scores - lse.unsqueeze(-1)) * some.unsqueeze(-1)
    out = torch.einsum("btkrs,bskd->btkrd", p, v.to(p.dtype))
    return out.flatten(2, 3).to(q.dtype), lse.masked_fill(~some, -torch.inf).flatten(2, 3)


def _documents(cu_seqlens: Tensor | None, total: int) -> list[tuple[int, int]]:
    if cu_seqlens is None:
        return [(0, total)]
    bounds = cu_seqlens.tolist()
    return list(pairwise(bounds))


def _per_document(
    run: Callable[..., tuple[Tensor, ...]],
    compressed: BlockGeometry | None,
    cu_seqlens: Tensor | None,
    query_side: tuple[Tensor, ...],
    key_side: tuple[Tensor, ...],
) -> tuple[Tensor, ...]:
    """Run each packed document alone; with `compressed` the key side holds that geometry's compressed tokens."""
    if cu_seqlens is None:
        return run(*query_side, *key_side)
    results, first = [], 0
    for start, end in _documents(cu_seqlens, query_side[0].shape[1]):
        count = compressed.num_compressed(end - start) if compressed else end - start
        keys = [x[:, first : first + count] for x in key_side]
        results.append(run(*(x[:, start:end] for x in query_side), *keys))
        first += count
    return tuple(torch.cat(parts, dim=1) for parts in zip(*results, strict=True))
