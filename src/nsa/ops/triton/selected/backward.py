"""Backward of the selected branch, block by block, without atomics: five products and ordered sums.

A program holds one item's keys and values, runs over the rows that chose the block, and keeps dK and dV in registers;
each row's part of dQ goes to a scratch at (token, slot, head). Items write their dK and dV to a scratch of their own.
Two small kernels then add the slots of a row and the items of a block, in order, so that the result is bitwise
repeatable. Long inputs go chunk by chunk; dK and dV accumulate in fp32 across chunks.

Shapes: as in `select_fwd`, dout `[B, T, H, Dv]`, lse and delta `[B, T, H]`; dK and dV of the items
`[heads, bound, sub_block, D]`, fp32.
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
from nsa.ops.triton.gates import Rows
from nsa.ops.triton.gpu import LOG2E, dot_precision, has_large_shared_memory, key_tail, scratch_of
from nsa.ops.triton.layout import Layout
from nsa.ops.triton.selected.backward_sm90 import hopper_select_backward, hopper_select_backward_serves
from nsa.ops.triton.selected.forward import REDUCE_ELEMENTS, REDUCE_STAGES, chunk_token_bytes
from nsa.ops.triton.selected.invert import cut_chunks, invert, item_keys, plan

# Large chunks give blocks more rows, so that fewer items share them. This is 1.34 GiB: three chunks for a group of 16
# heads of 128 at 65,536 tokens, whose whole step then takes less than 1.3 times dense attention's memory.
SCRATCH_BYTES = 171 * 2**23
KEYS_OF_SUM = 4  # keys whose gradients a program adds up
STAGES_OF_SUM = 6  # items on their way through shared memory: the first block has hundreds


def select_backward_tile(
    q: Tensor, head_dim: int, value_head_dim: int, large: bool, queries: bool = True
) -> dict[str, int]:
    """BLOCK_M rows a step; all keys of a (sub-)block are held."""
    widest = max(head_dim, value_head_dim)
    if q.dtype == torch.float32:
        return {"BLOCK_M": 16, "num_warps": 4, "num_stages": 1}
    if not large:
        return {"BLOCK_M": 16 if widest > 128 else 32, "num_warps": 4, "num_stages": 1}
    if widest > 192:
        return {"BLOCK_M": 64, "num_warps": 8, "num_stages": 2}
    stages = 2 if queries else 3 if widest > 64 else 1
    return {"BLOCK_M": 32 if widest > 128 else 64, "num_warps": 4, "num_stages": stages}


def rows_of_item(num_rows: int) -> int:
    """Rows of an item in a chunk of `num_rows` (token, slot, head): each costs a dK and dV, few leave the GPU idle."""
    steps = ((2**20, 1024), (5 * 2**20, 2048), (2**23 - 1, 4096))
    return next((rows for most, rows in steps if num_rows <= most), 8192)


@triton.jit(do_not_specialize=["T", "S", "q_start", "head_start", "token_start", "num_tokens", "bound"])
def select_backward_kernel(
    q_ptr, k_ptr, v_ptr, dout_ptr, lse_ptr, delta_ptr, part_ptr, dk_ptr, dv_ptr, key_ptr,
    entries_ptr, item_ptr, doc_ptr, doc_end_ptr, base_ptr,
    scale_log2, log2e, T, S, q_start, head_start, token_start, num_tokens, bound,
    H: tl.constexpr, HKV: tl.constexpr, DK: tl.constexpr, TAIL: tl.constexpr, DV: tl.constexpr, BLOCK: tl.constexpr,
    RATIO: tl.constexpr, SLOTS: tl.constexpr, PACKED: tl.constexpr, QUERIES: tl.constexpr, PRECISION: tl.constexpr,
    BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr,
):  # fmt: skip
    G: tl.constexpr = H // HKV
    item = tl.program_id(1) * bound + tl.program_id(0)
    item_ptr += item.to(tl.int64) * 3
    block = tl.load(item_ptr)
    if block >= 0:
        entry = tl.load(item_ptr + 1)
        num_rows = (tl.load(item_ptr + 2) - entry) * G
        head = head_start + tl.program_id(1)
        b = (head // HKV).to(tl.int64)
        group = head % HKV
        key_start = item_keys(entries_ptr, entry, block, doc_ptr, base_ptr, SLOTS, RATIO, BLOCK, PACKED)
        key_end = tl.minimum(key_start + BLOCK, S)
        if PACKED:
            key_end = tl.minimum(key_end, tl.load(doc_end_ptr + tl.load(entries_ptr + entry) // SLOTS))
        tl.store(key_ptr + 2 * item, key_start)
        tl.store(key_ptr + 2 * item + 1, key_end)
        n = tl.arange(0, BLOCK_N)
        live_key = (n < BLOCK) & (key_start + n < S)
        key_row = (b * S + key_start + n) * HKV + group
        MAIN: tl.constexpr = DK - TAIL
        k_ptrs = k_ptr + key_row[:, None] * DK
        k = tl.load(k_ptrs + tl.arange(0, MAIN)[None, :], mask=live_key[:, None], other=0.0)
        dk = tl.zeros([BLOCK_N, MAIN], tl.float32)
        k_tail, dk_tail = k, dk
        if TAIL > 0:
            k_tail = tl.load(k_ptrs + MAIN + tl.arange(0, TAIL)[None, :], mask=live_key[:, None], other=0.0)
            dk_tail = tl.zeros([BLOCK_N, TAIL], tl.float32)
        v = tl.load(v_ptr + key_row[:, None] * DV + tl.arange(0, DV)[None, :], mask=live_key[:, None], other=0.0)
        position = tl.where(live_key, key_start + n, S) - q_start
        dv = tl.zeros([BLOCK_N, DV], tl.float32)
        for start in tl.range(0, num_rows, BLOCK_M):
            row = start + tl.arange(0, BLOCK_M)
            live = row < num_rows
            place = tl.load(entries_ptr + entry + row // G, mask=live, other=0)
            t = place // SLOTS
            q_row = (b * T + t) * H + group * G + row % G
            q_ptrs = q_ptr + q_row[:, None] * DK
            q = tl.load(q_ptrs + tl.arange(0, MAIN)[None, :], mask=live[:, None], other=0.0)
            dout = tl.load(dout_ptr + q_row[:, None] * DV + tl.arange(0, DV)[None, :], mask=live[:, None], other=0.0)
            lse = tl.load(lse_ptr + q_row, mask=live, other=0.0) * log2e
            delta = tl.load(delta_ptr + q_row, mask=live, other=0.0)
            s = tl.dot(k, tl.trans(q), input_precision=PRECISION)
            if TAIL > 0:
                q_tail = tl.load(q_ptrs + MAIN + tl.arange(0, TAIL)[None, :], mask=live[:, None], other=0.0)
                s = tl.dot(k_tail, tl.trans(q_tail), s, input_precision=PRECISION)
            s *= scale_log2
            seen = (position[:, None] <= t[None, :]) & live[None, :]
            p = tl.where(seen, tl.math.exp2(s - lse[None, :]), 0.0)
            dv = tl.dot(p.to(dout.dtype), dout, dv, input_precision=PRECISION)
            ds = p * (tl.dot(v, tl.trans(dout), input_precision=PRECISION) - delta[None, :])
            ds = ds.to(q.dtype)
            dk = tl.dot(ds, q, dk, input_precision=PRECISION)
            if TAIL > 0:
                dk_tail = tl.dot(ds, q_tail, dk_tail, input_precision=PRECISION)
            if QUERIES:
                dq = tl.dot(tl.trans(ds), k, input_precision=PRECISION)
                part = (tl.program_id(1).to(tl.int64) * num_tokens - token_start) * SLOTS + place
                part = part * G + row % G
                target = part_ptr + part[:, None] * DK
                tl.store(target + tl.arange(0, MAIN)[None, :], dq.to(part_ptr.dtype.element_ty), mask=live[:, None])
                if TAIL > 0:
                    dq = tl.dot(tl.trans(ds), k_tail, input_precision=PRECISION).to(part_ptr.dtype.element_ty)
                    tl.store(target + MAIN + tl.arange(0, TAIL)[None, :], dq, mask=live[:, None])
        item_row = (item.to(tl.int64) * BLOCK + n)[:, None]
        inside = (n < BLOCK)[:, None]
        tl.store(dk_ptr + item_row * DK + tl.arange(0, MAIN)[None, :], dk, mask=inside)
        if TAIL > 0:
            tl.store(dk_ptr + item_row * DK + MAIN + tl.arange(0, TAIL)[None, :], dk_tail, mask=inside)
        tl.store(dv_ptr + item_row * DV + tl.arange(0, DV)[None, :], dv, mask=inside)


@triton.jit(do_not_specialize=["T", "head_start", "token_start", "num_tokens"])
def select_query_reduce_kernel(
    part_ptr, choice_ptr, dq_ptr, scale, T, head_start, token_start, num_tokens,
    H: tl.constexpr, HKV: tl.constexpr, DK: tl.constexpr, RATIO: tl.constexpr, SLOTS: tl.constexpr,
    PADDED: tl.constexpr, ADD: tl.constexpr, ROWS: tl.constexpr, STAGES: tl.constexpr,
):  # fmt: skip
    """dQ of a row: the sum over its slots, in fp32; ADD puts it on top of what `dq_ptr` holds."""
    G: tl.constexpr = H // HKV
    row = tl.program_id(0) * ROWS + tl.arange(0, ROWS)
    live = row < num_tokens * G
    head = head_start + tl.program_id(1)
    token_row = (head // HKV).to(tl.int64) * T + token_start + row // G
    part = (tl.program_id(1).to(tl.int64) * num_tokens + row // G) * (SLOTS * G) + row % G
    choice_ptr += (token_row * HKV + head % HKV) * (SLOTS // RATIO)
    acc = tl.zeros([ROWS, PADDED], tl.float32)
    column = tl.arange(0, PADDED)[None, :]
    inside = live[:, None] & (column < DK)
    for slot in tl.range(0, SLOTS, num_stages=STAGES):
        # What an unused slot holds is read too, rather than wait for the choice before it.
        used = tl.load(choice_ptr + slot // RATIO, mask=live, other=-1) >= 0
        place = part + slot * G
        value = tl.load(part_ptr + place[:, None] * DK + column, mask=inside, other=0.0)
        acc += tl.where(used[:, None], value.to(tl.float32), 0.0)
    dq_row = token_row * H + (head % HKV) * G + row % G
    dq_ptrs = dq_ptr + dq_row[:, None] * DK + column
    dq = acc * scale
    if ADD:
        dq += tl.load(dq_ptrs, mask=inside, other=0.0).to(tl.float32)
    tl.store(dq_ptrs, dq.to(dq_ptr.dtype.element_ty), mask=inside)


@triton.jit(do_not_specialize=["S", "first_stride", "head_start", "bound"])
def select_key_reduce_kernel(
    item_dk_ptr, item_dv_ptr, key_ptr, first_ptr, dk_ptr, dv_ptr, scale, S, first_stride, head_start, bound,
    HKV: tl.constexpr, DK: tl.constexpr, DV: tl.constexpr, PADDED: tl.constexpr, BLOCK: tl.constexpr,
    BLOCK_N: tl.constexpr, KEYS: tl.constexpr, STAGES: tl.constexpr,
):  # fmt: skip
    """Add the items of a block, in order, to the fp32 gradients of KEYS of its keys."""
    PIECES: tl.constexpr = BLOCK_N // KEYS
    j = tl.program_id(0) // PIECES
    head = head_start + tl.program_id(1)
    first_ptr += tl.program_id(1).to(tl.int64) * first_stride + j
    first, end = tl.load(first_ptr), tl.load(first_ptr + 1)
    if first < end:
        item = tl.program_id(1) * bound + first
        n = tl.program_id(0) % PIECES * KEYS + tl.arange(0, KEYS)
        key = tl.load(key_ptr + 2 * item) + n
        # A short last block ends where the next document begins.
        live = (key < tl.load(key_ptr + 2 * item + 1))[:, None]
        key_row = (((head // HKV).to(tl.int64) * S + key) * HKV + head % HKV)[:, None]
        dk_column, dv_column = tl.arange(0, PADDED)[None, :], tl.arange(0, DV)[None, :]
        live_dk = live & (dk_column < DK)
        dk = tl.load(dk_ptr + key_row * DK + dk_column, mask=live_dk, other=0.0)
        dv = tl.load(dv_ptr + key_row * DV + dv_column, mask=live, other=0.0)
        for i in tl.range(first, end, num_stages=STAGES):
            item_row = ((tl.program_id(1) * bound + i).to(tl.int64) * BLOCK + n)[:, None]
            dk += tl.load(item_dk_ptr + item_row * DK + dk_column, mask=live_dk, other=0.0) * scale
            dv += tl.load(item_dv_ptr + item_row * DV + dv_column, mask=live, other=0.0)
        tl.store(dk_ptr + key_row * DK + dk_column, dk, mask=live_dk)
        tl.store(dv_ptr + key_row * DV + dv_column, dv, mask=live)


def select_backward(
    dout: Tensor, q: Tensor, k: Tensor, v: Tensor, rows: Rows, block_indices: Tensor, geometry: BlockGeometry,
    layout: Layout | None, q_start: int, scale: float, dq: Tensor | None = None, queries: bool = True,
    scratch_bytes: int = SCRATCH_BYTES, item_rows: int | None = None, tile: dict[str, int] | None = None,
) -> tuple[Tensor, Tensor, Tensor]:  # fmt: skip
    """dq, dk, dv of `select_forward`, for fitting tensors.

    Args:
        dq: added to in place where given.
        queries: without, `dq` stays as it is.
    """
    B, T, H, Dk = q.shape
    S, Hkv, Dv = k.shape[1], k.shape[2], v.shape[3]
    G = H // Hkv
    add = dq is not None
    dq = torch.empty_like(q) if dq is None else dq
    dk = torch.zeros(k.shape, dtype=torch.float32, device=k.device)
    dv = torch.zeros(v.shape, dtype=torch.float32, device=v.device)
    if q.numel() == 0:
        return dq, dk.to(k.dtype), dv.to(v.dtype)
    block_indices = block_indices.contiguous()
    inversion = invert(block_indices, geometry, layout, S)
    slots, block = inversion.slots, inversion.sub_block
    hopper = tile is None and hopper_select_backward_serves(q, v, block)
    tile = tile or select_backward_tile(q, Dk, Dv, has_large_shared_memory(q), queries)
    block_n = max(16, triton.next_power_of_2(block))
    documents = (q, q, q) if layout is None else (layout.doc_start, layout.doc_end, layout.block_base)
    # Scratch of a token: its parts of dQ, or its share of the items' dK and dV where these are short.
    share = slots * block * (Dk + Dv) * 4 // max(1, rows_of_item(0) // G) + 1
    token_bytes = G * slots * Dk * q.element_size() if queries else share
    scratch_bytes = scratch_of(q, scratch_bytes)
    token_bytes = chunk_token_bytes(token_bytes, H * Dk, scratch_bytes)
    chunks = cut_chunks(B * Hkv, T, token_bytes, inversion.segment, scratch_bytes)
    most = max((c.head_end - c.head) * (c.token_end - c.token) for c in chunks)
    item_entries = max(1, (item_rows or rows_of_item(most * G * slots)) // G)
    part = q.new_empty(most * G * slots, Dk) if queries else q
    items = plan(inversion, T, max(c.token_end - c.token for c in chunks), item_entries)
    bound, num_blocks = items.table.shape[2], items.first.shape[2] - 1
    most_items = max(c.head_end - c.head for c in chunks) * bound
    item_dk = torch.empty(most_items * block, Dk, dtype=torch.float32, device=k.device)
    item_dv = torch.empty(most_items * block, Dv, dtype=torch.float32, device=k.device)
    item_key = torch.empty(most_items, 2, dtype=torch.int32, device=k.device)
    padded = triton.next_power_of_2(Dk)
    reduce_rows = max(1, REDUCE_ELEMENTS // padded)
    for chunk in chunks:
        heads, tokens = chunk.head_end - chunk.head, chunk.token_end - chunk.token
        place = (chunk.token // items.range_tokens, slice(chunk.head, chunk.head_end))
        table, first = items.table[place], items.first[place]
        if hopper:
            hopper_select_backward(
                q, k, v, dout, rows, part, item_dk, item_dv, item_key, inversion, table, layout, chunk, q_start, scale,
                queries,
            )  # fmt: skip
        else:
            select_backward_kernel[(bound, heads)](
                q, k, v, dout, *rows, part, item_dk, item_dv, item_key, inversion.entries, table, *documents,
                scale * LOG2E, LOG2E, T, S, q_start, chunk.head, chunk.token, tokens, bound,
                H=H, HKV=Hkv, DK=Dk, TAIL=key_tail(Dk), DV=Dv, BLOCK=block, RATIO=inversion.ratio, SLOTS=slots,
                PACKED=layout is not None, QUERIES=queries, PRECISION=dot_precision(q), BLOCK_N=block_n, **tile,
            )  # fmt: skip
        if queries:
            select_query_reduce_kernel[(triton.cdiv(tokens * G, reduce_rows), heads)](
                part, block_indices, dq, scale, T, chunk.head, chunk.token, tokens,
                H=H, HKV=Hkv, DK=Dk, RATIO=inversion.ratio, SLOTS=slots, PADDED=padded, ADD=add, ROWS=reduce_rows,
                STAGES=REDUCE_STAGES, num_warps=4,
            )  # fmt: skip
        select_key_reduce_kernel[(num_blocks * (block_n // KEYS_OF_SUM), heads)](
            item_dk, item_dv, item_key, first, dk, dv, scale, S, num_blocks + 1, chunk.head, bound,
            HKV=Hkv, DK=Dk, DV=Dv, PADDED=padded, BLOCK=block, BLOCK_N=block_n, KEYS=KEYS_OF_SUM,
            STAGES=STAGES_OF_SUM, num_warps=4,
        )  # fmt: skip
    return dq, dk.to(k.dtype), dv.to(v.dtype)
