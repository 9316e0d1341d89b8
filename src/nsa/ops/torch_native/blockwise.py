"""Selected attention block by block: each block of keys against the queries that chose it.

The (query, slot) pairs of one group are sorted by block. A visit gathers the rows of a block's queries, multiplies
them with the block's keys, and merges the result into theirs by an online softmax; the backward pass recomputes the
probabilities from the log-sum-exp and adds the query gradients in place. No buffer is larger than a few copies of q.

Legend: one group of one batch row has T queries of R heads; a visit has m of them, with R m rows, and s <= l' keys.
A row T of zeros fills visits up to a few different sizes.
Scores are in base 2, as in `tiles`.
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import NamedTuple

import torch
from torch import Tensor

from nsa.geometry import BlockGeometry
from nsa.ops.torch_native.products import nn, nt, tn
from nsa.ops.torch_native.tiles import LN_2, LOG2_E, by_group, compute_dtype, key_gradient, keys_by_group, safe_lse

VISIT_ROWS, MAX_VISIT_ROWS = 256, 8192  # rows come in multiples of the first


class Visit(NamedTuple):
    """Key rows of one block, the queries (ascending) that chose it, and what its youngest queries may not see."""

    keys: slice
    queries: Tensor
    num_own: int
    hidden: Tensor


def visits(
    block_indices: Tensor, num_heads: int, geometry: BlockGeometry, q_start: int, num_keys: int
) -> Iterator[Visit]:
    """Each block with the queries of `block_indices` `[T, n]` that chose it, at most MAX_VISIT_ROWS rows at a time.

    Queries are filled up with the number T, which stands for a row of zeros.
    Queries inside the block come first among its queries; `hidden` `[num_own, s]` says which keys are after them.
    """
    length, num_slots = block_indices.shape
    size, num_blocks = geometry.select_block_size, geometry.num_select_blocks(num_keys)
    positions = torch.arange(q_start, q_start + length, device=block_indices.device)
    own = (positions // size).to(block_indices.dtype).unsqueeze(1)
    is_own = block_indices == own
    block = torch.where((block_indices >= 0) & (block_indices <= own), block_indices, num_blocks).flatten()
    counts = torch.bincount(block, minlength=num_blocks)[:num_blocks]
    own_counts = torch.bincount(block[is_own.flatten()], minlength=num_blocks).tolist()
    granule = max(1, VISIT_ROWS // num_heads)
    order, widths = padded_order(block, counts, num_slots, granule)
    step, begin = granule * (MAX_VISIT_ROWS // VISIT_ROWS), 0
    for index, (width, own_count) in enumerate(zip(widths, own_counts, strict=True)):
        keys = slice(index * size, min(num_keys, (index + 1) * size))
        key_positions = torch.arange(keys.start, keys.stop, device=order.device)
        for first in range(0, width, step):
            queries = order[begin + first : begin + min(width, first + step)]
            num_own = max(0, min(own_count - first, queries.numel()))
            yield Visit(keys, queries, num_own, key_positions > positions[queries[:num_own]].unsqueeze(1))
        begin += width


def padded_order(block: Tensor, counts: Tensor, num_slots: int, granule: int) -> tuple[Tensor, list[int]]:
    """The queries of each block in ascending order, filled up to a multiple of `granule` with the number T.

    oneDNN compiles a kernel for each new shape; few different numbers of rows keep that rare.
    """
    by_block = block.sort(stable=True)
    used = int(counts.sum())
    widths = (counts + granule - 1).div(granule, rounding_mode="floor") * granule
    shift = (widths - counts).cumsum(0) - (widths - counts)
    order = torch.full((int(widths.sum()),), block.numel() // num_slots, device=block.device)
    place = torch.arange(used, device=block.device) + shift[by_block.values[:used].long()]
    order[place] = by_block.indices[:used].div_(num_slots, rounding_mode="floor")
    return order, widths.tolist()


def query_rows(x: Tensor, factor: float | None = None) -> Tensor:
    """`[R, T, D] -> [T+1, R*D]`, contiguous, in at least fp32, times `factor`; the last row is zero."""
    rows = torch.empty(x.shape[1] + 1, x.shape[0], x.shape[2], dtype=compute_dtype(x), device=x.device)
    rows[:-1] = x.transpose(0, 1)
    rows[-1] = 0
    return (rows if factor is None else rows.mul_(factor)).flatten(1)


def forward(
    q: Tensor, k: Tensor, v: Tensor, block_indices: Tensor, geometry: BlockGeometry, q_start: int, scale: float
) -> tuple[Tensor, Tensor]:
    """Out `[B, T, H, Dv]` and natural log-sum-exp `[B, T, H]`."""
    num_groups = k.shape[2]
    out = q.new_empty(*q.shape[:3], v.shape[3])
    lse = q.new_empty(q.shape[:3], dtype=compute_dtype(q))
    q_view, out_view, lse_view = (by_group(x, num_groups) for x in (q, out, lse))
    keys, values = keys_by_group(k), keys_by_group(v)
    for b in range(q.shape[0]):
        for g in range(num_groups):
            rows = query_rows(q_view[b, g], scale * LOG2_E)
            num_heads = q_view.shape[2]
            stops = visits(block_indices[b, :, g], num_heads, geometry, q_start, k.shape[1])
            o, row_lse = _forward_group(rows, keys[b, g], values[b, g], num_heads, stops)
            out_view[b, g] = o[:-1].transpose(0, 1)
            lse_view[b, g] = row_lse[:-1].t()
    return out, lse


def _forward_group(q: Tensor, k: Tensor, v: Tensor, num_heads: int, stops: Iterator[Visit]) -> tuple[Tensor, Tensor]:
    """One group: q `[T+1, R*Dk]`, k `[S, Dk]`, v `[S, Dv]` -> `[T+1, R, Dv]` and `[T+1, R]`."""
    limits = torch.finfo(q.dtype)
    acc = q.new_zeros(q.shape[0], num_heads * v.shape[1])
    total = q.new_zeros(q.shape[0], num_heads)
    top = torch.full_like(total, limits.min)
    for keys, queries, num_own, hidden in stops:
        q_rows = q.index_select(0, queries).view(1, -1, k.shape[1])
        scores = nt(q_rows, k[None, keys]).view(-1, num_heads, k[keys].shape[0])
        scores[:num_own].masked_fill_(hidden.unsqueeze(1), -torch.inf)
        old_top = top.index_select(0, queries)
        new_top = torch.maximum(scores.amax(dim=-1), old_top)
        p = scores.sub_(new_top.unsqueeze(-1)).exp2_()
        keep = old_top.sub_(new_top).exp2_()
        total.index_copy_(0, queries, total.index_select(0, queries).mul_(keep).add_(p.sum(dim=-1)))
        top.index_copy_(0, queries, new_top)
        o = acc.index_select(0, queries).view(*keep.shape, -1).mul_(keep.unsqueeze(-1))
        o.add_(nn(p.flatten(0, 1).unsqueeze(0), v[None, keys]).view_as(o))
        acc.index_copy_(0, queries, o.flatten(1))
    out = acc.view(*total.shape, v.shape[1]).div_(total.clamp(min=limits.tiny).unsqueeze(-1))
    return out, total.log2_().add_(top).mul_(LN_2)


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
    num_groups = k.shape[2]
    dq = torch.empty_like(q, memory_format=torch.contiguous_format)
    q_view, dq_view, dout_view, out_view, lse_view = (by_group(x, num_groups) for x in (q, dq, dout, out, lse))
    dlse_view = None if dlse is None else by_group(dlse, num_groups)
    keys, values = keys_by_group(k), keys_by_group(v)
    dkeys, dvalues = torch.zeros_like(keys), torch.zeros_like(values)
    num_heads = q_view.shape[2]
    for b in range(q.shape[0]):
        for g in range(num_groups):
            rows, do = query_rows(q_view[b, g], scale * LOG2_E), query_rows(dout_view[b, g])
            delta = (do[:-1].unflatten(1, (num_heads, -1)) * out_view[b, g].transpose(0, 1)).sum(dim=-1)
            if dlse_view is not None:
                delta -= dlse_view[b, g].t()
            # The row of zeros has no keys.
            delta = torch.nn.functional.pad(delta, (0, 0, 0, 1))
            row_lse = torch.nn.functional.pad(safe_lse(lse_view[b, g].t()), (0, 0, 0, 1), value=torch.inf)
            stops = visits(block_indices[b, :, g], num_heads, geometry, q_start, k.shape[1])
            grads = (dkeys[b, g], dvalues[b, g])
            row_dq = _backward_group(rows, do, delta, row_lse, keys[b, g], values[b, g], grads, stops)
            dq_view[b, g] = row_dq[:-1].mul_(scale).unflatten(1, (num_heads, -1)).transpose(0, 1)
    # The rows of q carried scale * log2(e).
    return dq, key_gradient(dkeys.mul_(LN_2), k), key_gradient(dvalues, v)


def _backward_group(
    q: Tensor,
    do: Tensor,
    delta: Tensor,
    lse: Tensor,
    k: Tensor,
    v: Tensor,
    grads: tuple[Tensor, Tensor],
    stops: Iterator[Visit],
) -> Tensor:
    """One group, scores transposed: adds to `grads`, dk `[S, Dk]` and dv `[S, Dv]`; gives dq `[T+1, R*Dk]` unscaled."""
    dk, dv = grads
    dq = torch.zeros_like(q)
    for keys, queries, num_own, hidden in stops:
        q_rows = q.index_select(0, queries).view(1, -1, k.shape[1])
        do_rows = do.index_select(0, queries).view(1, -1, v.shape[1])
        scores = nt(k[None, keys], q_rows)
        own = scores[0].unflatten(1, (-1, delta.shape[1]))[:, :num_own]
        own.masked_fill_(hidden.t().unsqueeze(-1), -torch.inf)
        p = scores.sub_(lse.index_select(0, queries).view(1, 1, -1)).exp2_()
        dv[keys] += nn(p, do_rows)[0]
        ds = nt(v[None, keys], do_rows).sub_(delta.index_select(0, queries).view(1, 1, -1)).mul_(p)
        dk[keys] += nn(ds, q_rows)[0]
        dq.index_add_(0, queries, tn(ds, k[None, keys]).view(-1, q.shape[1]))
    return dq
