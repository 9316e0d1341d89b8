"""The operator for a step from a paged cache.

Nothing in its view is known to the host, so one CUDA graph serves every length: the step's launches follow from the
shapes, and each row's length is read on the device.

Shapes: B rows, Q queries of a step, P pages in the pool, M pages a row, Hkv groups, l' tokens a page, r = l'/d
compressed tokens of a page.
"""

from __future__ import annotations

import torch
from torch import Tensor

from nsa.geometry import BlockGeometry
from nsa.ops import registry as registry  # defines torch.ops.nsa
from nsa.ops.cache_view import PagedView
from nsa.ops.routing import choose_backend
from nsa.ops.validate import check_floating, check_tensor

MAX_QUERIES = 8


def paged_decode(
    q: Tensor,
    view: PagedView,
    gates: Tensor,
    geometry: BlockGeometry,
    *,
    scale: float | None = None,
    backend: str = "auto",
) -> tuple[Tensor, Tensor]:
    """The whole operator for the newest 1 to 8 tokens of each row (Eq. 5), each with a selection of its own.

    Equals the last rows of `nsa_attention` over the full sequence. Query c of row b is at position
    lengths[b] - Q + c; queries before position 0 are padding and their output is zero. Without gradients.

    Args:
        q: `[B, Q, H, Dk]`, rotated.
        view: the cache; entries past a row's length may be anything.
        gates: `[B, Q, H, 3]` in the order compressed, selected, window.
        geometry: block sizes and counts.
        scale: factor on q.k; 1/sqrt(Dk) unless given.
        backend: "auto", "torch" or "triton".

    Returns:
        The outputs `[B, Q, H, Dv]`, and the chosen blocks int32 `[B, Q, Hkv, n]`, ascending, -1 for none.

    Raises:
        ValueError: shapes, dtypes, devices or the backend do not fit; on the CPU also lengths or pages that the cache
            does not have. On other devices lengths are cut to what the block table holds, as nothing is read there.
    """
    _check_view(q, view, geometry)
    if gates.shape != (*q.shape[:3], 3) or gates.device != q.device:
        raise ValueError(f"gates must be {[*q.shape[:3], 3]} on {q.device}, not {list(gates.shape)} on {gates.device}")
    backend = choose_backend(backend, q, view.v)
    if backend == "reference":
        raise ValueError("a paged cache is decoded by backend 'torch' or 'triton'; 'reference' has no cache")
    scale = q.shape[-1] ** -0.5 if scale is None else float(scale)
    return torch.ops.nsa.paged_decode(q, gates, *view, geometry.as_tuple(), scale, backend)


def _check_view(q: Tensor, view: PagedView, geometry: BlockGeometry) -> None:
    """Layouts, sizes, dtypes and devices of a paged cache and the queries that read it."""
    check_tensor("q", q, "B Q H Dk")
    if not 1 <= q.shape[1] <= MAX_QUERIES:
        raise ValueError(f"a step has 1 to {MAX_QUERIES} queries, not {q.shape[1]}; use nsa_attention for a prefill")
    page, each = geometry.select_block_size, geometry.strides_per_select
    stores = {"k": (view.k, page), "v": (view.v, page), "k_cmp": (view.k_cmp, each), "v_cmp": (view.v_cmp, each)}
    for name, (x, tokens) in stores.items():
        check_tensor(name, x, "P Hkv tokens D")
        if x.shape[:3] != (*view.k.shape[:2], tokens):
            raise ValueError(f"{name} must be {[*view.k.shape[:2], tokens]} and a head size, not {list(x.shape)}")
    rings = {} if view.k_win is None or view.v_win is None else {"k_win": view.k_win, "v_win": view.v_win}
    if (view.k_win is None) != (view.v_win is None):
        raise ValueError("give both k_win and v_win, or neither where the window reads k and v")
    for name, x in rings.items():
        check_tensor(name, x, "B Hkv ring D")
        least = geometry.window_size + q.shape[1] - 1
        if x.shape[:2] != (q.shape[0], view.k.shape[1]) or x.shape[2] < least:
            raise ValueError(
                f"{name} must be {[q.shape[0], view.k.shape[1]]} and at least {least} tokens (window and queries), "
                f"not {list(x.shape)}"
            )
    check_floating(q=q, **{name: x for name, (x, _) in stores.items()}, **rings)
    for names, size in ((("k", "k_cmp", "k_win"), q.shape[3]), (("v", "v_cmp", "v_win"), view.v.shape[3])):
        for name in names:
            x = getattr(view, name)
            if x is not None and x.shape[3] != size:
                raise ValueError(f"{name} has head size {x.shape[3]}, expected {size}")
    if view.k.shape[1] == 0 or q.shape[2] % view.k.shape[1]:
        raise ValueError(f"the {q.shape[2]} query heads must be a multiple of the {view.k.shape[1]} key/value heads")
    _check_rows(q, view, page)


def _check_rows(q: Tensor, view: PagedView, page: int) -> None:
    """Block table and lengths: their layout everywhere, their contents where reading them waits for no device."""
    table, lengths = view.block_table, view.lengths
    if table.ndim != 2 or table.shape[0] != q.shape[0] or table.shape[1] == 0 or table.dtype != torch.int32:
        raise ValueError(f"block_table must be int32 [{q.shape[0]}, M >= 1], not {table.dtype} {list(table.shape)}")
    if lengths.shape != (q.shape[0],) or lengths.dtype != torch.int32:
        raise ValueError(f"lengths must be int32 [{q.shape[0]}], not {lengths.dtype} {list(lengths.shape)}")
    for name, x in (("block_table", table), ("lengths", lengths)):
        if x.device != q.device:
            raise ValueError(f"{name} is on {x.device} but q is on {q.device}; move them to one device")
    if q.device.type != "cpu" or torch.compiler.is_compiling():
        return
    capacity = table.shape[1] * page
    for row, length in enumerate(lengths.tolist()):
        if not 0 <= length <= capacity:
            raise ValueError(f"row {row} has length {length}; the {table.shape[1]} pages of a row hold 0..{capacity}")
        used = table[row, : -(-length // page)]
        if used.numel() and not 0 <= int(used.min()) <= int(used.max()) < view.k.shape[0]:
            raise ValueError(
                f"block_table row {row} names pages {used.tolist()}; the pool has 0..{view.k.shape[0] - 1}"
            )
