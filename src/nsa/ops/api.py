"""The public door to the operator: validate, choose the backend, dispatch.

`nsa_attention` is the whole of Native Sparse Attention after the projections (arXiv 2502.11089, Eq. 5); the stages it
consists of are public too, with the same conventions, so that each can be tested and timed alone.

Legend: B batch, T tokens, N compressed tokens, H query heads, Hkv key/value heads, n blocks chosen for each query.
Packed input has B = 1, documents one after another, and their bounds in `cu_seqlens` int32 [documents + 1]; positions
and block grids restart at each document. Queries of a prefill chunk begin at position `q_start`, keys at 0.
Every function raises `ValueError`, with the numbers, for shapes, dtypes, devices or a backend that do not fit.

    >>> import torch
    >>> from nsa import BlockGeometry, mean_pool, nsa_attention
    >>> geometry = BlockGeometry(8, 4, 16, 4, window_size=32)
    >>> q, k, v = torch.randn(1, 100, 8, 32), torch.randn(1, 100, 2, 32), torch.randn(1, 100, 2, 32)
    >>> gates = torch.full((1, 100, 8, 3), 1 / 3)
    >>> nsa_attention(q, k, v, mean_pool(k, geometry), mean_pool(v, geometry), gates, geometry).shape
    torch.Size([1, 100, 8, 32])
"""

from __future__ import annotations

from typing import NamedTuple

import torch
from torch import Tensor

from nsa.geometry import BlockGeometry
from nsa.ops import reference, registry, validate as check  # noqa: F401  (registry defines torch.ops.nsa)
from nsa.ops.cache_view import CacheView
from nsa.ops.routing import choose_backend
from nsa.ops.torch_native.decode import decode_step


class NSAAux(NamedTuple):
    """What `nsa_attention(..., return_aux=True)` adds: the choice of blocks and each branch's log-sum-exp.

    Attributes:
        block_indices: int32 `[B, T, Hkv, n]`, ascending, padded with -1.
        lse_cmp, lse_slc, lse_win: natural log-sum-exps `[B, T, H]`, fp32; -inf where a query sees no key.
    """

    block_indices: Tensor
    lse_cmp: Tensor
    lse_slc: Tensor
    lse_win: Tensor


def nsa_attention(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    k_cmp: Tensor,
    v_cmp: Tensor,
    gates: Tensor,
    geometry: BlockGeometry,
    *,
    k_win: Tensor | None = None,
    v_win: Tensor | None = None,
    cu_seqlens: Tensor | None = None,
    scale: float | None = None,
    backend: str = "auto",
    return_aux: bool = False,
) -> Tensor | tuple[Tensor, NSAAux]:
    """Compressed, selected and sliding-window attention, combined by gates (Eq. 5).

    Args:
        q: queries `[B, T, H, Dk]`, rotated.
        k, v: keys `[B, T, Hkv, Dk]` and values `[B, T, Hkv, Dv]` of the selected branch.
        k_cmp, v_cmp: compressed keys and values `[B, N, Hkv, Dk]`, `[B, N, Hkv, Dv]`, for example by `mean_pool`.
        gates: `[B, T, H, 3]` in the order compressed, selected, window; used as given.
        geometry: block sizes and counts.
        k_win, v_win: keys and values of the window branch; `k` and `v` unless given.
        cu_seqlens: document bounds of packed input.
        scale: factor on q.k; 1/sqrt(Dk) unless given.
        backend: "auto", "reference", "torch" or "triton". A backend asked for by name never falls back.
        return_aux: also return the chosen blocks and log-sum-exps.

    Returns:
        `[B, T, H, Dv]`, or that and an `NSAAux`.

    Raises:
        ValueError: shapes, dtypes, devices, head counts, `cu_seqlens` or the backend do not fit.
    """
    k_win, v_win = k if k_win is None else k_win, v if v_win is None else v_win
    _check_branches(q, k, v, k_cmp, v_cmp, k_win, v_win, gates)
    if not return_aux and choose_backend(backend, q, v) == "triton":
        scale, backend = _resolve(q, v, cu_seqlens, 0, scale, backend)
        check.check_compressed(k_cmp, q.shape[1], geometry, cu_seqlens)
        for name, x in (("k", k), ("k_win", k_win)):
            check.check_length(name, x, q.shape[1], "one for each query")
        tensors = (q, k, v, k_cmp, v_cmp, k_win, v_win, gates)
        return torch.ops.nsa.attention(*tensors, cu_seqlens, geometry.as_tuple(), scale, backend)[0]
    options = {"cu_seqlens": cu_seqlens, "scale": scale, "backend": backend}
    out_cmp, lse_cmp = compressed_attention(q, k_cmp, v_cmp, geometry, **options)
    block_indices = select_blocks(q, k_cmp, lse_cmp, geometry, **options)
    out_slc, lse_slc = selected_attention(q, k, v, block_indices, geometry, **options)
    out_win, lse_win = window_attention(q, k_win, v_win, geometry, **options)
    out = combine(out_cmp, out_slc, out_win, gates)
    return (out, NSAAux(block_indices, lse_cmp, lse_slc, lse_win)) if return_aux else out


def _check_branches(
    q: Tensor, k: Tensor, v: Tensor, k_cmp: Tensor, v_cmp: Tensor, k_win: Tensor, v_win: Tensor, gates: Tensor
) -> None:
    """Each branch's keys and values, and that the branches fit one another and the gates."""
    check.check_keys(q, k, v)
    check.check_keys(q, k_cmp, v_cmp, ("k_cmp", "v_cmp"))
    check.check_keys(q, k_win, v_win, ("k_win", "v_win"))
    check.check_tensor("gates", gates, "B T H 3")
    if gates.shape != (*q.shape[:3], 3):
        raise ValueError(f"gates must be {[*q.shape[:3], 3]} (B, T, H, branches), not {list(gates.shape)}")
    if gates.device != q.device:
        raise ValueError(f"gates is on {gates.device} but q is on {q.device}; move them to one device")
    if v_cmp.shape[-1] != v.shape[-1] or v_win.shape[-1] != v.shape[-1]:
        raise ValueError(
            f"the branches are summed, so v, v_cmp and v_win need one head size, not "
            f"{v.shape[-1]}, {v_cmp.shape[-1]} and {v_win.shape[-1]}"
        )
    if not k.shape[2] == k_cmp.shape[2] == k_win.shape[2]:
        raise ValueError(
            f"k, k_cmp and k_win need one number of key/value heads, not "
            f"{k.shape[2]}, {k_cmp.shape[2]} and {k_win.shape[2]}"
        )


def combine(out_cmp: Tensor, out_slc: Tensor, out_win: Tensor, gates: Tensor) -> Tensor:
    """Gated sum of the branches, `[B,T,H,Dv]` x 3 and `[B,T,H,3]`; summed in the gates' precision or better."""
    g_cmp, g_slc, g_win = gates.unsqueeze(-2).unbind(-1)
    return (g_cmp * out_cmp + g_slc * out_slc + g_win * out_win).to(out_cmp.dtype)


def mean_pool(
    x: Tensor,
    geometry: BlockGeometry,
    cu_seqlens: Tensor | None = None,
    *,
    num_compressed: int | None = None,
    backend: str = "auto",
) -> Tensor:
    """Mean of each complete compressed block, `[B, T, Hkv, D] -> [B, N, Hkv, D]` (section 3.3.1, mean operator).

    Packed documents' compressed tokens stand one after another. Their number depends on the contents of `cu_seqlens`;
    give `num_compressed` (at least that many, `geometry.max_num_compressed(T)` always is) to spare reading it on the
    host; the rows beyond are zero and no query sees them.
    """
    check.check_tensor("x", x, "B T Hkv D")
    check.check_floating(x=x)
    check.check_cu_seqlens(cu_seqlens, x, "x")
    if cu_seqlens is None:
        count = geometry.num_compressed(x.shape[1])
        if num_compressed not in (None, count):
            raise ValueError(f"num_compressed must be {count} for {x.shape[1]} tokens, not {num_compressed}")
    else:
        count = check.count_compressed(cu_seqlens, geometry) if num_compressed is None else num_compressed
    backend = choose_backend(backend, x)
    if backend == "reference":
        return reference.mean_pool(x, geometry, cu_seqlens, count)
    return torch.ops.nsa.mean_pool(x, cu_seqlens, geometry.as_tuple(), count, backend)


def compressed_attention(
    q: Tensor,
    k_cmp: Tensor,
    v_cmp: Tensor,
    geometry: BlockGeometry,
    *,
    cu_seqlens: Tensor | None = None,
    q_start: int = 0,
    scale: float | None = None,
    backend: str = "auto",
) -> tuple[Tensor, Tensor]:
    """Attention over the compressed tokens that a query sees: i d + l - 1 <= t (Eq. 7 with the blocks complete).

    Returns:
        out `[B, T, H, Dv]`, zero where nothing is visible, and the natural log-sum-exp `[B, T, H]`, there -inf.
    """
    check.check_keys(q, k_cmp, v_cmp, ("k_cmp", "v_cmp"))
    scale, backend = _resolve(q, v_cmp, cu_seqlens, q_start, scale, backend)
    check.check_compressed(k_cmp, q_start + q.shape[1], geometry, cu_seqlens)
    if backend == "reference":
        return reference.compressed_attention(q, k_cmp, v_cmp, geometry, cu_seqlens, q_start, scale)
    return torch.ops.nsa.compressed_attention(q, k_cmp, v_cmp, cu_seqlens, geometry.as_tuple(), q_start, scale, backend)


def select_blocks(
    q: Tensor,
    k_cmp: Tensor,
    lse: Tensor,
    geometry: BlockGeometry,
    *,
    cu_seqlens: Tensor | None = None,
    q_start: int = 0,
    scale: float | None = None,
    backend: str = "auto",
) -> Tensor:
    """The n blocks that each query and group attends to, from the compressed scores (Eq. 8-12).

    The forced blocks (initial, and local ones up to the query's own) count inside n; the rest are the most important,
    ties to the lower index. No gradient flows through the choice.

    Args:
        lse: log-sum-exp of the compressed branch, `[B, T, H]`, from `compressed_attention`.

    Returns:
        int32 `[B, T, Hkv, n]`, ascending block indices of the query's document, padded with -1.
    """
    check.check_keys(q, k_cmp, k_cmp, ("k_cmp", "k_cmp"))
    scale, backend = _resolve(q, k_cmp, cu_seqlens, q_start, scale, backend)
    check.check_compressed(k_cmp, q_start + q.shape[1], geometry, cu_seqlens)
    if lse.shape != q.shape[:3]:
        raise ValueError(f"lse must be {list(q.shape[:3])} (B, T, H), not {list(lse.shape)}")
    q, k_cmp, lse = q.detach(), k_cmp.detach(), lse.detach()
    if backend == "reference":
        return reference.select_blocks(q, k_cmp, lse, geometry, cu_seqlens, q_start, scale)
    return torch.ops.nsa.select_blocks(q, k_cmp, lse, cu_seqlens, geometry.as_tuple(), q_start, scale, backend)


def selected_attention(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    block_indices: Tensor,
    geometry: BlockGeometry,
    *,
    cu_seqlens: Tensor | None = None,
    q_start: int = 0,
    scale: float | None = None,
    backend: str = "auto",
) -> tuple[Tensor, Tensor]:
    """Attention over the keys of the chosen blocks at positions up to the query's own (section 3.3.2).

    Args:
        k, v: `[B, q_start + T, Hkv, D]`, positions 0 to the last query's.
        block_indices: int32 `[B, T, Hkv, n]` as `select_blocks` returns it: distinct blocks, ascending, -1 for none.

    Returns:
        out `[B, T, H, Dv]` and the natural log-sum-exp `[B, T, H]`.
    """
    check.check_keys(q, k, v)
    scale, backend = _resolve(q, v, cu_seqlens, q_start, scale, backend)
    check.check_length("k", k, q_start + q.shape[1], "one for each position up to the last query's")
    check.check_tensor("block_indices", block_indices, "B T Hkv n")
    expected = (*q.shape[:2], k.shape[2], geometry.num_selected_blocks)
    if block_indices.shape != expected or block_indices.dtype != torch.int32:
        raise ValueError(
            f"block_indices must be int32 {list(expected)}, not {block_indices.dtype} {list(block_indices.shape)}"
        )
    if backend == "reference":
        return reference.selected_attention(q, k, v, block_indices, geometry, cu_seqlens, q_start, scale)
    constants = (cu_seqlens, geometry.as_tuple(), q_start, scale, backend)
    return torch.ops.nsa.selected_attention(q, k, v, block_indices, *constants)


def window_attention(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    geometry: BlockGeometry,
    *,
    cu_seqlens: Tensor | None = None,
    q_start: int = 0,
    k_start: int = 0,
    scale: float | None = None,
    backend: str = "auto",
) -> tuple[Tensor, Tensor]:
    """Attention over the last w positions, the query's own included: max(0, t-w+1) .. t (section 3.3.3).

    Args:
        k, v: `[B, S, Hkv, D]` at positions k_start .. k_start+S-1, of which the last is the last query's; none that a
            query's window holds may be missing.

    Returns:
        out `[B, T, H, Dv]` and the natural log-sum-exp `[B, T, H]`.
    """
    check.check_keys(q, k, v)
    scale, backend = _resolve(q, v, cu_seqlens, q_start, scale, backend)
    check.check_length("k", k, q_start + q.shape[1] - k_start, "positions k_start to the last query's")
    if not 0 <= k_start <= max(0, q_start - geometry.window_size + 1):
        raise ValueError(
            f"keys from position {k_start} miss part of the first query's window: position {q_start} sees "
            f"{max(0, q_start - geometry.window_size + 1)}..{q_start}"
        )
    if backend == "reference":
        return reference.window_attention(q, k, v, geometry, cu_seqlens, q_start, k_start, scale)
    constants = (cu_seqlens, geometry.as_tuple(), q_start, k_start, scale, backend)
    return torch.ops.nsa.window_attention(q, k, v, *constants)


def _resolve(
    q: Tensor, v: Tensor, cu_seqlens: Tensor | None, q_start: int, scale: float | None, backend: str
) -> tuple[float, str]:
    """The scale and backend of a call, after the checks that all stages share."""
    check.check_cu_seqlens(cu_seqlens, q)
    if q_start < 0 or (q_start and cu_seqlens is not None):
        raise ValueError(f"q_start {q_start} must be 0 for packed input and never negative")
    return q.shape[-1] ** -0.5 if scale is None else float(scale), choose_backend(backend, q, v)


class DecodeAux(NamedTuple):
    """What `nsa_decode(..., return_aux=True)` adds: int32 `block_indices` `[B, T, Hkv, n]`, as in `NSAAux`."""

    block_indices: Tensor


def nsa_decode(
    q: Tensor,
    cache_view: CacheView,
    gates: Tensor,
    geometry: BlockGeometry,
    *,
    scale: float | None = None,
    backend: str = "auto",
    return_aux: bool = False,
) -> Tensor | tuple[Tensor, DecodeAux]:
    """The whole operator for the newest tokens of a cache: one token for each row, or a prefill chunk.

    Equals the last rows of `nsa_attention` over the full sequence.

    Args:
        q: `[B, T, H, Dk]`, rotated; query c of row b is at position lengths[b] - num_new[b] + c. Queries past
            num_new[b] are padding; their output is zero.
        cache_view: what `NSACache.append` returned for these tokens.
        gates: `[B, T, H, 3]`.
        backend: as in `nsa_attention`; "auto" takes "torch" for single tokens, on every device.

    Returns:
        `[B, T, H, Dv]`, or that and a `DecodeAux`.

    Raises:
        ValueError: shapes, dtypes, devices or the backend do not fit.
    """
    check.check_keys(q, cache_view.k, cache_view.v)
    check.check_keys(q, cache_view.k_cmp, cache_view.v_cmp, ("k_cmp", "v_cmp"))
    check.check_keys(q, cache_view.k_win, cache_view.v_win, ("k_win", "v_win"))
    if gates.shape != (*q.shape[:3], 3):
        raise ValueError(f"gates must be {[*q.shape[:3], 3]} (B, T, H, branches), not {list(gates.shape)}")
    if len(cache_view.lengths) != q.shape[0] or max(cache_view.num_new) > q.shape[1]:
        raise ValueError(
            f"the cache view is of {len(cache_view.lengths)} rows with {list(cache_view.num_new)} new tokens, but q is "
            f"{list(q.shape)}; pass the view that the append of these tokens returned"
        )
    is_step = q.shape[1] == 1 and min(cache_view.num_new) == 1
    scale, backend = _resolve(q, cache_view.v, None, 0, scale, "torch" if is_step and backend == "auto" else backend)
    if is_step and backend == "torch":
        outs, block_indices = decode_step(q, cache_view, geometry, scale)
    else:
        outs, block_indices = _decode_chunk(q, cache_view, geometry, scale, backend)
    out = combine(*outs, gates)
    return (out, DecodeAux(block_indices)) if return_aux else out


def _decode_chunk(
    q: Tensor, view: CacheView, geometry: BlockGeometry, scale: float, backend: str
) -> tuple[tuple[Tensor, Tensor, Tensor], Tensor]:
    """Each set of rows that are alike goes through the stages at its own offset; padding queries stay zero."""
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
        options = {"q_start": q_start, "scale": scale, "backend": backend}
        query, k_cmp = q[pick, :new], view.k_cmp[pick, :count]
        out_cmp, lse = compressed_attention(query, k_cmp, view.v_cmp[pick, :count], geometry, **options)
        chosen = select_blocks(query, k_cmp, lse, geometry, **options)
        keys, values = view.k[pick, :length], view.v[pick, :length]
        out_slc, _ = selected_attention(query, keys, values, chosen, geometry, **options)
        k_start = max(win_start, max(0, q_start - geometry.window_size + 1))
        held = slice(k_start - win_start, length - win_start)
        out_win, _ = window_attention(
            query, view.k_win[pick, held], view.v_win[pick, held], geometry, k_start=k_start, **options
        )
        for out, part in zip(outs, (out_cmp, out_slc, out_win), strict=True):
            out[pick, :new] = part
        indices[pick, :new] = chosen
    return (outs[0], outs[1], outs[2]), indices
