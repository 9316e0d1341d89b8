"""The operator on a chosen backend, whole and stage by stage: what `nsa.ops.api` does once it has checked its inputs.

Shapes are those of `nsa.ops.api`.
"""

from __future__ import annotations

from dataclasses import replace
from typing import cast

import torch
from torch import Tensor

from nsa.geometry import BlockGeometry
from nsa.ops import reference, registry
from nsa.ops.cache_view import CacheView
from nsa.ops.call import AttentionInputs, BranchResults, Call, NSAAux
from nsa.ops.routing import FUSED_BACKENDS, STEP_BACKENDS


def attention(inputs: AttentionInputs, call: Call, backend: str) -> tuple[Tensor, NSAAux]:
    """All branches and their gated sum, `[B, T, H, Dv]`: one operator where the backend has it, else stage by stage."""
    if backend in FUSED_BACKENDS:
        out, *results = torch.ops.nsa.attention(*inputs, *call.flatten(), backend)
        branches = BranchResults(*results)
        return out, NSAAux(branches.block_indices, branches.lse_cmp, branches.lse_slc, branches.lse_win)
    q, k, v, k_cmp, v_cmp, k_win, v_win, gates = inputs
    out_cmp, lse_cmp = compressed_attention(q, k_cmp, v_cmp, call, backend)
    block_indices = select_blocks(q, k_cmp, lse_cmp, call, backend)
    out_slc, lse_slc = selected_attention(q, k, v, block_indices, call, backend)
    out_win, lse_win = window_attention(q, k_win, v_win, call, backend)
    return combine(out_cmp, out_slc, out_win, gates), NSAAux(block_indices, lse_cmp, lse_slc, lse_win)


def combine(out_cmp: Tensor, out_slc: Tensor, out_win: Tensor, gates: Tensor) -> Tensor:
    """Gated sum of the branches, `[B,T,H,Dv]` x 3 and `[B,T,H,3]`; summed in the gates' precision or better."""
    g_cmp, g_slc, g_win = gates.unsqueeze(-2).unbind(-1)
    return (g_cmp * out_cmp + g_slc * out_slc + g_win * out_win).to(out_cmp.dtype)


def mean_pool(
    x: Tensor, geometry: BlockGeometry, cu_seqlens: Tensor | None, num_compressed: int, backend: str
) -> Tensor:
    if backend == "reference":
        return reference.mean_pool(x, geometry, cu_seqlens, num_compressed)
    return torch.ops.nsa.mean_pool(x, cu_seqlens, geometry.as_tuple(), num_compressed, backend)


def compressed_attention(q: Tensor, k_cmp: Tensor, v_cmp: Tensor, call: Call, backend: str) -> tuple[Tensor, Tensor]:
    if backend == "reference":
        tail = (call.geometry, call.cu_seqlens, call.q_start, call.scale)
        return reference.compressed_attention(q, k_cmp, v_cmp, *tail)
    return torch.ops.nsa.compressed_attention(q, k_cmp, v_cmp, *call.flatten(), backend)


def select_blocks(q: Tensor, k_cmp: Tensor, lse: Tensor, call: Call, backend: str) -> Tensor:
    q, k_cmp, lse = q.detach(), k_cmp.detach(), lse.detach()
    if backend == "reference":
        return reference.select_blocks(q, k_cmp, lse, call.geometry, call.cu_seqlens, call.q_start, call.scale)
    return torch.ops.nsa.select_blocks(q, k_cmp, lse, *call.flatten(), backend)


def selected_attention(
    q: Tensor, k: Tensor, v: Tensor, block_indices: Tensor, call: Call, backend: str
) -> tuple[Tensor, Tensor]:
    if backend == "reference":
        tail = (call.geometry, call.cu_seqlens, call.q_start, call.scale)
        return reference.selected_attention(q, k, v, block_indices, *tail)
    return torch.ops.nsa.selected_attention(q, k, v, block_indices, *call.flatten(), backend)


def window_attention(q: Tensor, k: Tensor, v: Tensor, call: Call, backend: str) -> tuple[Tensor, Tensor]:
    if backend == "reference":
        tail = (call.geometry, call.cu_seqlens, call.q_start, call.k_start, call.scale)
        return reference.window_attention(q, k, v, *tail)
    return torch.ops.nsa.window_attention(q, k, v, *call.flatten(), backend)


def decode(q: Tensor, view: CacheView, gates: Tensor, call: Call, backend: str) -> tuple[Tensor, Tensor]:
    """Outputs `[B, T, H, Dv]` and chosen blocks `[B, T, Hkv, n]` for the newest tokens of a cache."""
    if is_step(view, q.shape[1]) and backend in STEP_BACKENDS:
        module = cast(registry.StepBackend, registry.load_backend(backend))
        outs, block_indices = module.decode_step(q, view, call)
    else:
        outs, block_indices = _decode_chunk(q, view, call, backend)
    return combine(*outs, gates), block_indices


def is_step(view: CacheView, num_queries: int) -> bool:
    """Whether each row has one new token."""
    return num_queries == 1 and min(view.num_new) == 1


def _decode_chunk(q: Tensor, view: CacheView, call: Call, backend: str) -> tuple[tuple[Tensor, Tensor, Tensor], Tensor]:
    """Each set of rows that are alike goes through the stages at its own offset; padding queries stay zero."""
    geometry = call.geometry
    outs = [view.v.new_zeros(*q.shape[:3], view.v.shape[3]) for _ in range(3)]
    indices = torch.full((*q.shape[:2], view.k.shape[2], geometry.num_selected_blocks), -1, dtype=torch.int32)
    indices = indices.to(q.device)
    rows_by_shape: dict[tuple[int, int, int], list[int]] = {}
    for row, shape in enumerate(zip(view.lengths, view.num_new, view.win_start, strict=True)):
        rows_by_shape.setdefault(shape, []).append(row)
    for (length, new, win_start), rows in rows_by_shape.items():
        if new == 0:
            continue
        pick = slice(None) if len(rows) == q.shape[0] else rows
        q_start, count = length - new, geometry.num_compressed(length)
        k_start = max(win_start, max(0, q_start - geometry.window_size + 1))
        held = slice(k_start - win_start, length - win_start)
        here = replace(call, q_start=q_start, k_start=k_start)
        query, k_cmp = q[pick, :new], view.k_cmp[pick, :count]
        out_cmp, lse = compressed_attention(query, k_cmp, view.v_cmp[pick, :count], here, backend)
        chosen = select_blocks(query, k_cmp, lse, here, backend)
        keys, values = view.k[pick, :length], view.v[pick, :length]
        out_slc, _ = selected_attention(query, keys, values, chosen, here, backend)
        out_win, _ = window_attention(query, view.k_win[pick, held], view.v_win[pick, held], here, backend)
        for out, part in zip(outs, (out_cmp, out_slc, out_win), strict=True):
            out[pick, :new] = part
        indices[pick, :new] = chosen
    return (outs[0], outs[1], outs[2]), indices
