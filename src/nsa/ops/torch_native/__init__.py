"""The `torch` backend: the stages in plain PyTorch with memory linear in T, on any device, tuned for the CPU.

Each function here is one operator of `nsa.ops.registry`. It takes the operator's arguments and hands the work to a
kernel that knows batches only; packed input is cut into batches of documents of similar length first
(`documents.by_document`). Reading order: `tiles` (the one attention loop) with `products`, `masks` (what the branches
see), `selected` and `blockwise` (its two routes), `select`, `pool`, `decode` and `paged`, then `documents`.

Legend: B batch, T queries, S keys, H query heads, K key/value groups, R = H/K heads of a group, D head size.

    >>> import torch
    >>> from nsa import BlockGeometry, mean_pool
    >>> mean_pool(torch.randn(1, 100, 2, 32), BlockGeometry(), backend="torch").shape
    torch.Size([1, 5, 2, 32])
"""

from __future__ import annotations

from collections.abc import Sequence
from functools import partial

from torch import Tensor

from nsa.geometry import BlockGeometry
from nsa.ops.torch_native import pool, select, selected, tiles
from nsa.ops.torch_native.documents import Side, by_document
from nsa.ops.torch_native.masks import CompressedMask, WindowMask
from nsa.ops.torch_native.paged import paged_decode_forward as paged_decode_forward

TOKENS, COMPRESSED = Side.TOKENS, Side.COMPRESSED


def mean_pool_forward(x: Tensor, cu_seqlens: Tensor | None, geometry: Sequence[int], num_compressed: int) -> Tensor:
    shape = BlockGeometry(*geometry)

    def kernel(x: Tensor) -> tuple[Tensor]:
        return (pool.forward(x, shape),)

    return by_document(kernel, cu_seqlens, shape, [(x, TOKENS)], [(num_compressed, COMPRESSED)])[0]


def mean_pool_backward(dout: Tensor, cu_seqlens: Tensor | None, geometry: Sequence[int], length: int) -> Tensor:
    shape = BlockGeometry(*geometry)

    def kernel(dout: Tensor, width: int) -> tuple[Tensor]:
        return (pool.backward(dout, shape, width),)

    return by_document(kernel, cu_seqlens, shape, [(dout, COMPRESSED)], [(length, TOKENS)], give_width=True)[0]


def compressed_attention_forward(
    q: Tensor, k: Tensor, v: Tensor, cu_seqlens: Tensor | None, geometry: Sequence[int], q_start: int, scale: float
) -> tuple[Tensor, Tensor]:
    shape = BlockGeometry(*geometry)

    kernel = partial(tiles.forward, mask=CompressedMask(shape), q_start=q_start, scale=scale)
    total = q.shape[1]
    inputs = [(q, TOKENS), (k, COMPRESSED), (v, COMPRESSED)]
    return by_document(kernel, cu_seqlens, shape, inputs, [(total, TOKENS)] * 2)


def compressed_attention_backward(
    dout: Tensor,
    dlse: Tensor | None,
    q: Tensor,
    k: Tensor,
    v: Tensor,
    out: Tensor,
    lse: Tensor,
    cu_seqlens: Tensor | None,
    geometry: Sequence[int],
    q_start: int,
    scale: float,
) -> tuple[Tensor, Tensor, Tensor]:
    shape = BlockGeometry(*geometry)

    kernel = partial(tiles.backward, mask=CompressedMask(shape), q_start=q_start, scale=scale)
    sides = (TOKENS, TOKENS, TOKENS, COMPRESSED, COMPRESSED, TOKENS, TOKENS)
    inputs = list(zip((dout, dlse, q, k, v, out, lse), sides, strict=True))
    outputs = [(q.shape[1], TOKENS), (k.shape[1], COMPRESSED), (v.shape[1], COMPRESSED)]
    return by_document(kernel, cu_seqlens, shape, inputs, outputs)


def select_blocks_forward(
    q: Tensor,
    k_cmp: Tensor,
    lse: Tensor,
    cu_seqlens: Tensor | None,
    geometry: Sequence[int],
    q_start: int,
    scale: float,
) -> Tensor:
    shape = BlockGeometry(*geometry)

    def kernel(q: Tensor, k_cmp: Tensor, lse: Tensor) -> tuple[Tensor]:
        return (select.forward(q, k_cmp, lse, shape, q_start, scale),)

    inputs = [(q, TOKENS), (k_cmp, COMPRESSED), (lse, TOKENS)]
    return by_document(kernel, cu_seqlens, shape, inputs, [(q.shape[1], TOKENS)])[0]


def selected_attention_forward(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    block_indices: Tensor,
    cu_seqlens: Tensor | None,
    geometry: Sequence[int],
    q_start: int,
    scale: float,
) -> tuple[Tensor, Tensor]:
    shape = BlockGeometry(*geometry)

    kernel = partial(selected.forward, geometry=shape, q_start=q_start, scale=scale)
    inputs = [(x, TOKENS) for x in (q, k, v, block_indices)]
    return by_document(kernel, cu_seqlens, shape, inputs, [(q.shape[1], TOKENS)] * 2)


def selected_attention_backward(
    dout: Tensor,
    dlse: Tensor | None,
    q: Tensor,
    k: Tensor,
    v: Tensor,
    out: Tensor,
    lse: Tensor,
    block_indices: Tensor,
    cu_seqlens: Tensor | None,
    geometry: Sequence[int],
    q_start: int,
    scale: float,
) -> tuple[Tensor, Tensor, Tensor]:
    shape = BlockGeometry(*geometry)

    kernel = partial(selected.backward, geometry=shape, q_start=q_start, scale=scale)
    inputs = [(x, TOKENS) for x in (dout, dlse, q, k, v, out, lse, block_indices)]
    return by_document(kernel, cu_seqlens, shape, inputs, [(x.shape[1], TOKENS) for x in (q, k, v)])


def window_attention_forward(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    cu_seqlens: Tensor | None,
    geometry: Sequence[int],
    q_start: int,
    k_start: int,
    scale: float,
) -> tuple[Tensor, Tensor]:
    shape = BlockGeometry(*geometry)

    kernel = partial(tiles.forward, mask=WindowMask(shape, k_start), q_start=q_start, scale=scale)
    inputs = [(x, TOKENS) for x in (q, k, v)]
    return by_document(kernel, cu_seqlens, shape, inputs, [(q.shape[1], TOKENS)] * 2)


def window_attention_backward(
    dout: Tensor,
    dlse: Tensor | None,
    q: Tensor,
    k: Tensor,
    v: Tensor,
    out: Tensor,
    lse: Tensor,
    cu_seqlens: Tensor | None,
    geometry: Sequence[int],
    q_start: int,
    k_start: int,
    scale: float,
) -> tuple[Tensor, Tensor, Tensor]:
    shape = BlockGeometry(*geometry)

    kernel = partial(tiles.backward, mask=WindowMask(shape, k_start), q_start=q_start, scale=scale)
    inputs = [(x, TOKENS) for x in (dout, dlse, q, k, v, out, lse)]
    return by_document(kernel, cu_seqlens, shape, inputs, [(x.shape[1], TOKENS) for x in (q, k, v)])
