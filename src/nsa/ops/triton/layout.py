"""What all kernels share: which keys a query sees, and where packed documents begin.

Every query sees an interval of keys in the compressed and window branches, and both ends of it never decrease with the
query, packed documents included. That is all that the dense kernels know about causality, documents and windows.

Legend: T queries, S keys, N compressed tokens, G query heads of a group; row = token * G + head of the group, so that
one tile of the tensor cores holds all heads of several tokens.

    >>> pytest tests/ops/test_triton_interpreter.py    # runs every kernel on the CPU
"""

# Kernels are typed by Triton, not by Python.
# pyright: reportArgumentType=false, reportCallIssue=false, reportAttributeAccessIssue=false, reportReturnType=false
# pyright: reportGeneralTypeIssues=false, reportPossiblyUnboundVariable=false
from __future__ import annotations

from typing import NamedTuple

import torch
import triton
import triton.language as tl
from torch import Tensor

from nsa.geometry import BlockGeometry

SENTINEL = 2**30  # start of "no document": beyond every token


class Layout(NamedTuple):
    """Packed documents, spread out to one entry for each token and each compressed token, all int32.

    Attributes:
        cu_seqlens: `[docs + 1]`, bounds of the documents.
        cu_compressed: `[docs + 1]`, bounds of their compressed tokens.
        doc_start, doc_end: `[T]`, the document of each token; SENTINEL and T where there is none.
        cmp_start: `[T]`, first compressed token of the document.
        block_base: `[T]`, number of the document's first selection block; no two documents share a number.
        cmp_token: `[N]`, first token of each compressed block; SENTINEL where there is none.
        cmp_doc_end: `[N]`, end of its document.
    """

    cu_seqlens: Tensor
    cu_compressed: Tensor
    doc_start: Tensor
    doc_end: Tensor
    cmp_start: Tensor
    block_base: Tensor
    cmp_token: Tensor
    cmp_doc_end: Tensor


def num_documents(layout: Layout | None) -> int:
    """Packed documents; 0 for input that is not packed."""
    return 0 if layout is None else layout.cu_seqlens.numel() - 1


def document_pointers(layout: Layout | None, unused: Tensor, *names: str) -> tuple[Tensor, ...]:
    """Tensors of a layout by name, for a kernel; without one `unused` in their place, which it does not read then."""
    return tuple(unused if layout is None else getattr(layout, name) for name in names)


def make_layout(cu_seqlens: Tensor | None, geometry: BlockGeometry, total: int, num_compressed: int) -> Layout | None:
    """Where the documents lie, worked out on the device; None for input that is not packed."""
    if cu_seqlens is None:
        return None
    cu_seqlens = cu_seqlens.contiguous()
    num_docs, size, stride = cu_seqlens.numel() - 1, geometry.compress_block_size, geometry.compress_stride
    cu_compressed = torch.empty_like(cu_seqlens)
    _compressed_bounds[(1,)](cu_seqlens, cu_compressed, num_docs, SIZE=size, STRIDE=stride, BLOCK=1024)
    tokens = torch.empty(4, max(total, 1), dtype=torch.int32, device=cu_seqlens.device)
    compressed = torch.empty(2, max(num_compressed, 1), dtype=torch.int32, device=cu_seqlens.device)
    steps = (num_docs + 1).bit_length()
    grid = (triton.cdiv(max(total, num_compressed, 1), 256),)
    _spread[grid](
        cu_seqlens, cu_compressed, tokens, compressed, num_docs, steps, total, num_compressed,
        STRIDE=stride, SELECT=geometry.select_block_size, SENTINEL=SENTINEL, BLOCK=256,
    )  # fmt: skip
    return Layout(cu_seqlens, cu_compressed, *tokens.unbind(0), *compressed.unbind(0))


@triton.jit(do_not_specialize=["num_docs"])
def _compressed_bounds(cu_ptr, out_ptr, num_docs, SIZE: tl.constexpr, STRIDE: tl.constexpr, BLOCK: tl.constexpr):
    """Bounds of the documents' compressed tokens: one program, a running sum over BLOCK documents at a time."""
    total = 0
    tl.store(out_ptr, total)
    for start in range(0, num_docs, BLOCK):
        doc = start + tl.arange(0, BLOCK)
        live = doc < num_docs
        length = tl.load(cu_ptr + doc + 1, mask=live, other=0) - tl.load(cu_ptr + doc, mask=live, other=0)
        count = tl.where(length >= SIZE, (length - SIZE) // STRIDE + 1, 0)
        tl.store(out_ptr + doc + 1, total + tl.cumsum(count, 0), mask=live)
        total += tl.sum(count, 0)


@triton.jit
def find_document(bounds_ptr, x, num_docs, steps):
    """The last i in 0..num_docs with bounds[i] <= x, for bounds that begin with 0."""
    # A fixed number of halvings, the same for all of x: bounds that are equal (empty documents) end at the last.
    low = x * 0
    high = low + num_docs + 1
    for _ in range(steps):
        middle = (low + high) // 2
        below = tl.load(bounds_ptr + middle) <= x
        low = tl.where(below, middle, low)
        high = tl.where(below, high, middle)
    return low


@triton.jit(do_not_specialize=["num_docs", "steps", "total", "num_compressed"])
def _spread(
    cu_ptr, cu_cmp_ptr, token_ptr, cmp_ptr, num_docs, steps, total, num_compressed,
    STRIDE: tl.constexpr, SELECT: tl.constexpr, SENTINEL: tl.constexpr, BLOCK: tl.constexpr,
):  # fmt: skip
    """Fields of `Layout` for BLOCK tokens (the rows of `token_ptr`), then for as many compressed tokens (`cmp_ptr`)."""
    x = tl.program_id(0) * BLOCK + tl.arange(0, BLOCK)
    doc = find_document(cu_ptr, x, num_docs, steps)
    live = doc < num_docs
    start = tl.load(cu_ptr + doc)
    end = tl.load(cu_ptr + doc + 1, mask=live, other=0)
    width = tl.maximum(total, 1)
    tl.store(token_ptr + x, tl.where(live, start, SENTINEL), mask=x < total)
    tl.store(token_ptr + width + x, tl.where(live, end, total), mask=x < total)
    tl.store(token_ptr + 2 * width + x, tl.load(cu_cmp_ptr + doc), mask=x < total)
    # A document of n tokens has n // SELECT + 1 blocks at most: one more for each document before keeps them apart.
    tl.store(token_ptr + 3 * width + x, start // SELECT + doc, mask=x < total)

    doc = find_document(cu_cmp_ptr, x, num_docs, steps)
    live = doc < num_docs
    first = tl.load(cu_ptr + doc) + (x - tl.load(cu_cmp_ptr + doc)) * STRIDE
    end = tl.load(cu_ptr + doc + 1, mask=live, other=0)
    tl.store(cmp_ptr + x, tl.where(live, first, SENTINEL), mask=x < num_compressed)
    width = tl.maximum(num_compressed, 1)
    tl.store(cmp_ptr + width + x, tl.where(live, end, total), mask=x < num_compressed)


@triton.jit
def place_of_tile(tile, cu_ptr, cu_cmp_ptr, T, num_docs, steps, TOKENS: tl.constexpr, PACKED: tl.constexpr):
    """First token of a tile, start and end of its document, and the document's first compressed token."""
    doc_start, doc_end, cmp_start = 0, T, 0
    first_token = tile * TOKENS
    if PACKED:
        # Tiles of a document are numbered from start // TOKENS + document: no two share a number.
        low, high = 0, num_docs
        for _ in range(steps):
            middle = (low + high) // 2
            below = (tl.load(cu_ptr + middle) // TOKENS + middle <= tile) & (middle < num_docs)
            low = tl.where(below, middle, low)
            high = tl.where(below, high, middle)
        doc_start = tl.load(cu_ptr + low)
        doc_end = tl.minimum(tl.load(cu_ptr + low + 1), T)
        cmp_start = tl.load(cu_cmp_ptr + low)
        first_token = doc_start + (tile - doc_start // TOKENS - low) * TOKENS
    return first_token, doc_start, doc_end, cmp_start


@triton.jit
def key_interval(
    t, doc_ptr, cmp_ptr, S, q_start, k_start,
    SIZE: tl.constexpr, STRIDE: tl.constexpr, WINDOW: tl.constexpr, PACKED: tl.constexpr,
):  # fmt: skip
    """Keys [first, end) that query t sees: of its window (WINDOW > 0), or complete compressed blocks (WINDOW == 0)."""
    doc = t * 0
    if PACKED:
        doc = tl.load(doc_ptr + t)
    # Neither reaches beyond the document: a window begins in it, and compressed blocks are counted from its start.
    if WINDOW > 0:
        end = t + q_start - k_start + 1
        first = tl.maximum(doc, t + q_start - WINDOW + 1) - k_start
        end = tl.maximum(first, end)
    else:
        first = t * 0
        if PACKED:
            first = tl.load(cmp_ptr + t)
        past = t + q_start - doc - (SIZE - 1)
        end = first + tl.where(past >= 0, past // STRIDE + 1, 0)
    return tl.minimum(first, S), tl.minimum(end, S)


@triton.jit
def query_interval(
    key, first_ptr, end_ptr, T, q_start, k_start,
    SIZE: tl.constexpr, STRIDE: tl.constexpr, WINDOW: tl.constexpr, PACKED: tl.constexpr,
):  # fmt: skip
    """Queries [first, end) that see a key: the inverse of `key_interval`."""
    if WINDOW > 0:
        first = key + k_start - q_start
        end = first + WINDOW
        if PACKED:
            end = tl.minimum(end, tl.load(end_ptr + key))
    else:
        first = key * STRIDE + SIZE - 1 - q_start  # the block's last token, the first query that sees it
        end = first * 0 + T
        if PACKED:
            first = tl.load(first_ptr + key) + SIZE - 1
            end = tl.load(end_ptr + key)
    return tl.minimum(tl.maximum(first, 0), T), tl.minimum(tl.maximum(end, 0), T)


@triton.jit
def local_start(position, doc, BLOCK: tl.constexpr, LOCAL: tl.constexpr):
    """First key of the local blocks of a query of a document that begins at `doc`."""
    return tl.maximum(doc, doc + ((position - doc) // BLOCK - (LOCAL - 1)) * BLOCK)


@triton.jit
def num_early(position, doc, BLOCK: tl.constexpr, INIT: tl.constexpr, LOCAL: tl.constexpr):
    """Keys of its initial blocks before the local ones."""
    return tl.minimum(local_start(position, doc, BLOCK, LOCAL) - doc, INIT * BLOCK)
