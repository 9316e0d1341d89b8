"""The `torch` backend: the stages in plain PyTorch with memory linear in T, on any device, tuned for the CPU.

The functions here are those of `nsa.ops.registry.StepBackend`. Most hand the work to a kernel that knows batches only;
packed input is cut into batches of documents of similar length first (`documents.by_document`). Reading order: `tiles`
(the one attention loop) with `products`, `masks` (what the branches see), `selected` and `blockwise` (its two routes),
`select`, `pool`, `decode` and `paged`, then `documents`.

Legend: B batch, T queries, S keys, H query heads, K key/value groups, R = H/K heads of a group, D head size.

    >>> import torch
    >>> from nsa import BlockGeometry, mean_pool
    >>> mean_pool(torch.randn(1, 100, 2, 32), BlockGeometry(), backend="torch").shape
    torch.Size([1, 5, 2, 32])
"""

from __future__ import annotations

from functools import partial

from torch import Tensor

from nsa.geometry import BlockGeometry
from nsa.ops.call import Call
from nsa.ops.torch_native import pool, select, selected, tiles
from nsa.ops.torch_native.decode import decode_step as decode_step
from nsa.ops.torch_native.documents import Side, by_document
from nsa.ops.torch_native.masks import CompressedMask, WindowMask
from nsa.ops.torch_native.paged import paged_decode_forward as paged_decode_forward

TOKENS, COMPRESSED = Side.TOKENS, Side.COMPRESSED


def mean_pool_forward(x: Tensor, cu_seqlens: Tensor | None, geometry: BlockGeometry, num_compressed: int) -> Tensor:
    def kernel(x: Tensor) -> tuple[Tensor]:
        return (pool.forward(x, geometry),)

    return by_document(kernel, cu_seqlens, geometry, [(x, TOKENS)], [(num_compressed, COMPRESSED)])[0]


def mean_pool_backward(dout: Tensor, cu_seqlens: Tensor | None, geometry: BlockGeometry, length: int) -> Tensor:
    def kernel(dout: Tensor, width: int) -> tuple[Tensor]:
        return (pool.backward(dout, geometry, width),)

    return by_document(kernel, cu_seqlens, geometry, [(dout, COMPRESSED)], [(length, TOKENS)], give_width=True)[0]


def compressed_attention_forward(q: Tensor, k: Tensor, v: Tensor, call: Call) -> tuple[Tensor, Tensor]:
    kernel = partial(tiles.forward, mask=CompressedMask(call.geometry), q_start=call.q_start, scale=call.scale)
    inputs = [(q, TOKENS), (k, COMPRESSED), (v, COMPRESSED)]
    return by_document(kernel, call.cu_seqlens, call.geometry, inputs, [(q.shape[1], TOKENS)] * 2)


def compressed_attention_backward(
    dout: Tensor, dlse: Tensor | None, q: Tensor, k: Tensor, v: Tensor, out: Tensor, lse: Tensor, call: Call
) -> tuple[Tensor, Tensor, Tensor]:
    kernel = partial(tiles.backward, mask=CompressedMask(call.geometry), q_start=call.q_start, scale=call.scale)
    sides = (TOKENS, TOKENS, TOKENS, COMPRESSED, COMPRESSED, TOKENS, TOKENS)
    inputs = list(zip((dout, dlse, q, k, v, out, lse), sides, strict=True))
    outputs = [(q.shape[1], TOKENS), (k.shape[1], COMPRESSED), (v.shape[1], COMPRESSED)]
    return by_document(kernel, call.cu_seqlens, call.geometry, inputs, outputs)


def select_blocks_forward(q: Tensor, k_cmp: Tensor, lse: Tensor, call: Call) -> Tensor:
    def kernel(q: Tensor, k_cmp: Tensor, lse: Tensor) -> tuple[Tensor]:
        return (select.forward(q, k_cmp, lse, call.geometry, call.q_start, call.scale),)

    inputs = [(q, TOKENS), (k_cmp, COMPRESSED), (lse, TOKENS)]
    return by_document(kernel, call.cu_seqlens, call.geometry, inputs, [(q.shape[1], TOKENS)])[0]


def selected_attention_forward(
    q: Tensor, k: Tensor, v: Tensor, block_indices: Tensor, call: Call
) -> tuple[Tensor, Tensor]:
    kernel = partial(selected.forward, geometry=call.geometry, q_start=call.q_start, scale=call.scale)
    inputs = [(x, TOKENS) for x in (q, k, v, block_indices)]
    return by_document(kernel, call.cu_seqlens, call.geometry, inputs, [(q.shape[1], TOKENS)] * 2)


def selected_attention_backward(
    dout: Tensor,
    dlse: Tensor | None,
    q: Tensor,
    k: Tensor,
    v: Tensor,
    out: Tensor,
    lse: Tensor,
    block_indices: Tensor,
    call: Call,
) -> tuple[Tensor, Tensor, Tensor]:
    kernel = partial(selected.backward, geometry=call.geometry, q_start=call.q_start, scale=call.scale)
    inputs = [(x, TOKENS) for x in (dout, dlse, q, k, v, out, lse, block_indices)]
    return by_document(kernel, call.cu_seqlens, call.geometry, inputs, [(x.shape[1], TOKENS) for x in (q, k, v)])


def window_attention_forward(q: Tensor, k: Tensor, v: Tensor, call: Call) -> tuple[Tensor, Tensor]:
    mask = WindowMask(call.geometry, call.k_start)
    kernel = partial(tiles.forward, mask=mask, q_start=call.q_start, scale=call.scale)
    inputs = [(x, TOKENS) for x in (q, k, v)]
    return by_document(kernel, call.cu_seqlens, call.geometry, inputs, [(q.shape[1], TOKENS)] * 2)


def window_attention_backward(
    dout: Tensor, dlse: Tensor | None, q: Tensor, k: Tensor, v: Tensor, out: Tensor, lse: Tensor, call: Call
) -> tuple[Tensor, Tensor, Tensor]:
    mask = WindowMask(call.geometry, call.k_start)
    kernel = partial(tiles.backward, mask=mask, q_start=call.q_start, scale=call.scale)
    inputs = [(x, TOKENS) for x in (dout, dlse, q, k, v, out, lse)]
    return by_document(kernel, call.cu_seqlens, call.geometry, inputs, [(x.shape[1], TOKENS) for x in (q, k, v)])
