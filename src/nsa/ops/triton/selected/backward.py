"""Backward of the selected branch, block by block, without atomics: five products and ordered sums.

A program holds one item's keys and values and runs over the rows (entry, head of the group) that chose the block. dK
and dV stay in registers and go to a scratch of the item, each row's part of dQ to a scratch at (token, slot, head).
Two small kernels then add the slots of a row and the items of a block, in order, so that the result is bitwise
repeatable. Long inputs go chunk by chunk; dK and dV accumulate in fp32 across chunks.

Pairs, entries, slots and items are those of `invert.py`.
Shapes: as in `forward.py`, dout `[B, T, H, Dv]`, lse and delta `[B, T, H]`; dK and dV of the items
`[pairs, bound, sub_block, D]`, fp32.
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
from nsa.ops.triton.gates import Rows
from nsa.ops.triton.gpu import LOG2E, dot_precision, key_tail
from nsa.ops.triton.layout import Layout, document_pointers
from nsa.ops.triton.plan import Selected
from nsa.ops.triton.selected.backward_sm90 import selected_backward_sm90
from nsa.ops.triton.selected.forward import REDUCE_ELEMENTS, REDUCE_STAGES, chunk_token_bytes, load_block
from nsa.ops.triton.selected.invert import (
    Chunk,
    Inversion,
    ItemGradients,
    Items,
    cut_chunks,
    invert,
    item_keys,
    make_items,
)
from nsa.ops.triton.tiles import Tile

KEYS_OF_SUM = 4  # keys whose gradients a program adds up
STAGES_OF_SUM = 6  # items on their way through shared memory: the first block has hundreds


def rows_of_item(num_rows: int) -> int:
    """Rows of an item in a chunk of `num_rows` (token, slot, head): each costs a dK and dV, few leave the GPU idle."""
    steps = ((2**20, 1024), (5 * 2**20, 2048), (2**23 - 1, 4096))
    return next((rows for most, rows in steps if num_rows <= most), 8192)


@triton.jit
def _store_part(part_ptr, ds, k, k_tail, part, live, TAIL: tl.constexpr, PRECISION: tl.constexpr):
    """Store the rows' parts of dQ, unscaled: each (token, slot, head) is one item's, so that nothing is atomic."""
    MAIN: tl.constexpr = k.shape[1]
    dq = tl.dot(tl.trans(ds), k, input_precision=PRECISION)
    target = part_ptr + part[:, None] * (MAIN + TAIL)
    tl.store(target + tl.arange(0, MAIN)[None, :], dq.to(part_ptr.dtype.element_ty), mask=live[:, None])
    if TAIL > 0:
        dq = tl.dot(tl.trans(ds), k_tail, input_precision=PRECISION).to(part_ptr.dtype.element_ty)
        tl.store(target + MAIN + tl.arange(0, TAIL)[None, :], dq, mask=live[:, None])


@triton.jit
def _store_item(dk_ptr, dv_ptr, dk, dk_tail, dv, first_row, BLOCK: tl.constexpr, TAIL: tl.constexpr):
    """Store an item's dK and dV, fp32; the tile may be longer than its BLOCK keys."""
    MAIN: tl.constexpr = dk.shape[1]
    DV: tl.constexpr = dv.shape[1]
    n = tl.arange(0, dk.shape[0])
    item_row = (first_row + n)[:, None]
    inside = (n < BLOCK)[:, None]
    dk_ptrs = dk_ptr + item_row * (MAIN + TAIL)
    tl.store(dk_ptrs + tl.arange(0, MAIN)[None, :], dk, mask=inside)
    if TAIL > 0:
        tl.store(dk_ptrs + MAIN + tl.arange(0, TAIL)[None, :], dk_tail, mask=inside)
    tl.store(dv_ptr + item_row * DV + tl.arange(0, DV)[None, :], dv, mask=inside)


@triton.jit(do_not_specialize=["T", "S", "q_start", "pair_start", "token_start", "num_tokens", "bound"])
def selected_backward_kernel(
    q_ptr, k_ptr, v_ptr, dout_ptr, lse_ptr, delta_ptr, part_ptr, dk_ptr, dv_ptr, key_ptr,
    entries_ptr, item_ptr, doc_ptr, doc_end_ptr, base_ptr,
    scale_log2, log2e, T, S, q_start, pair_start, token_start, num_tokens, bound,
    H: tl.constexpr, HKV: tl.constexpr, DK: tl.constexpr, TAIL: tl.constexpr, DV: tl.constexpr, BLOCK: tl.constexpr,
    RATIO: tl.constexpr, SLOTS: tl.constexpr, PACKED: tl.constexpr, QUERIES: tl.constexpr, PRECISION: tl.constexpr,
    BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr,
):  # fmt: skip
    """dK and dV of an item (fp32, dK unscaled), its keys (first, end), and with QUERIES its rows' parts of dQ."""
    G: tl.constexpr = H // HKV
    item = tl.program_id(1) * bound + tl.program_id(0)
    item_ptr += item.to(tl.int64) * 3
    block = tl.load(item_ptr)
    if block >= 0:  # the table has room for more items than there are
        first_entry = tl.load(item_ptr + 1)
        num_rows = (tl.load(item_ptr + 2) - first_entry) * G
        pair = pair_start + tl.program_id(1)
        b = (pair // HKV).to(tl.int64)
        group = pair % HKV
        key_start = item_keys(entries_ptr, first_entry, block, doc_ptr, base_ptr, SLOTS, RATIO, BLOCK, PACKED)
        key_end = tl.minimum(key_start + BLOCK, S)
        if PACKED:
            key_end = tl.minimum(key_end, tl.load(doc_end_ptr + tl.load(entries_ptr + first_entry) // SLOTS))
        tl.store(key_ptr + 2 * item, key_start)
        tl.store(key_ptr + 2 * item + 1, key_end)
        k, k_tail, v, key = load_block(k_ptr, v_ptr, b, group, key_start, S, HKV, DK, TAIL, DV, BLOCK, BLOCK_N)
        position = key - q_start
        MAIN: tl.constexpr = DK - TAIL
        dk = tl.zeros([BLOCK_N, MAIN], tl.float32)
        dk_tail = dk
        if TAIL > 0:
            dk_tail = tl.zeros([BLOCK_N, TAIL], tl.float32)
        dv = tl.zeros([BLOCK_N, DV], tl.float32)
        for start in tl.range(0, num_rows, BLOCK_M):
            row = start + tl.arange(0, BLOCK_M)
            live = row < num_rows
            entry = tl.load(entries_ptr + first_entry + row // G, mask=live, other=0)
            t = entry // SLOTS
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
            # P from the final log-sum-exp; no branch around the mask, which costs registers that spill.
            s *= scale_log2
            seen = (position[:, None] <= t[None, :]) & live[None, :]
            p = tl.where(seen, tl.math.exp2(s - lse[None, :]), 0.0)
            dv = tl.dot(p.to(dout.dtype), dout, dv, input_precision=PRECISION)
            # dS = P (dP - delta); dK and dQ are multiplied by the scale once, in the sums.
            ds = p * (tl.dot(v, tl.trans(dout), input_precision=PRECISION) - delta[None, :])
            ds = ds.to(q.dtype)
            dk = tl.dot(ds, q, dk, input_precision=PRECISION)
            if TAIL > 0:
                dk_tail = tl.dot(ds, q_tail, dk_tail, input_precision=PRECISION)
            if QUERIES:
                part = (tl.program_id(1).to(tl.int64) * num_tokens - token_start) * SLOTS + entry
                _store_part(part_ptr, ds, k, k_tail, part * G + row % G, live, TAIL, PRECISION)
        _store_item(dk_ptr, dv_ptr, dk, dk_tail, dv, item.to(tl.int64) * BLOCK, BLOCK, TAIL)


@triton.jit(do_not_specialize=["T", "pair_start", "token_start", "num_tokens"])
def selected_dq_reduce_kernel(
    part_ptr, choice_ptr, dq_ptr, scale, T, pair_start, token_start, num_tokens,
    H: tl.constexpr, HKV: tl.constexpr, DK: tl.constexpr, RATIO: tl.constexpr, SLOTS: tl.constexpr,
    PADDED: tl.constexpr, ADD: tl.constexpr, ROWS: tl.constexpr, STAGES: tl.constexpr,
):  # fmt: skip
    """dQ of ROWS rows (token, head): sums over their slots, in fp32 and in order; ADD adds to what `dq_ptr` holds."""
    G: tl.constexpr = H // HKV
    row = tl.program_id(0) * ROWS + tl.arange(0, ROWS)
    live = row < num_tokens * G
    pair = pair_start + tl.program_id(1)
    token_row = (pair // HKV).to(tl.int64) * T + token_start + row // G
    part = (tl.program_id(1).to(tl.int64) * num_tokens + row // G) * (SLOTS * G) + row % G
    choice_ptr += (token_row * HKV + pair % HKV) * (SLOTS // RATIO)
    acc = tl.zeros([ROWS, PADDED], tl.float32)
    column = tl.arange(0, PADDED)[None, :]
    inside = live[:, None] & (column < DK)
    for slot in tl.range(0, SLOTS, num_stages=STAGES):
        # What an unused slot holds is read too, rather than wait for the choice before it.
        used = tl.load(choice_ptr + slot // RATIO, mask=live, other=-1) >= 0
        slot_part = part + slot * G
        value = tl.load(part_ptr + slot_part[:, None] * DK + column, mask=inside, other=0.0)
        acc += tl.where(used[:, None], value.to(tl.float32), 0.0)
    dq_row = token_row * H + (pair % HKV) * G + row % G
    dq_ptrs = dq_ptr + dq_row[:, None] * DK + column
    dq = acc * scale
    if ADD:
        dq += tl.load(dq_ptrs, mask=inside, other=0.0).to(tl.float32)
    tl.store(dq_ptrs, dq.to(dq_ptr.dtype.element_ty), mask=inside)


@triton.jit(do_not_specialize=["S", "first_stride", "pair_start", "bound"])
def selected_dkdv_reduce_kernel(
    item_dk_ptr, item_dv_ptr, key_ptr, first_ptr, dk_ptr, dv_ptr, scale, S, first_stride, pair_start, bound,
    HKV: tl.constexpr, DK: tl.constexpr, DV: tl.constexpr, PADDED: tl.constexpr, BLOCK: tl.constexpr,
    BLOCK_N: tl.constexpr, KEYS: tl.constexpr, STAGES: tl.constexpr,
):  # fmt: skip
    """Add the items of a block, in order, to the fp32 gradients of KEYS of its keys."""
    PIECES: tl.constexpr = BLOCK_N // KEYS  # few keys a program: the first block's items are a chain of hundreds
    j = tl.program_id(0) // PIECES
    pair = pair_start + tl.program_id(1)
    first_ptr += tl.program_id(1).to(tl.int64) * first_stride + j
    first, end = tl.load(first_ptr), tl.load(first_ptr + 1)
    if first < end:
        item = tl.program_id(1) * bound + first
        n = tl.program_id(0) % PIECES * KEYS + tl.arange(0, KEYS)
        key = tl.load(key_ptr + 2 * item) + n
        # A short last block ends where the next document begins.
        live = (key < tl.load(key_ptr + 2 * item + 1))[:, None]
        key_row = (((pair // HKV).to(tl.int64) * S + key) * HKV + pair % HKV)[:, None]
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


class Work(NamedTuple):
    """How a backward is cut, and its scratch.

    Attributes:
        inversion: entries by block.
        chunks, items: parts of the input, and the work items of each.
        part: parts of dQ of a chunk, `[pairs, tokens, slots, G, Dk]`; any tensor where dQ is not computed here.
        grads: dK and dV of a chunk's items.
    """

    inversion: Inversion
    chunks: list[Chunk]
    items: Items
    part: Tensor
    grads: ItemGradients


def select_backward(
    dout: Tensor, q: Tensor, k: Tensor, v: Tensor, rows: Rows, block_indices: Tensor, geometry: BlockGeometry,
    layout: Layout | None, q_start: int, scale: float, plan: Selected, dq: Tensor | None = None,
) -> tuple[Tensor, Tensor, Tensor]:  # fmt: skip
    """dq, dk, dv of `select_forward`, for fitting tensors; a given `dq` is added to, unless unions have done so."""
    stage, with_dq, add = plan.backward, plan.dq is None, dq is not None
    dq = torch.empty_like(q) if dq is None else dq
    dk = torch.zeros(k.shape, dtype=torch.float32, device=k.device)
    dv = torch.zeros(v.shape, dtype=torch.float32, device=v.device)
    if q.numel() == 0:
        return dq, dk.to(k.dtype), dv.to(v.dtype)
    block_indices = block_indices.contiguous()
    work = _cut_work(q, v, invert(block_indices, geometry, layout, k.shape[1]), stage.scratch_bytes, with_dq)
    for chunk in work.chunks:
        of_chunk = (chunk.token // work.items.range_tokens, slice(chunk.pair, chunk.pair_end))
        table, first = work.items.table[of_chunk], work.items.first[of_chunk]
        what = (work.part, work.grads, work.inversion, table, layout, chunk, q_start, scale, with_dq)
        if stage.is_sm90:
            selected_backward_sm90(q, k, v, dout, rows, *what)
        else:
            _differentiate(q, k, v, dout, rows, *what, stage.tile)
        if with_dq:
            _reduce_dq(work, chunk, block_indices, dq, scale, add)
        _reduce_dkdv(work, chunk, first, dk, dv, scale)
    return dq, dk.to(k.dtype), dv.to(v.dtype)


def _cut_work(q: Tensor, v: Tensor, inversion: Inversion, scratch_bytes: int, with_dq: bool) -> Work:
    (B, T, H, Dk), Dv, device = q.shape, v.shape[3], q.device
    num_pairs, slots, block = inversion.ends.shape[0], inversion.slots, inversion.sub_block
    G = B * H // num_pairs
    # Scratch of a token: its parts of dQ, or its share of the items' dK and dV where these are short.
    share = slots * block * (Dk + Dv) * 4 // max(1, rows_of_item(0) // G) + 1
    token_bytes = G * slots * Dk * q.element_size() if with_dq else share
    token_bytes = chunk_token_bytes(token_bytes, H * Dk, scratch_bytes)
    chunks = cut_chunks(num_pairs, T, token_bytes, inversion.segment, scratch_bytes)
    rows = max(chunk.num_pairs * chunk.num_tokens for chunk in chunks) * G * slots
    part = q.new_empty(rows, Dk) if with_dq else q
    items = make_items(inversion, T, max(chunk.num_tokens for chunk in chunks), max(1, rows_of_item(rows) // G))
    most = max(chunk.num_pairs for chunk in chunks) * items.table.shape[2]
    grads = ItemGradients(
        torch.empty(most * block, Dk, dtype=torch.float32, device=device),
        torch.empty(most * block, Dv, dtype=torch.float32, device=device),
        torch.empty(most, 2, dtype=torch.int32, device=device),
    )
    return Work(inversion, chunks, items, part, grads)


def _differentiate(
    q: Tensor, k: Tensor, v: Tensor, dout: Tensor, rows: Rows, part: Tensor, grads: ItemGradients,
    inversion: Inversion, table: Tensor, layout: Layout | None, chunk: Chunk, q_start: int, scale: float,
    with_dq: bool, tile: Tile,
) -> None:  # fmt: skip
    """Write the gradients of a chunk's items, and with `with_dq` the parts of dQ."""
    T, H, Dk = q.shape[1:]
    S, Hkv, Dv = k.shape[1:3] + v.shape[3:]
    bound = table.shape[1]
    selected_backward_kernel[(bound, chunk.num_pairs)](
        q, k, v, dout, *rows, part, *grads, inversion.entries, table,
        *document_pointers(layout, q, "doc_start", "doc_end", "block_base"), scale * LOG2E, LOG2E, T, S, q_start,
        chunk.pair, chunk.token, chunk.num_tokens, bound,
        H=H, HKV=Hkv, DK=Dk, TAIL=key_tail(Dk), DV=Dv, BLOCK=inversion.sub_block, RATIO=inversion.ratio,
        SLOTS=inversion.slots, PACKED=layout is not None, QUERIES=with_dq, PRECISION=dot_precision(q),
        BLOCK_N=max(16, triton.next_power_of_2(inversion.sub_block)), **tile,
    )  # fmt: skip


def _reduce_dq(
    work: Work, chunk: Chunk, block_indices: Tensor, dq: Tensor, scale: float, add: bool
) -> None:  # fmt: skip
    """Add a chunk's parts of dQ up, slot by slot; `add` puts the sum on top of what `dq` holds."""
    _, T, H, Dk = dq.shape
    Hkv, padded = block_indices.shape[2], triton.next_power_of_2(Dk)
    rows = max(1, REDUCE_ELEMENTS // padded)
    selected_dq_reduce_kernel[(triton.cdiv(chunk.num_tokens * (H // Hkv), rows), chunk.num_pairs)](
        work.part, block_indices, dq, scale, T, chunk.pair, chunk.token, chunk.num_tokens,
        H=H, HKV=Hkv, DK=Dk, RATIO=work.inversion.ratio, SLOTS=work.inversion.slots, PADDED=padded, ADD=add, ROWS=rows,
        STAGES=REDUCE_STAGES, num_warps=4,
    )  # fmt: skip


def _reduce_dkdv(work: Work, chunk: Chunk, first: Tensor, dk: Tensor, dv: Tensor, scale: float) -> None:
    """Add a chunk's items to the fp32 dk and dv, in order."""
    _, S, Hkv, Dk = dk.shape
    block, bound, num_blocks = work.inversion.sub_block, work.items.table.shape[2], first.shape[1] - 1
    block_n = max(16, triton.next_power_of_2(block))
    selected_dkdv_reduce_kernel[(num_blocks * (block_n // KEYS_OF_SUM), chunk.num_pairs)](
        *work.grads, first, dk, dv, scale, S, num_blocks + 1, chunk.pair, bound,
        HKV=Hkv, DK=Dk, DV=dv.shape[3], PADDED=triton.next_power_of_2(Dk), BLOCK=block, BLOCK_N=block_n,
        KEYS=KEYS_OF_SUM, STAGES=STAGES_OF_SUM, num_warps=4,
    )  # fmt: skip
