"""dK and dV of the compressed and the window branch on Hopper, in Gluon: loads beside products.

As in `backward.py`, a program holds keys and runs over the rows that see them. One warp loads by TMA, or four copy rows
where whole tokens do not fill a tile (BOXES); two groups of four warps hold 64 keys each. A product is issued before
the arithmetic that does not need it: dP under the exponentials, dV under dS.

Shapes, intervals and splits are those of `backward.py`; lse and delta come as rows, see `pack_rows`.
"""

# Kernels are typed by Triton, not by Python.
# pyright: reportArgumentType=false, reportCallIssue=false, reportAttributeAccessIssue=false, reportReturnType=false
# pyright: reportGeneralTypeIssues=false, reportPossiblyUnboundVariable=false
# pyright: reportAssignmentType=false, reportOperatorIssue=false
# Lists in kernels are added, not unpacked.
# ruff: noqa: RUF005
from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor
from triton.experimental import gluon
from triton.experimental.gluon import language as gl
from triton.experimental.gluon.language.nvidia.ampere import async_copy
from triton.experimental.gluon.language.nvidia.hopper import (
    fence_async_shared,
    mbarrier,
    tma,
    warpgroup_mma,
    warpgroup_mma_wait,
)
from triton.experimental.gluon.nvidia.hopper import TensorDescriptor

from nsa.geometry import BlockGeometry
from nsa.ops.triton.gpu import LOG2E
from nsa.ops.triton.layout import Layout, document_pointers, query_interval
from nsa.ops.triton.sm90 import copy_rows, describe_box, describe_parts, make_barriers

KEYS = gl.constexpr(64)  # keys of a group of four warps
NUM_ROWS, NUM_TAIL_ROWS = 64, 32  # rows of a step; with keys of 192, more would leave no registers
STAGES = gl.constexpr(3)  # steps in flight


@triton.jit(do_not_specialize=["T", "padded"])
def _pack_rows_kernel(
    lse_ptr, delta_ptr, out_ptr, T, padded, log2e, H: tl.constexpr, HKV: tl.constexpr, BLOCK: tl.constexpr
):
    G: tl.constexpr = H // HKV
    head = tl.program_id(1)
    row = tl.program_id(0) * BLOCK + tl.arange(0, BLOCK)
    live = row < T * G
    source = ((head // HKV).to(tl.int64) * T + row // G) * H + head % HKV * G + row % G
    target = head.to(tl.int64) * padded + row
    tl.store(out_ptr + target, tl.load(lse_ptr + source, mask=live, other=0.0) * log2e, mask=row < padded)
    out_ptr += tl.num_programs(1).to(tl.int64) * padded
    tl.store(out_ptr + target, tl.load(delta_ptr + source, mask=live, other=0.0), mask=row < padded)


def pack_rows(lse: Tensor, delta: Tensor, num_kv_heads: int) -> Tensor:
    """fp32 `[2 * B * Hkv, T * G (padded)]`: log-sum-exp in base 2, then delta, a group's rows one after the other."""
    B, T, H = lse.shape
    padded = triton.cdiv(T * (H // num_kv_heads), 64) * 64
    rows = torch.empty(2 * B * num_kv_heads, padded, dtype=torch.float32, device=lse.device)
    _pack_rows_kernel[(triton.cdiv(padded, 1024), B * num_kv_heads)](
        lse, delta, rows, T, padded, LOG2E, H=H, HKV=num_kv_heads, BLOCK=1024
    )
    return rows


@gluon.jit
def _rows_of_keys(
    low, keys, doc_ptr, first_ptr, end_ptr, T, S, q_start, k_start, split_low, split_high,
    G: gl.constexpr, SIZE: gl.constexpr, STRIDE: gl.constexpr, WINDOW: gl.constexpr, PACKED: gl.constexpr,
):  # fmt: skip
    """Of `keys` keys from `low` on: first row of any, from which row on all, to which row all, end of any."""
    key_low = gl.minimum(low, S - 1)
    key_high = gl.maximum(gl.minimum(low + keys, S) - 1, key_low)
    first_low, end_low = query_interval(key_low, first_ptr, end_ptr, T, q_start, k_start, SIZE, STRIDE, WINDOW, PACKED)
    first_high, end_high = query_interval(
        key_high, first_ptr, end_ptr, T, q_start, k_start, SIZE, STRIDE, WINDOW, PACKED
    )
    # Boxes of lse and delta begin at 16 bytes; rows before the first are masked like any other.
    first = gl.maximum(first_low * G, split_low) // 4 * 4
    end = gl.minimum(end_high * G, split_high)
    plain = low + keys <= S
    if PACKED and WINDOW > 0:  # rows outside any document see nothing
        plain = plain & (gl.load(doc_ptr + key_high) < T)
    plain_first = gl.where(plain, gl.maximum(first_high * G, split_low), split_high)
    return first, plain_first, gl.minimum(end_low * G, split_high), end


@gluon.jit
def _key_load_partition(
    q_desc, q_tail_desc, k_desc, k_tail_desc, v_desc, dout_desc, row_desc, k_smem, k_tail_smem, v_smem, q_smem,
    q_tail_smem, dout_smem, lse_smem, delta_smem, q_ptr, dout_ptr, k_full, q_full, q_empty, dout_full, dout_empty,
    b, group, key_start, first, end, T,
    G: gl.constexpr, HKV: gl.constexpr, D: gl.constexpr, TAIL: gl.constexpr, ROWS: gl.constexpr, BOXES: gl.constexpr,
):  # fmt: skip
    mbarrier.expect(k_full.index(0), 4 * KEYS * (2 * D + TAIL))
    for half in gl.static_range(2):
        box = [b, key_start + half * KEYS, group, 0]
        tma.async_copy_global_to_shared(k_desc, box, k_full.index(0), k_smem.index(half))
        if TAIL > 0:
            tma.async_copy_global_to_shared(k_tail_desc, box, k_full.index(0), k_tail_smem.index(half))
        tma.async_copy_global_to_shared(v_desc, box, k_full.index(0), v_smem.index(half))
    head = b * HKV + group
    delta_head = row_desc.shape[0] // 2 + head
    for i in range(gl.cdiv(gl.maximum(end - first, 0), ROWS)):
        slot = i % STAGES
        phase = (i // STAGES & 1) ^ 1
        row = first + i * ROWS
        box = [b, row // G, group * G, 0]
        q_bytes: gl.constexpr = 2 * ROWS * (D + TAIL) if BOXES else 0
        dout_bytes: gl.constexpr = 2 * ROWS * D if BOXES else 0
        mbarrier.wait(q_empty.index(slot), phase)
        mbarrier.expect(q_full.index(slot), q_bytes + 4 * ROWS)
        tma.async_copy_global_to_shared(row_desc, [head, row], q_full.index(slot), lse_smem.index(slot))
        if BOXES:
            tma.async_copy_global_to_shared(q_desc, box, q_full.index(slot), q_smem.index(slot))
            if TAIL > 0:
                tma.async_copy_global_to_shared(q_tail_desc, box, q_full.index(slot), q_tail_smem.index(slot))
        else:
            copy_rows(q_ptr, q_smem.index(slot), row, b, group, T, G, HKV, D, D + TAIL, ROWS)
            if TAIL > 0:
                copy_rows(q_ptr + D, q_tail_smem.index(slot), row, b, group, T, G, HKV, TAIL, D + TAIL, ROWS)
            async_copy.mbarrier_arrive(q_full.index(slot), increment_count=False)
        mbarrier.wait(dout_empty.index(slot), phase)
        mbarrier.expect(dout_full.index(slot), dout_bytes + 4 * ROWS)
        tma.async_copy_global_to_shared(row_desc, [delta_head, row], dout_full.index(slot), delta_smem.index(slot))
        if BOXES:
            tma.async_copy_global_to_shared(dout_desc, box, dout_full.index(slot), dout_smem.index(slot))
        else:
            copy_rows(dout_ptr, dout_smem.index(slot), row, b, group, T, G, HKV, D, D, ROWS)
            async_copy.mbarrier_arrive(dout_full.index(slot), increment_count=False)


@gluon.jit
def _skip_rows(start, stop, q_full, q_empty, dout_full, dout_empty):
    """Let go of steps that only the other group's keys see."""
    for i in range(start, stop):
        slot = i % STAGES
        mbarrier.wait(q_full.index(slot), i // STAGES & 1)
        mbarrier.arrive(q_empty.index(slot), count=1)
        mbarrier.wait(dout_full.index(slot), i // STAGES & 1)
        mbarrier.arrive(dout_empty.index(slot), count=1)


@gluon.jit
def _store_keys(
    x_ptr, x, low, shift, b, group, S, HKV: gl.constexpr, D: gl.constexpr, WIDTH: gl.constexpr, LAYOUT: gl.constexpr
):
    key = low + gl.arange(0, KEYS, gl.SliceLayout(1, LAYOUT))
    row_64 = shift + (b.to(gl.int64) * S + key) * HKV + group
    column = gl.arange(0, D, gl.SliceLayout(0, LAYOUT))
    gl.store(x_ptr + row_64[:, None] * WIDTH + column[None, :], x.to(x_ptr.dtype.element_ty), mask=(key < S)[:, None])


@gluon.jit
def _key_partition(
    HALF: gl.constexpr, dk_ptr, dv_ptr, k_smem, k_tail_smem, v_smem, q_smem, q_tail_smem, dout_smem, lse_smem,
    delta_smem, k_full, q_full, q_empty, dout_full, dout_empty, doc_ptr, first_ptr, end_ptr, scale, scale_log2,
    T, S, q_start, k_start, b, group, key_start, first, end, split_low, split_high, shift,
    G: gl.constexpr, HKV: gl.constexpr, D: gl.constexpr, TAIL: gl.constexpr, SIZE: gl.constexpr, STRIDE: gl.constexpr,
    WINDOW: gl.constexpr, PACKED: gl.constexpr, ROWS: gl.constexpr, BOXES: gl.constexpr,
):  # fmt: skip
    S_LAYOUT: gl.constexpr = gl.NVMMADistributedLayout([3, 0], [4, 1], [16, ROWS, 16])
    K_LAYOUT: gl.constexpr = gl.NVMMADistributedLayout([3, 0], [4, 1], [16, D, 16])
    TAIL_LAYOUT: gl.constexpr = gl.NVMMADistributedLayout([3, 0], [4, 1], [16, 64, 16])
    P_LAYOUT: gl.constexpr = gl.DotOperandLayout(0, K_LAYOUT, 2)
    ROW: gl.constexpr = gl.SliceLayout(0, S_LAYOUT)
    dtype: gl.constexpr = q_smem.dtype
    low = key_start + HALF * KEYS
    key = low + gl.arange(0, KEYS, gl.SliceLayout(1, S_LAYOUT))
    near = gl.minimum(key, S - 1)
    key_first, key_end = query_interval(near, first_ptr, end_ptr, T, q_start, k_start, SIZE, STRIDE, WINDOW, PACKED)
    key_first = gl.maximum(key_first * G, split_low)
    key_end = gl.where(key < S, gl.minimum(key_end * G, split_high), 0)
    if PACKED and WINDOW > 0:  # keys outside any document
        key_end = gl.where(gl.load(doc_ptr + near) < T, key_end, 0)
    my_first, plain_first, plain_end, my_end = _rows_of_keys(
        low, KEYS, doc_ptr, first_ptr, end_ptr, T, S, q_start, k_start, split_low, split_high, G, SIZE, STRIDE, WINDOW,
        PACKED,
    )  # fmt: skip
    num_steps = gl.cdiv(gl.maximum(end - first, 0), ROWS)
    start = gl.minimum(gl.maximum(my_first - first, 0) // ROWS, num_steps)
    stop = gl.maximum(gl.minimum(gl.cdiv(gl.maximum(my_end - first, 0), ROWS), num_steps), start)
    _skip_rows(0, start, q_full, q_empty, dout_full, dout_empty)

    none = gl.zeros([KEYS, ROWS], gl.float32, S_LAYOUT)
    dk = gl.zeros([KEYS, D], gl.float32, K_LAYOUT)
    dv = gl.zeros([KEYS, D], gl.float32, K_LAYOUT)
    k = k_smem.index(HALF).reshape([KEYS, D])
    v = v_smem.index(HALF).reshape([KEYS, D])
    k_tail, dk_tail = k, dk
    if TAIL > 0:
        k_tail = k_tail_smem.index(HALF).reshape([KEYS, TAIL])
        dk_tail = gl.zeros([KEYS, TAIL], gl.float32, TAIL_LAYOUT)
    mbarrier.wait(k_full.index(0), 0)
    for i in range(start, stop):
        slot = i % STAGES
        phase = i // STAGES & 1
        q = q_smem.index(slot).reshape([ROWS, D])
        dout = dout_smem.index(slot).reshape([ROWS, D])
        mbarrier.wait(q_full.index(slot), phase)
        if not BOXES:
            fence_async_shared()  # rows were written by threads, the products read them as TMA does
        s = warpgroup_mma(k, q.permute([1, 0]), none, use_acc=False, is_async=True)
        q_tail = q
        if TAIL > 0:
            q_tail = q_tail_smem.index(slot).reshape([ROWS, TAIL])
            s = warpgroup_mma(k_tail, q_tail.permute([1, 0]), s, is_async=True)
        mbarrier.wait(dout_full.index(slot), phase)
        if not BOXES:
            fence_async_shared()
        dp = warpgroup_mma(v, dout.permute([1, 0]), none, use_acc=False, is_async=True)
        lse = lse_smem.index(slot).reshape([ROWS]).load(ROW)
        s = warpgroup_mma_wait(1, deps=[s])
        p = gl.exp2(s * scale_log2 - lse[None, :])
        row_start = first + i * ROWS
        if (row_start < plain_first) | (row_start + ROWS > plain_end):
            row = row_start + gl.arange(0, ROWS, ROW)
            p = gl.where((row[None, :] >= key_first[:, None]) & (row[None, :] < key_end[:, None]), p, 0.0)
        dv = warpgroup_mma(gl.convert_layout(p.to(dtype), P_LAYOUT), dout, dv, is_async=True)
        dp = warpgroup_mma_wait(1, deps=[dp])
        delta = delta_smem.index(slot).reshape([ROWS]).load(ROW)
        fence_async_shared()  # reads of lse and delta come before the next ones arrive
        ds = (p * (dp - delta[None, :])).to(dtype)
        dk = warpgroup_mma(gl.convert_layout(ds, P_LAYOUT), q, dk, is_async=True)
        if TAIL > 0:
            ds = gl.convert_layout(ds, gl.DotOperandLayout(0, TAIL_LAYOUT, 2))
            dk_tail = warpgroup_mma(ds, q_tail, dk_tail, is_async=True)
        # All end here: carried into the next step they would need more registers than there are.
        dv = warpgroup_mma_wait(1 if TAIL == 0 else 2, deps=[dv])
        mbarrier.arrive(dout_empty.index(slot), count=1)
        if TAIL > 0:
            dk = warpgroup_mma_wait(1, deps=[dk])
            dk_tail = warpgroup_mma_wait(0, deps=[dk_tail])
        else:
            dk = warpgroup_mma_wait(0, deps=[dk])
        mbarrier.arrive(q_empty.index(slot), count=1)
    _skip_rows(stop, num_steps, q_full, q_empty, dout_full, dout_empty)
    _store_keys(dk_ptr, dk * scale, low, shift, b, group, S, HKV, D, D + TAIL, K_LAYOUT)
    if TAIL > 0:
        _store_keys(dk_ptr + D, dk_tail * scale, low, shift, b, group, S, HKV, TAIL, D + TAIL, TAIL_LAYOUT)
    _store_keys(dv_ptr, dv, low, shift, b, group, S, HKV, D, D, K_LAYOUT)


@gluon.jit(do_not_specialize=["T", "S", "q_start", "k_start", "split_rows"])
def dense_dkdv_sm90_kernel(
    q_desc, q_tail_desc, k_desc, k_tail_desc, v_desc, dout_desc, row_desc, q_ptr, dout_ptr, dk_ptr, dv_ptr, doc_ptr,
    first_ptr, end_ptr, scale, scale_log2, T, S, q_start, k_start, split_rows,
    G: gl.constexpr, HKV: gl.constexpr, D: gl.constexpr, TAIL: gl.constexpr, SIZE: gl.constexpr, STRIDE: gl.constexpr,
    WINDOW: gl.constexpr, PACKED: gl.constexpr, ROWS: gl.constexpr, BOXES: gl.constexpr,
):  # fmt: skip
    k_smem = gl.allocate_shared_memory(k_desc.dtype, [2] + k_desc.block_shape, k_desc.layout)
    v_smem = gl.allocate_shared_memory(v_desc.dtype, [2] + v_desc.block_shape, v_desc.layout)
    q_smem = gl.allocate_shared_memory(q_desc.dtype, [STAGES] + q_desc.block_shape, q_desc.layout)
    dout_smem = gl.allocate_shared_memory(dout_desc.dtype, [STAGES] + dout_desc.block_shape, dout_desc.layout)
    k_tail_smem, q_tail_smem = k_smem, q_smem
    if TAIL > 0:
        k_box: gl.constexpr = [2] + k_tail_desc.block_shape
        q_box: gl.constexpr = [STAGES] + q_tail_desc.block_shape
        k_tail_smem = gl.allocate_shared_memory(k_desc.dtype, k_box, k_tail_desc.layout)
        q_tail_smem = gl.allocate_shared_memory(q_desc.dtype, q_box, q_tail_desc.layout)
    lse_smem = gl.allocate_shared_memory(row_desc.dtype, [STAGES] + row_desc.block_shape, row_desc.layout)
    delta_smem = gl.allocate_shared_memory(row_desc.dtype, [STAGES] + row_desc.block_shape, row_desc.layout)
    k_full = make_barriers(1, 1)
    arrivals: gl.constexpr = 1 if BOXES else 129  # one for lse and delta, and every thread that copies rows
    q_full = make_barriers(STAGES, arrivals)
    q_empty = make_barriers(STAGES, 2)
    dout_full = make_barriers(STAGES, arrivals)
    dout_empty = make_barriers(STAGES, 2)
    fence_async_shared()

    b = gl.program_id(1) // HKV
    group = gl.program_id(1) % HKV
    split = gl.num_programs(2) - 1 - gl.program_id(2)  # the last rows see most keys: the heaviest first
    key_start = gl.program_id(0) * (2 * KEYS)
    split_low = split * split_rows
    split_high = gl.minimum(split_low + split_rows, T * G)
    first, _from, _to, end = _rows_of_keys(
        key_start, 2 * KEYS, doc_ptr, first_ptr, end_ptr, T, S, q_start, k_start, split_low, split_high,
        G, SIZE, STRIDE, WINDOW, PACKED,
    )  # fmt: skip
    shift = split * (gl.num_programs(1) // HKV).to(gl.int64) * S * HKV
    gl.warp_specialize([
        (_key_partition, (
            0, dk_ptr, dv_ptr, k_smem, k_tail_smem, v_smem, q_smem, q_tail_smem, dout_smem, lse_smem, delta_smem,
            k_full, q_full, q_empty, dout_full, dout_empty, doc_ptr, first_ptr, end_ptr, scale, scale_log2,
            T, S, q_start, k_start, b, group, key_start, first, end, split_low, split_high, shift,
            G, HKV, D, TAIL, SIZE, STRIDE, WINDOW, PACKED, ROWS, BOXES,
        )),
        (_key_partition, (
            1, dk_ptr, dv_ptr, k_smem, k_tail_smem, v_smem, q_smem, q_tail_smem, dout_smem, lse_smem, delta_smem,
            k_full, q_full, q_empty, dout_full, dout_empty, doc_ptr, first_ptr, end_ptr, scale, scale_log2,
            T, S, q_start, k_start, b, group, key_start, first, end, split_low, split_high, shift,
            G, HKV, D, TAIL, SIZE, STRIDE, WINDOW, PACKED, ROWS, BOXES,
        )),
        (_key_load_partition, (
            q_desc, q_tail_desc, k_desc, k_tail_desc, v_desc, dout_desc, row_desc, k_smem, k_tail_smem, v_smem, q_smem,
            q_tail_smem, dout_smem, lse_smem, delta_smem, q_ptr, dout_ptr, k_full, q_full, q_empty, dout_full,
            dout_empty, b, group, key_start, first, end, T, G, HKV, D, TAIL, ROWS, BOXES,
        )),
    ], [4, 1 if BOXES else 4], [240 if BOXES else 224, 24 if BOXES else 56])  # fmt: skip


def dense_dkdv_sm90(
    dout: Tensor, q: Tensor, k: Tensor, v: Tensor, lse: Tensor, delta: Tensor, dk: Tensor, dv: Tensor,
    geometry: BlockGeometry, layout: Layout | None, window: int, q_start: int, k_start: int, scale: float,
) -> None:  # fmt: skip
    """Write dk and dv `[splits, B, S, Hkv, D]` of each split's rows."""
    B, T, H, Dk = q.shape
    S, Hkv, D, splits = k.shape[1], k.shape[2], v.shape[3], dk.shape[0]
    G, num_rows = H // Hkv, NUM_TAIL_ROWS if Dk > D else NUM_ROWS
    boxes = num_rows % G == 0
    box = (num_rows // G, G) if boxes else (num_rows, 1)
    rows = pack_rows(lse, delta, Hkv)
    row_layout = gl.NVMMASharedLayout(swizzle_byte_width=0, element_bitwidth=32, rank=2)
    row_desc = TensorDescriptor(rows, list(rows.shape), list(rows.stride()), [1, num_rows], row_layout)
    documents = document_pointers(layout, q, "doc_start", "cmp_token", "doc_end" if window else "cmp_doc_end")
    dense_dkdv_sm90_kernel[(triton.cdiv(S, 2 * KEYS.value), B * Hkv, splits)](
        *describe_parts(q, D, *box), *describe_parts(k, D, KEYS.value, 1), describe_box(v, KEYS.value, 1),
        describe_box(dout, *box), row_desc, q, dout, dk, dv, *documents, scale, scale * LOG2E,
        T, S, q_start, k_start, triton.cdiv(T, splits) * G,
        G=G, HKV=Hkv, D=D, TAIL=Dk - D, SIZE=geometry.compress_block_size, STRIDE=geometry.compress_stride,
        WINDOW=window, PACKED=layout is not None, ROWS=num_rows, BOXES=boxes, num_warps=4,
    )  # fmt: skip
