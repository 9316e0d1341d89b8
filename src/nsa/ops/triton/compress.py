"""Mean compression: the mean of each complete block of l tokens, every d tokens, and its gradient.

Shapes: x `[B, T, Hkv, D]`, out `[B, N, Hkv, D]`; C = Hkv * D columns. The backward pass gathers: each token belongs to
at most l/d blocks, so no two programs write one element.
"""

# Kernels are typed by Triton, not by Python.
# pyright: reportArgumentType=false, reportCallIssue=false, reportAttributeAccessIssue=false, reportReturnType=false
# pyright: reportGeneralTypeIssues=false, reportPossiblyUnboundVariable=false
from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

from nsa.geometry import BlockGeometry
from nsa.ops.triton.layout import Layout, document_pointers

BLOCK_ROWS, BLOCK_COLUMNS = 16, 128


@triton.jit(do_not_specialize=["T", "N"])
def mean_pool_kernel(
    x_ptr, out_ptr, cmp_token_ptr, T, N, C,
    SIZE: tl.constexpr, STRIDE: tl.constexpr, PACKED: tl.constexpr, ROWS: tl.constexpr, COLUMNS: tl.constexpr,
):  # fmt: skip
    """Means of ROWS compressed tokens, COLUMNS of the C columns of each; zeros for those past their document's end."""
    i = tl.program_id(0) * ROWS + tl.arange(0, ROWS)
    column = tl.program_id(1) * COLUMNS + tl.arange(0, COLUMNS)
    b = tl.program_id(2).to(tl.int64)
    if PACKED:  # rows of no block lie at SENTINEL, beyond T
        token = tl.load(cmp_token_ptr + i, mask=i < N, other=T)
    else:
        token = i * STRIDE
    live = ((i < N) & (token + SIZE <= T))[:, None] & (column < C)[None, :]
    total = tl.zeros([ROWS, COLUMNS], tl.float32)
    source = x_ptr + (b * T + token)[:, None] * C + column[None, :]
    # In fp32, token after token: one order of the sum, whatever the tile.
    for offset in range(SIZE):
        total += tl.load(source + offset * C, mask=live, other=0.0).to(tl.float32)
    out = out_ptr + (b * N + i)[:, None] * C + column[None, :]
    tl.store(out, (total / SIZE).to(out_ptr.dtype.element_ty), mask=(i < N)[:, None] & (column < C)[None, :])


@triton.jit(do_not_specialize=["T", "N", "num_visible"])
def mean_pool_backward_kernel(
    dout_ptr, dx_ptr, doc_ptr, doc_end_ptr, cmp_start_ptr, T, N, num_visible, C,
    SIZE: tl.constexpr, STRIDE: tl.constexpr, PACKED: tl.constexpr, ROWS: tl.constexpr, COLUMNS: tl.constexpr,
):  # fmt: skip
    """Gradients of ROWS tokens: for each the sum over the SIZE / STRIDE blocks that may hold it, over SIZE."""
    t = tl.program_id(0) * ROWS + tl.arange(0, ROWS)
    column = tl.program_id(1) * COLUMNS + tl.arange(0, COLUMNS)
    b = tl.program_id(2).to(tl.int64)
    # A token's document: position in it, its first compressed token, and how many complete blocks it has.
    position, base, count = t, t * 0, t * 0 + num_visible
    if PACKED:
        start = tl.load(doc_ptr + t, mask=t < T, other=T)
        length = tl.load(doc_end_ptr + t, mask=t < T, other=0) - start
        position = t - start
        base = tl.load(cmp_start_ptr + t, mask=t < T, other=0)
        count = tl.where(length >= SIZE, (length - SIZE) // STRIDE + 1, 0)
    total = tl.zeros([ROWS, COLUMNS], tl.float32)
    # The last block that begins at or before the token, then those before it.
    for back in range(SIZE // STRIDE):
        i = position // STRIDE - back
        live = (t < T) & (position >= 0) & (i >= 0) & (i < count) & (base + i < N)
        source = dout_ptr + (b * N + base + i)[:, None] * C + column[None, :]
        total += tl.load(source, mask=live[:, None] & (column < C)[None, :], other=0.0).to(tl.float32)
    dx = dx_ptr + (b * T + t)[:, None] * C + column[None, :]
    tl.store(dx, (total / SIZE).to(dx_ptr.dtype.element_ty), mask=(t < T)[:, None] & (column < C)[None, :])


def mean_pool(x: Tensor, geometry: BlockGeometry, layout: Layout | None, num_compressed: int) -> Tensor:
    """`[B,T,Hkv,D] -> [B,N,Hkv,D]`; rows of no block are zero."""
    x = x.contiguous()
    out = x.new_empty(x.shape[0], num_compressed, *x.shape[2:])
    if out.numel():
        columns = x.shape[2] * x.shape[3]
        grid = (triton.cdiv(num_compressed, BLOCK_ROWS), triton.cdiv(columns, BLOCK_COLUMNS), x.shape[0])
        mean_pool_kernel[grid](
            x, out, *document_pointers(layout, x, "cmp_token"), x.shape[1], num_compressed, columns,
            SIZE=geometry.compress_block_size, STRIDE=geometry.compress_stride, PACKED=layout is not None,
            ROWS=BLOCK_ROWS, COLUMNS=BLOCK_COLUMNS,
        )  # fmt: skip
    return out


def mean_pool_backward(dout: Tensor, geometry: BlockGeometry, layout: Layout | None, length: int) -> Tensor:
    """Gradient of `mean_pool`, `[B,N,Hkv,D] -> [B,T,Hkv,D]`."""
    dout = dout.contiguous()
    dx = torch.empty(dout.shape[0], length, *dout.shape[2:], dtype=dout.dtype, device=dout.device)
    if dx.numel():
        columns = dout.shape[2] * dout.shape[3]
        grid = (triton.cdiv(length, BLOCK_ROWS), triton.cdiv(columns, BLOCK_COLUMNS), dout.shape[0])
        documents = document_pointers(layout, dout, "doc_start", "doc_end", "cmp_start")
        mean_pool_backward_kernel[grid](
            dout, dx, *documents, length, dout.shape[1], geometry.num_compressed(length), columns,
            SIZE=geometry.compress_block_size, STRIDE=geometry.compress_stride, PACKED=layout is not None,
            ROWS=BLOCK_ROWS, COLUMNS=BLOCK_COLUMNS,
        )  # fmt: skip
    return dx
