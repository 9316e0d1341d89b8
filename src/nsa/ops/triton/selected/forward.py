"""Forward of the selected branch, block by block: full tiles of the rows that chose a block, then a reduction.

A program holds one block's keys and values and runs over the entries that chose it, BLOCK_M rows (entry, head of the
group) at a time. Each row's softmax over the block and its log-sum-exp, a part, go to a scratch at (token, slot, head);
a second kernel weighs and adds a row's parts in order. The scratch stays under the stage's: long inputs go chunk by
chunk.
The forced blocks, which whole blocks of queries share, can come from a dense kernel (`forced.py`) instead, as one more
part of the sum; then the slots that are left are the free ones.

Pairs, entries, slots and items are those of `invert.py`.
Shapes: q `[B, T, H, Dk]`, k `[B, S, Hkv, Dk]`, v `[B, S, Hkv, Dv]`, block_indices `[B, T, Hkv, n]`; parts
`[pairs, tokens, free slots, G, Dv]` of a chunk, in the dtype of q; their log-sum-exps, base 2, without the last size.
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
from nsa.ops.triton.gates import Gated, gate_pointers, gated_sum
from nsa.ops.triton.gpu import LN2, LOG2E, dot_precision, key_tail
from nsa.ops.triton.layout import Layout, document_pointers
from nsa.ops.triton.plan import Stage
from nsa.ops.triton.selected.forward_sm90 import range_tokens, selected_forward_sm90
from nsa.ops.triton.selected.invert import Chunk, Inversion, Items, cut_chunks, invert, item_keys, make_items
from nsa.ops.triton.tiles import Tile

ITEM_ROWS = 1024  # of an item, which reads its block once
REDUCE_ELEMENTS = 1024  # of the rows that a program of a sum holds
REDUCE_STAGES = 6  # slots on their way through shared memory


@triton.jit
def load_block(
    k_ptr, v_ptr, b, group, key_start, S, HKV: tl.constexpr, DK: tl.constexpr, TAIL: tl.constexpr, DV: tl.constexpr,
    BLOCK: tl.constexpr, BLOCK_N: tl.constexpr,
):  # fmt: skip
    """Keys (their columns in two parts) and values of a block, and each key's number; S for those beyond the block."""
    n = tl.arange(0, BLOCK_N)
    live_key = (n < BLOCK) & (key_start + n < S)
    key_row = (b * S + key_start + n) * HKV + group
    MAIN: tl.constexpr = DK - TAIL
    k_ptrs = k_ptr + key_row[:, None] * DK
    k = tl.load(k_ptrs + tl.arange(0, MAIN)[None, :], mask=live_key[:, None], other=0.0)
    k_tail = k
    if TAIL > 0:
        k_tail = tl.load(k_ptrs + MAIN + tl.arange(0, TAIL)[None, :], mask=live_key[:, None], other=0.0)
    v = tl.load(v_ptr + key_row[:, None] * DV + tl.arange(0, DV)[None, :], mask=live_key[:, None], other=0.0)
    return k, k_tail, v, tl.where(live_key, key_start + n, S)


@triton.jit(do_not_specialize=["T", "S", "q_start", "pair_start", "token_start", "num_tokens", "bound"])
def selected_forward_kernel(
    q_ptr, k_ptr, v_ptr, part_ptr, part_lse_ptr, entries_ptr, item_ptr, doc_ptr, base_ptr,
    scale_log2, T, S, q_start, pair_start, token_start, num_tokens, bound,
    H: tl.constexpr, HKV: tl.constexpr, DK: tl.constexpr, TAIL: tl.constexpr, DV: tl.constexpr, BLOCK: tl.constexpr,
    RATIO: tl.constexpr, SLOTS: tl.constexpr, FREE: tl.constexpr, SHIFT: tl.constexpr, FREE_ONLY: tl.constexpr,
    PACKED: tl.constexpr, PRECISION: tl.constexpr, BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr,
):  # fmt: skip
    """Attention of an item's rows to its block, BLOCK_M rows after another.

    FREE of a token's SLOTS are attended to here, from number SHIFT on; FREE_ONLY: none is a forced block.
    """
    G: tl.constexpr = H // HKV
    MAIN: tl.constexpr = DK - TAIL
    pair = pair_start + tl.program_id(1)
    item_ptr += (tl.program_id(1).to(tl.int64) * bound + tl.program_id(0)) * 3
    block = tl.load(item_ptr)
    if block >= 0:  # the table has room for more items than there are
        first_entry = tl.load(item_ptr + 1)
        num_rows = (tl.load(item_ptr + 2) - first_entry) * G
        b = (pair // HKV).to(tl.int64)
        group = pair % HKV
        key_start = item_keys(entries_ptr, first_entry, block, doc_ptr, base_ptr, SLOTS, RATIO, BLOCK, PACKED)
        k, k_tail, v, key = load_block(k_ptr, v_ptr, b, group, key_start, S, HKV, DK, TAIL, DV, BLOCK, BLOCK_N)
        position = key - q_start
        # One 64-bit base for each tensor; offsets within the chunk fit 32 bits (see `chunk_token_bytes`).
        q_ptr += ((b * T + token_start) * H + group * G) * DK
        part_row = tl.program_id(1).to(tl.int64) * num_tokens * (FREE * G)
        part_ptr += part_row * DV
        part_lse_ptr += part_row
        entries_ptr += first_entry
        for start in tl.range(0, num_rows, BLOCK_M):
            row = tl.minimum(start + tl.arange(0, BLOCK_M), num_rows - 1)  # the last row may repeat, with its own value
            entry = tl.load(entries_ptr + row // G)
            t = entry // SLOTS
            q_row = (t - token_start) * H + row % G
            q = tl.load(q_ptr + (q_row[:, None] * DK + tl.arange(0, MAIN)[None, :]))
            s = tl.dot(q, tl.trans(k), input_precision=PRECISION)
            if TAIL > 0:
                q = tl.load(q_ptr + (q_row[:, None] * DK + MAIN + tl.arange(0, TAIL)[None, :]))
                s = tl.dot(q, tl.trans(k_tail), s, input_precision=PRECISION)
            # A free block lies before its queries. Else entries are in the order of tokens, so that only the first few
            # are of tokens within the block.
            if BLOCK < BLOCK_N:
                s = tl.where(position[None, :] <= t[:, None], s, float("-inf"))
            elif not FREE_ONLY:  # noqa: SIM102  (a compile-time condition, then one of the device)
                if tl.load(entries_ptr + start // G) // SLOTS < key_start + BLOCK - q_start:
                    s = tl.where(position[None, :] <= t[:, None], s, float("-inf"))
            row_max = tl.max(s, 1) * scale_log2
            row_max = tl.where(row_max == float("-inf"), 0.0, row_max)  # a row that sees none of the keys: p = 0
            p = tl.math.exp2(s * scale_log2 - row_max[:, None])
            row_sum = tl.sum(p, 1)
            out = tl.dot(p.to(v.dtype), v, input_precision=PRECISION)
            # A part is a mean of values, which 16 bits hold as they hold values; its weight is in the log-sum-exp.
            out = out * (1.0 / tl.where(row_sum == 0.0, 1.0, row_sum))[:, None]
            part = ((t - token_start) * FREE + entry % SLOTS - SHIFT) * G + row % G
            tl.store(part_ptr + (part[:, None] * DV + tl.arange(0, DV)[None, :]), out.to(part_ptr.dtype.element_ty))
            tl.store(part_lse_ptr + part, tl.where(row_sum == 0.0, float("-inf"), row_max + tl.math.log2(row_sum)))


@triton.jit
def _last_free_block(
    t, live, doc_ptr, q_start, BLOCK: tl.constexpr, LOCAL: tl.constexpr, PACKED: tl.constexpr, FORCED: tl.constexpr
):
    """The last block of each token that is no local one, counted from its document; beyond all if none is FORCED."""
    last_free = t * 0 + 2147483647
    if FORCED:
        start = t * 0
        if PACKED:
            start = tl.load(doc_ptr + t, mask=live, other=0)
        last_free = (t + q_start - start) // BLOCK - LOCAL
    return last_free


@triton.jit
def _slot_lse(
    part_lse_ptr, choice_ptr, part, live, last_free, G: tl.constexpr, RATIO: tl.constexpr, FREE: tl.constexpr,
    PADDED: tl.constexpr,
):  # fmt: skip
    """Log-sum-exps of the rows' parts [ROWS, PADDED], base 2; -inf where a slot has no free block."""
    slots = tl.arange(0, PADDED)[None, :]
    set_slots = live[:, None] & (slots < FREE)
    listed = tl.load(choice_ptr[:, None] + slots // RATIO, mask=set_slots, other=-1)
    set_slots = set_slots & (listed >= 0) & (listed <= last_free[:, None])
    return tl.load(part_lse_ptr + part[:, None] + slots * G, mask=set_slots, other=float("-inf"))


@triton.jit(do_not_specialize=["T", "q_start", "pair_start", "token_start", "num_tokens"])
def selected_reduce_kernel(
    part_ptr, part_lse_ptr, choice_ptr, forced_ptr, forced_lse_ptr, out_ptr, lse_ptr, cmp_ptr, win_ptr, gate_ptr,
    sum_ptr, doc_ptr, log2e, T, q_start, pair_start, token_start, num_tokens,
    H: tl.constexpr, HKV: tl.constexpr, DV: tl.constexpr, RATIO: tl.constexpr, SLOTS: tl.constexpr, FREE: tl.constexpr,
    BLOCK: tl.constexpr, INIT: tl.constexpr, LOCAL: tl.constexpr, PACKED: tl.constexpr, GATED: tl.constexpr,
    PADDED: tl.constexpr, ROWS: tl.constexpr, LN2: tl.constexpr, STAGES: tl.constexpr,
):  # fmt: skip
    """Weigh the parts of a row (token, head) by their log-sum-exps and add them: the forced blocks, then slot by slot.

    INIT and LOCAL are 0 where no block is forced apart. GATED also stores the gated sum of the branches (Eq. 5).
    """
    G: tl.constexpr = H // HKV
    FORCED: tl.constexpr = INIT + LOCAL > 0
    row = tl.program_id(0) * ROWS + tl.arange(0, ROWS)
    live = row < num_tokens * G
    pair = pair_start + tl.program_id(1)
    t = token_start + row // G
    token_row = (pair // HKV).to(tl.int64) * T + t
    out_row = token_row * H + (pair % HKV) * G + row % G
    part = (tl.program_id(1).to(tl.int64) * num_tokens + row // G) * (FREE * G) + row % G
    choice_ptr += (token_row * HKV + pair % HKV) * (SLOTS // RATIO) + INIT
    last_free = _last_free_block(t, live, doc_ptr, q_start, BLOCK, LOCAL, PACKED, FORCED)

    # All log-sum-exps first: with their maximum and sum known, the loop adds without rescaling.
    slot_lse = _slot_lse(part_lse_ptr, choice_ptr, part, live, last_free, G, RATIO, FREE, PADDED)
    row_max = tl.max(slot_lse, 1)
    forced_lse = row_max
    if FORCED:
        forced_lse = tl.load(forced_lse_ptr + out_row, mask=live, other=float("-inf")) * log2e
        row_max = tl.maximum(row_max, forced_lse)
    row_max = tl.where(row_max == float("-inf"), 0.0, row_max)  # a row without keys: all weights are 0
    row_sum = tl.sum(tl.math.exp2(slot_lse - row_max[:, None]), 1)

    acc = tl.zeros([ROWS, DV], tl.float32)
    column = tl.arange(0, DV)[None, :]
    if FORCED:
        weight = tl.math.exp2(forced_lse - row_max)
        row_sum += weight
        forced = tl.load(forced_ptr + out_row[:, None] * DV + column, mask=live[:, None], other=0.0)
        acc = forced.to(tl.float32) * weight[:, None]
    for slot in tl.range(0, FREE, num_stages=STAGES):
        # What an unused slot holds is read too, rather than wait for the choice before it.
        chosen = tl.load(choice_ptr + slot // RATIO, mask=live, other=-1)
        used = live & (chosen >= 0) & (chosen <= last_free)
        slot_part = part + slot * G
        weight = tl.math.exp2(tl.load(part_lse_ptr + slot_part, mask=live, other=0.0) - row_max)
        value = tl.load(part_ptr + slot_part[:, None] * DV + column, mask=live[:, None], other=0.0)
        acc += tl.where(used[:, None], value.to(tl.float32) * weight[:, None], 0.0)
    out = acc / tl.where(row_sum == 0.0, 1.0, row_sum)[:, None]
    offset = out_row[:, None] * DV + column
    tl.store(out_ptr + offset, out.to(out_ptr.dtype.element_ty), mask=live[:, None])
    if GATED:
        gated_sum(out, cmp_ptr, win_ptr, gate_ptr, sum_ptr, out_row, offset, live)
    lse_ptr += out_row
    tl.store(lse_ptr, tl.where(row_sum == 0.0, float("-inf"), (row_max + tl.math.log2(row_sum)) * LN2), mask=live)


def chunk_token_bytes(scratch: int, columns: int, scratch_bytes: int) -> int:
    """Scratch of a token, or more, so that a chunk's tokens of `columns` elements have offsets below 2**30."""
    return max(scratch, -(-scratch_bytes * columns // 2**30))


class Work(NamedTuple):
    """How a forward is cut, and its scratch.

    Attributes:
        inversion: entries by block.
        chunks, items: parts of the input, and the work items of each range of tokens.
        shift: slots of a token before its free ones.
        free: slots that are free; the others are forced blocks, which a dense kernel has attended to.
        part, part_lse: scratch of a chunk, see the top.
    """

    inversion: Inversion
    chunks: list[Chunk]
    items: Items
    shift: int
    free: int
    part: Tensor
    part_lse: Tensor


def select_forward(
    q: Tensor, k: Tensor, v: Tensor, block_indices: Tensor, geometry: BlockGeometry, layout: Layout | None,
    q_start: int, scale: float, stage: Stage, forced: tuple[Tensor, Tensor] | None = None, gated: Gated | None = None,
) -> tuple[Tensor, Tensor]:  # fmt: skip
    """Attention of fitting tensors over the chosen blocks.

    Args:
        forced: output and log-sum-exp of the forced blocks, which every token's list must then hold.
        gated: also write the gated sum of the branches.
    """
    out, lse = q.new_empty(*q.shape[:3], v.shape[3]), q.new_empty(q.shape[:3], dtype=torch.float32)
    if out.numel() == 0:
        return out, lse
    block_indices, free_only = block_indices.contiguous(), forced is not None
    num_forced = (geometry.num_init_blocks, geometry.num_local_blocks) if free_only else (0, 0)
    inversion = invert(block_indices, geometry, layout, k.shape[1], q_start, free_only=free_only)
    work = _cut_work(q, v, inversion, num_forced, stage)
    for chunk in work.chunks:
        if work.free and stage.is_sm90:
            scratch = (work.part, work.part_lse, inversion, work.items)
            selected_forward_sm90(q, k, v, *scratch, layout, chunk, work.shift, work.free, scale)
        elif work.free:
            _attend(q, k, v, work, chunk, layout, q_start, scale, free_only, stage.tile)
        what = (block_indices, geometry, layout, q_start, num_forced)
        _reduce(work, chunk, *what, forced or (out, lse), gated, out, lse)
    return out, lse


def _cut_work(q: Tensor, v: Tensor, inversion: Inversion, num_forced: tuple[int, int], stage: Stage) -> Work:
    """Chunks whose scratch stays within the stage's; Hopper's kernel takes short ranges of a chunk's tokens in turn."""
    (B, T, H, Dk), Dv = q.shape, v.shape[3]
    num_pairs, num_blocks, _ = inversion.ends.shape
    G, scratch_bytes = B * H // num_pairs, stage.scratch_bytes
    init, local = num_forced
    free = inversion.slots - (init + local) * inversion.ratio
    token_bytes = chunk_token_bytes(G * max(free, 1) * (Dv * q.element_size() + 4), H * Dk, scratch_bytes)
    granule = inversion.segment
    if stage.is_sm90:
        most = scratch_bytes // token_bytes
        granule = range_tokens(num_blocks, Dk * q.element_size(), G, inversion.segment, most)
    chunks = cut_chunks(num_pairs, T, token_bytes, granule, scratch_bytes)
    longest = granule if stage.is_sm90 else max(chunk.num_tokens for chunk in chunks)
    items = make_items(inversion, T, longest, max(1, ITEM_ROWS // G))
    rows = max(chunk.num_pairs * chunk.num_tokens for chunk in chunks) * G * free
    part, part_lse = q.new_empty(rows, Dv), q.new_empty(rows, dtype=torch.float32)
    return Work(inversion, chunks, items, init * inversion.ratio, free, part, part_lse)


def _attend(
    q: Tensor, k: Tensor, v: Tensor, work: Work, chunk: Chunk, layout: Layout | None, q_start: int, scale: float,
    free_only: bool, tile: Tile,
) -> None:  # fmt: skip
    """Write the parts of a chunk."""
    T, H, Dk = q.shape[1:]
    S, Hkv, Dv = k.shape[1:3] + v.shape[3:]
    inversion, bound = work.inversion, work.items.table.shape[2]
    table = work.items.table[chunk.token // work.items.range_tokens, chunk.pair : chunk.pair_end]
    selected_forward_kernel[(bound, chunk.num_pairs)](
        q, k, v, work.part, work.part_lse, inversion.entries, table,
        *document_pointers(layout, q, "doc_start", "block_base"), scale * LOG2E, T, S, q_start, chunk.pair,
        chunk.token, chunk.num_tokens, bound,
        H=H, HKV=Hkv, DK=Dk, TAIL=key_tail(Dk), DV=Dv, BLOCK=inversion.sub_block, RATIO=inversion.ratio,
        SLOTS=inversion.slots, FREE=work.free, SHIFT=work.shift, FREE_ONLY=free_only, PACKED=layout is not None,
        PRECISION=dot_precision(q), BLOCK_N=max(16, triton.next_power_of_2(inversion.sub_block)), **tile,
    )  # fmt: skip


def _reduce(
    work: Work, chunk: Chunk, block_indices: Tensor, geometry: BlockGeometry, layout: Layout | None, q_start: int,
    num_forced: tuple[int, int], forced: tuple[Tensor, Tensor], gated: Gated | None, out: Tensor, lse: Tensor,
) -> None:  # fmt: skip
    """Add the parts of a chunk's rows up; `forced` is any pair of tensors where no block is forced apart."""
    _, T, H, Dv = out.shape
    Hkv, rows = block_indices.shape[2], max(1, REDUCE_ELEMENTS // Dv)
    selected_reduce_kernel[(triton.cdiv(chunk.num_tokens * (H // Hkv), rows), chunk.num_pairs)](
        work.part, work.part_lse, block_indices, *forced, out, lse, *gate_pointers(gated, out),
        *document_pointers(layout, out, "doc_start"), LOG2E, T, q_start, chunk.pair, chunk.token, chunk.num_tokens,
        H=H, HKV=Hkv, DV=Dv, RATIO=work.inversion.ratio, SLOTS=work.inversion.slots, FREE=work.free,
        BLOCK=geometry.select_block_size, INIT=num_forced[0], LOCAL=num_forced[1], PACKED=layout is not None,
        GATED=gated is not None, PADDED=triton.next_power_of_2(max(work.free, 1)), ROWS=rows, LN2=LN2,
        STAGES=REDUCE_STAGES, num_warps=4,
    )  # fmt: skip
