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

import torch
from torch import Tensor

from nsa.geometry import BlockGeometry
from nsa.ops import stages
from nsa.ops.cache_view import CacheView
from nsa.ops.call import AttentionInputs, Call, DecodeAux, NSAAux
from nsa.ops.routing import choose_backend
from nsa.ops.validate import (
    check_compressed,
    check_cu_seqlens,
    check_floating,
    check_keys,
    check_length,
    check_tensor,
    count_compressed,
)


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
    inputs = AttentionInputs(q, k, v, k_cmp, v_cmp, k_win, v_win, gates)
    _check_branches(inputs)
    call, backend = _resolve(q, v, geometry, cu_seqlens, scale, backend)
    check_compressed(k_cmp, q.shape[1], geometry, cu_seqlens)
    for name, x in (("k", k), ("k_win", k_win)):
        check_length(name, x, q.shape[1], "one for each query")
    out, aux = stages.attention(inputs, call, backend)
    return (out, NSAAux(*(x.detach() for x in aux))) if return_aux else out


def _check_branches(inputs: AttentionInputs) -> None:
    """Each branch's keys and values, and that the branches fit one another and the gates."""
    q, k, v, k_cmp, v_cmp, k_win, v_win, gates = inputs
    check_keys(q, k, v)
    check_keys(q, k_cmp, v_cmp, ("k_cmp", "v_cmp"))
    check_keys(q, k_win, v_win, ("k_win", "v_win"))
    check_tensor("gates", gates, "B T H 3")
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
    check_tensor("x", x, "B T Hkv D")
    check_floating(x=x)
    check_cu_seqlens(cu_seqlens, x, "x")
    if cu_seqlens is None:
        count = geometry.num_compressed(x.shape[1])
        if num_compressed not in (None, count):
            raise ValueError(f"num_compressed must be {count} for {x.shape[1]} tokens, not {num_compressed}")
    else:
        count = count_compressed(cu_seqlens, geometry) if num_compressed is None else num_compressed
    return stages.mean_pool(x, geometry, cu_seqlens, count, choose_backend(backend, x))


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
    check_keys(q, k_cmp, v_cmp, ("k_cmp", "v_cmp"))
    call, backend = _resolve(q, v_cmp, geometry, cu_seqlens, scale, backend, q_start)
    check_compressed(k_cmp, q_start + q.shape[1], geometry, cu_seqlens)
    return stages.compressed_attention(q, k_cmp, v_cmp, call, backend)


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
    check_keys(q, k_cmp, k_cmp, ("k_cmp", "k_cmp"))
    call, backend = _resolve(q, k_cmp, geometry, cu_seqlens, scale, backend, q_start)
    check_compressed(k_cmp, q_start + q.shape[1], geometry, cu_seqlens)
    if lse.shape != q.shape[:3]:
        raise ValueError(f"lse must be {list(q.shape[:3])} (B, T, H), not {list(lse.shape)}")
    return stages.select_blocks(q, k_cmp, lse, call, backend)


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
    check_keys(q, k, v)
    call, backend = _resolve(q, v, geometry, cu_seqlens, scale, backend, q_start)
    check_length("k", k, q_start + q.shape[1], "one for each position up to the last query's")
    check_tensor("block_indices", block_indices, "B T Hkv n")
    expected = (*q.shape[:2], k.shape[2], geometry.num_selected_blocks)
    if block_indices.shape != expected or block_indices.dtype != torch.int32:
        raise ValueError(
            f"block_indices must be int32 {list(expected)}, not {block_indices.dtype} {list(block_indices.shape)}"
        )
    return stages.selected_attention(q, k, v, block_indices, call, backend)


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
    check_keys(q, k, v)
    call, backend = _resolve(q, v, geometry, cu_seqlens, scale, backend, q_start, k_start)
    check_length("k", k, q_start + q.shape[1] - k_start, "positions k_start to the last query's")
    if not 0 <= k_start <= max(0, q_start - geometry.window_size + 1):
        raise ValueError(
            f"keys from position {k_start} miss part of the first query's window: position {q_start} sees "
            f"{max(0, q_start - geometry.window_size + 1)}..{q_start}"
        )
    return stages.window_attention(q, k, v, call, backend)


def _resolve(
    q: Tensor,
    v: Tensor,
    geometry: BlockGeometry,
    cu_seqlens: Tensor | None,
    scale: float | None,
    backend: str,
    q_start: int = 0,
    k_start: int = 0,
) -> tuple[Call, str]:
    """The call and its backend, after the checks that all stages share."""
    check_cu_seqlens(cu_seqlens, q)
    if q_start < 0 or (q_start and cu_seqlens is not None):
        raise ValueError(f"q_start {q_start} must be 0 for packed input and never negative")
    factor = q.shape[-1] ** -0.5 if scale is None else float(scale)
    return Call(geometry, factor, cu_seqlens, q_start, k_start), choose_backend(backend, q, v)


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
    check_keys(q, cache_view.k, cache_view.v)
    check_keys(q, cache_view.k_cmp, cache_view.v_cmp, ("k_cmp", "v_cmp"))
    check_keys(q, cache_view.k_win, cache_view.v_win, ("k_win", "v_win"))
    if gates.shape != (*q.shape[:3], 3):
        raise ValueError(f"gates must be {[*q.shape[:3], 3]} (B, T, H, branches), not {list(gates.shape)}")
    if len(cache_view.lengths) != q.shape[0] or max(cache_view.num_new) > q.shape[1]:
        raise ValueError(
            f"the cache view is of {len(cache_view.lengths)} rows with {list(cache_view.num_new)} new tokens, but q is "
            f"{list(q.shape)}; pass the view that the append of these tokens returned"
        )
    if backend == "auto" and stages.is_step(cache_view, q.shape[1]):
        backend = "torch"
    call, backend = _resolve(q, cache_view.v, geometry, None, scale, backend)
    out, block_indices = stages.decode(q, cache_view, gates, call, backend)
    return (out, DecodeAux(block_indices)) if return_aux else out
