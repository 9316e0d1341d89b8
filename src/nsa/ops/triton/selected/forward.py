"""Forward of the selected branch, block by block: full tiles of the rows that chose a block, then a reduction.

A program holds one block's keys and values and runs over the (token, slot) entries that chose it, BLOCK_M rows (entry,
head) at a time. Each row's softmax over the block and its log-sum-exp go to a scratch at (token, slot, head); a second
kernel weighs and adds a row's slots in order. The scratch stays under the stage's: long inputs go chunk by chunk.
The forced blocks, which whole blocks of queries share, can come from a dense kernel (`forced.py`) instead, as one more
part of the sum; then the slots that are left are the free ones.

Shapes: q `[B, T, H, Dk]`, k `[B, S, Hkv, Dk]`, v `[B, S, Hkv, Dv]`, block_indices `[B, T, Hkv, n]`; partial outputs
`[heads, tokens, free slots, G, Dv]` of a chunk, in the dtype of q; their log-sum-exps, base 2, without the last size.
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

ITEM_ROWS = 1024
REDUCE_ELEMENTS = 1024
REDUCE_STAGES = 6  # slots on their way through shared memory


@triton.jit(do_not_specialize=["T", "S", "q_start", "head_start", "token_start", "num_tokens", "bound"])
def selected_forward_kernel(
    q_ptr, k_ptr, v_ptr, part_ptr, part_lse_ptr, entries_ptr, item_ptr, doc_ptr, base_ptr,
    scale_log2, T, S, q_start, head_start, token_start, num_tokens, bound,
    H: tl.constexpr, HKV: tl.constexpr, DK: tl.constexpr, TAIL: tl.constexpr, DV: tl.constexpr, BLOCK: tl.constexpr,
    RATIO: tl.constexpr, SLOTS: tl.constexpr, FREE: tl.constexpr, SHIFT: tl.constexpr, PEELED: tl.constexpr,
    PACKED: tl.constexpr, PRECISION: tl.constexpr, BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr,
):  # fmt: skip
    G: tl.constexpr = H // HKV
    head = head_start + tl.program_id(1)
    item_ptr += (tl.program_id(1).to(tl.int64) * bound + tl.program_id(0)) * 3
    block = tl.load(item_ptr)
    if block >= 0:
        entry = tl.load(item_ptr + 1)
        num_rows = (tl.load(item_ptr + 2) - entry) * G
        b = (head // HKV).to(tl.int64)
        group = head % HKV
        key_start = item_keys(entries_ptr, entry, block, doc_ptr, base_ptr, SLOTS, RATIO, BLOCK, PACKED)
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
        position = tl.where(live_key, key_start + n, S) - q_start
        # One 64-bit base for each tensor; offsets within the chunk fit 32 bits (see `chunk_token_bytes`).
        q_ptr += ((b * T + token_start) * H + group * G) * DK
        part_row = tl.program_id(1).to(tl.int64) * num_tokens * (FREE * G)
        part_ptr += part_row * DV
        part_lse_ptr += part_row
        entries_ptr += entry
        for start in tl.range(0, num_rows, BLOCK_M):
            row = tl.minimum(start + tl.arange(0, BLOCK_M), num_rows - 1)  # the last row may repeat, with its own value
            place = tl.load(entries_ptr + row // G)
            t = place // SLOTS
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
            elif not PEELED:  # noqa: SIM102  (a compile-time condition, then one of the device)
                if tl.load(entries_ptr + start // G) // SLOTS < key_start + BLOCK - q_start:
                    s = tl.where(position[None, :] <= t[:, None], s, float("-inf"))
            best = tl.max(s, 1) * scale_log2
            best = tl.where(best == float("-inf"), 0.0, best)
            p = tl.math.exp2(s * scale_log2 - best[:, None])
            total = tl.sum(p, 1)
            out = tl.dot(p.to(v.dtype), v, input_precision=PRECISION)
            out = out * (1.0 / tl.where(total == 0.0, 1.0, total))[:, None]
            part = ((t - token_start) * FREE + place % SLOTS - SHIFT) * G + row % G
            tl.store(part_ptr + (part[:, None] * DV + tl.arange(0, DV)[None, :]), out.to(part_ptr.dtype.element_ty))
            tl.store(part_lse_ptr + part, tl.where(total == 0.0, float("-inf"), best + tl.math.log2(total)))


@triton.jit(do_not_specialize=["T", "q_start", "head_start", "token_start", "num_tokens"])
def selected_reduce_kernel(
    part_ptr, part_lse_ptr, choice_ptr, forced_ptr, forced_lse_ptr, out_ptr, lse_ptr, cmp_ptr, win_ptr, gate_ptr,
    sum_ptr, doc_ptr, log2e, T, q_start, head_start, token_start, num_tokens,
    H: tl.constexpr, HKV: tl.constexpr, DV: tl.constexpr, RATIO: tl.constexpr, SLOTS: tl.constexpr, FREE: tl.constexpr,
    BLOCK: tl.constexpr, INIT: tl.constexpr, LOCAL: tl.constexpr, PACKED: tl.constexpr, GATED: tl.constexpr,
    PADDED: tl.constexpr, ROWS: tl.constexpr, LN2: tl.constexpr, STAGES: tl.constexpr,
):  # fmt: skip
    """Weigh the parts of a row by their log-sum-exps and add them: the forced blocks, then slot by slot.

    GATED also stores the gated sum of the three branches (Eq. 5).
    """
    G: tl.constexpr = H // HKV
    PEELED: tl.constexpr = INIT + LOCAL > 0
    row = tl.program_id(0) * ROWS + tl.arange(0, ROWS)
    live = row < num_tokens * G
    head = head_start + tl.program_id(1)
    t = token_start + row // G
    token_row = (head // HKV).to(tl.int64) * T + t
    out_row = token_row * H + (head % HKV) * G + row % G
    part = (tl.program_id(1).to(tl.int64) * num_tokens + row // G) * (FREE * G) + row % G
    choice_ptr += (token_row * HKV + head % HKV) * (SLOTS // RATIO) + INIT
    last_free = t * 0 + 2147483647
    if PEELED:
        start = t * 0
        if PACKED:
            start = tl.load(doc_ptr + t, mask=live, other=0)
        last_free = (t + q_start - start) // BLOCK - LOCAL

    slots = tl.arange(0, PADDED)[None, :]
    set_slots = live[:, None] & (slots < FREE)
    listed = tl.load(choice_ptr[:, None] + slots // RATIO, mask=set_slots, other=-1)
    set_slots = set_slots & (listed >= 0) & (listed <= last_free[:, None])
    slot_lse = tl.load(part_lse_ptr + part[:, None] + slots * G, mask=set_slots, other=float("-inf"))
    best = tl.max(slot_lse, 1)
    forced_lse = best
    if PEELED:
        forced_lse = tl.load(forced_lse_ptr + out_row, mask=live, other=float("-inf")) * log2e
        best = tl.maximum(best, forced_lse)
    best = tl.where(best == float("-inf"), 0.0, best)
    total = tl.sum(tl.math.exp2(slot_lse - best[:, None]), 1)

    acc = tl.zeros([ROWS, DV], tl.float32)
    column = tl.arange(0, DV)[None, :]
    if PEELED:
        weight = tl.math.exp2(forced_lse - best)
        total += weight
        forced = tl.load(forced_ptr + out_row[:, None] * DV + column, mask=live[:, None], other=0.0)
        acc = forced.to(tl.float32) * weight[:, None]
    for slot in tl.range(0, FREE, num_stages=STAGES):
        # What an unused slot holds is read too, rather than wait for the choice before it.
        chosen = tl.load(choice_ptr + slot // RATIO, mask=live, other=-1)
        used = live & (chosen >= 0) & (chosen <= last_free)
        place = part + slot * G
        weight = tl.math.exp2(tl.load(part_lse_ptr + place, mask=live, other=0.0) - best)
        value = tl.load(part_ptr + place[:, None] * DV + column, mask=live[:, None], other=0.0)
        acc += tl.where(used[:, None], value.to(tl.float32) * weight[:, None], 0.0)
    out = acc / tl.where(total == 0.0, 1.0, total)[:, None]
    place = out_row[:, None] * DV + column
    tl.store(out_ptr + place, out.to(out_ptr.dtype.element_ty), mask=live[:, None])
    if GATED:
        gated_sum(out, cmp_ptr, win_ptr, gate_ptr, sum_ptr, out_row, place, live)
    tl.store(lse_ptr + out_row, tl.where(total == 0.0, float("-inf"), (best + tl.math.log2(total)) * LN2), mask=live)


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
    block_indices, peeled = block_indices.contiguous(), forced is not None
    num_forced = (geometry.num_init_blocks, geometry.num_local_blocks) if peeled else (0, 0)
    inversion = invert(block_indices, geometry, layout, k.shape[1], q_start, peel=peeled)
    work = _cut_work(q, v, inversion, num_forced, stage)
    for chunk in work.chunks:
        if work.free and stage.is_sm90:
            scratch = (work.part, work.part_lse, inversion, work.items)
            selected_forward_sm90(q, k, v, *scratch, layout, chunk, work.shift, work.free, scale)
        elif work.free:
            _attend(q, k, v, work, chunk, layout, q_start, scale, peeled, stage.tile)
        what = (block_indices, geometry, layout, q_start, num_forced)
        _reduce(work, chunk, *what, forced or (out, lse), gated, out, lse)
    return out, lse


def _cut_work(q: Tensor, v: Tensor, inversion: Inversion, num_forced: tuple[int, int], stage: Stage) -> Work:
    """Chunks whose scratch stays within the stage's; Hopper's kernel takes short ranges of a chunk's tokens in turn."""
    (B, T, H, Dk), Dv = q.shape, v.shape[3]
    num_heads, num_blocks, _ = inversion.ends.shape
    G, scratch_bytes = B * H // num_heads, stage.scratch_bytes
    init, local = num_forced
    free = inversion.slots - (init + local) * inversion.ratio
    token_bytes = chunk_token_bytes(G * max(free, 1) * (Dv * q.element_size() + 4), H * Dk, scratch_bytes)
    granule = inversion.segment
    if stage.is_sm90:
        most = scratch_bytes // token_bytes
        granule = range_tokens(num_blocks, Dk * q.element_size(), G, inversion.segment, most)
    chunks = cut_chunks(num_heads, T, token_bytes, granule, scratch_bytes)
    longest = granule if stage.is_sm90 else max(chunk.num_tokens for chunk in chunks)
    items = make_items(inversion, T, longest, max(1, ITEM_ROWS // G))
    rows = max(chunk.num_heads * chunk.num_tokens for chunk in chunks) * G * free
    part, part_lse = q.new_empty(rows, Dv), q.new_empty(rows, dtype=torch.float32)
    return Work(inversion, chunks, items, init * inversion.ratio, free, part, part_lse)


def _attend(
    q: Tensor, k: Tensor, v: Tensor, work: Work, chunk: Chunk, layout: Layout | None, q_start: int, scale: float,
    peeled: bool, tile: Tile,
) -> None:  # fmt: skip
    """Write the parts of a chunk."""
    T, H, Dk = q.shape[1:]
    S, Hkv, Dv = k.shape[1:3] + v.shape[3:]
    inversion, bound = work.inversion, work.items.table.shape[2]
    table = work.items.table[chunk.token // work.items.range_tokens, chunk.head : chunk.head_end]
    selected_forward_kernel[(bound, chunk.num_heads)](
        q, k, v, work.part, work.part_lse, inversion.entries, table,
        *document_pointers(layout, q, "doc_start", "block_base"), scale * LOG2E, T, S, q_start, chunk.head,
        chunk.token, chunk.num_tokens, bound,
        H=H, HKV=Hkv, DK=Dk, TAIL=key_tail(Dk), DV=Dv, BLOCK=inversion.sub_block, RATIO=inversion.ratio,
        SLOTS=inversion.slots, FREE=work.free, SHIFT=work.shift, PEELED=peeled, PACKED=layout is not None,
        PRECISION=dot_precision(q), BLOCK_N=max(16, triton.next_power_of_2(inversion.sub_block)), **tile,
    )  # fmt: skip


def _reduce(
    work: Work, chunk: Chunk, block_indices: Tensor, geometry: BlockGeometry, layout: Layout | None, q_start: int,
    num_forced: tuple[int, int], forced: tuple[Tensor, Tensor], gated: Gated | None, out: Tensor, lse: Tensor,
) -> None:  # fmt: skip
    """Add the parts of a chunk's rows up; `forced` is any pair of tensors where no block is forced apart."""
    _, T, H, Dv = out.shape
    Hkv, rows = block_indices.shape[2], max(1, REDUCE_ELEMENTS // Dv)
    selected_reduce_kernel[(triton.cdiv(chunk.num_tokens * (H // Hkv), rows), chunk.num_heads)](
        work.part, work.part_lse, block_indices, *forced, out, lse, *gate_pointers(gated, out),
        *document_pointers(layout, out, "doc_start"), LOG2E, T, q_start, chunk.head, chunk.token, chunk.num_tokens,
        H=H, HKV=Hkv, DV=Dv, RATIO=work.inversion.ratio, SLOTS=work.inversion.slots, FREE=work.free,
        BLOCK=geometry.select_block_size, INIT=num_forced[0], LOCAL=num_forced[1], PACKED=layout is not None,
        GATED=gated is not None, PADDED=triton.next_power_of_2(max(work.free, 1)), ROWS=rows, LN2=LN2,
        STAGES=REDUCE_STAGES, num_warps=4,
    )  # fmt: skip
