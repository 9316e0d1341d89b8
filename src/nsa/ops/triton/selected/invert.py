"""From "which blocks does a token choose" to "which tokens chose a block": a counting sort on the device.

The selected branch works block by block. The choice `[B, T, Hkv, n]` becomes one list of entries, sorted by pair, block
and token, so that every later sum has one order. It is cut into items of at most `item_entries` entries of one block,
the unit of work of the attention kernels.

Blocks longer than 128 tokens are cut into `ratio` sub-blocks. Packed documents number their blocks from
`Layout.block_base`.

Legend: a pair is a batch row with a group of heads, b * Hkv + group; a slot is one place of a token's list, n * ratio
(sub-)blocks; an entry is token * slots + slot; J block numbers; segments of `segment` tokens. Counters are `[pairs, J,
segments]`: each segment is sorted by itself, its entries of a block behind those of earlier segments.
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
from nsa.ops.triton.layout import Layout, document_pointers, find_document

MAX_SUB_BLOCK = 128
MAX_SEGMENTS = 512


class Inversion(NamedTuple):
    """Sorted entries of every block.

    Attributes:
        entries: int32 `[B*Hkv*T*slots]`, one pair's after another's; those before the last end.
        ends: int32 `[B*Hkv, J, segments]`, where each block's entries of each segment of tokens end.
        segment: tokens of one segment.
        sub_block: tokens of one sub-block.
        ratio: sub-blocks of a selection block.
        slots: entries of a token at most.
    """

    entries: Tensor
    ends: Tensor
    segment: int
    sub_block: int
    ratio: int
    slots: int


class Items(NamedTuple):
    """Work items of every range of tokens.

    Attributes:
        table: int32 `[ranges, B*Hkv, bound, 3]`: block (-1 where there is no item), first entry, end of the entries.
        first: int32 `[ranges, B*Hkv, J + 1]`: the items of a block are first[j] .. first[j + 1] - 1.
        range_tokens: tokens of one range.
    """

    table: Tensor
    first: Tensor
    range_tokens: int


class ItemGradients(NamedTuple):
    """Scratch of the items of a chunk.

    Attributes:
        dk, dv: fp32 `[items * sub_block, D]`, before the scale.
        keys: int32 `[items, 2]`, the first key of each and where its keys end.
    """

    dk: Tensor
    dv: Tensor
    keys: Tensor


class Chunk(NamedTuple):
    """A part of the work that fits the scratch: pairs and tokens, from and to."""

    pair: int
    pair_end: int
    token: int
    token_end: int

    @property
    def num_pairs(self) -> int:
        return self.pair_end - self.pair

    @property
    def num_tokens(self) -> int:
        return self.token_end - self.token


def sub_block_ratio(select_block_size: int) -> int:
    """The fewest equal parts of at most MAX_SUB_BLOCK tokens."""
    parts = range(1, select_block_size + 1)
    return next(r for r in parts if select_block_size % r == 0 and select_block_size // r <= MAX_SUB_BLOCK)


@triton.jit
def is_free(
    chosen, slot, t, live, doc_ptr, q_start,
    RATIO: tl.constexpr, BLOCK: tl.constexpr, INIT: tl.constexpr, LOCAL: tl.constexpr, PACKED: tl.constexpr,
):  # fmt: skip
    """Whether a chosen block is none of the forced ones; the list is ascending, so initial blocks come first."""
    start = t * 0
    if PACKED:
        start = tl.load(doc_ptr + t, mask=live, other=0)
    own = (t + q_start - start) // BLOCK
    return (slot // RATIO >= INIT) & (chosen <= own - LOCAL)


@triton.jit
def _block_numbers(
    choice_ptr, doc_ptr, base_ptr, t, live, slot, J, q_start, SLOTS: tl.constexpr, RATIO: tl.constexpr,
    BLOCK: tl.constexpr, INIT: tl.constexpr, LOCAL: tl.constexpr, PACKED: tl.constexpr,
):  # fmt: skip
    """Numbers of the sub-blocks in the slots of tokens t, and which of them are set."""
    base = 0
    if PACKED:
        base = tl.load(base_ptr + t, mask=live, other=0)
    # Not `live & (...)`: the interpreter of Triton 3.9 refuses masks made from one scalar for all slots.
    set_slot = slot < tl.where(live, SLOTS, 0)
    chosen = tl.load(choice_ptr + slot // RATIO, mask=set_slot, other=-1)
    number = (base + chosen) * RATIO + slot % RATIO
    set_slot = set_slot & (chosen >= 0) & (number < J)
    if INIT + LOCAL > 0:
        set_slot = set_slot & is_free(chosen, slot, t, live, doc_ptr, q_start, RATIO, BLOCK, INIT, LOCAL, PACKED)
    return tl.where(set_slot, number, 0), set_slot


@triton.jit(do_not_specialize=["T", "J", "segments", "segment", "q_start"])
def count_kernel(
    choice_ptr, doc_ptr, base_ptr, counts_ptr, T, J, segments, segment, q_start,
    HKV: tl.constexpr, SLOTS: tl.constexpr, PADDED: tl.constexpr, RATIO: tl.constexpr, BLOCK: tl.constexpr,
    INIT: tl.constexpr, LOCAL: tl.constexpr, PACKED: tl.constexpr, TOKENS: tl.constexpr,
):  # fmt: skip
    """Count the entries of each block: a program takes a segment of a pair's tokens, TOKENS of them at a time."""
    start = tl.program_id(0) * segment
    pair = tl.program_id(1).to(tl.int64)
    slot = tl.arange(0, PADDED)[None, :]
    for first in range(start, tl.minimum(start + segment, T), TOKENS):
        t = (first + tl.arange(0, TOKENS))[:, None]
        row = ((pair // HKV) * T + t) * HKV + pair % HKV
        number, live = _block_numbers(
            choice_ptr + row * (SLOTS // RATIO), doc_ptr, base_ptr, t, t < tl.minimum(start + segment, T), slot, J,
            q_start, SLOTS, RATIO, BLOCK, INIT, LOCAL, PACKED,
        )  # fmt: skip
        target = counts_ptr + (pair * J + number) * segments + tl.program_id(0)
        tl.atomic_add(target, 1, mask=live, sem="relaxed")  # integers: the order does not matter


@triton.jit(do_not_specialize=["T", "J", "segments", "segment", "q_start"])
def sort_kernel(
    choice_ptr, doc_ptr, base_ptr, cursor_ptr, entries_ptr, T, J, segments, segment, q_start,
    HKV: tl.constexpr, SLOTS: tl.constexpr, PADDED: tl.constexpr, RATIO: tl.constexpr, BLOCK: tl.constexpr,
    INIT: tl.constexpr, LOCAL: tl.constexpr, PACKED: tl.constexpr,
):  # fmt: skip
    """Write a segment's entries, token after token; a token's blocks are distinct, so each slot has its own counter."""
    start = tl.program_id(0) * segment
    pair = tl.program_id(1).to(tl.int64)
    slot = tl.arange(0, PADDED)
    end = tl.minimum(start + segment, T)
    choice_ptr += (((pair // HKV) * T + start) * HKV + pair % HKV) * (SLOTS // RATIO)
    number, live = _block_numbers(
        choice_ptr, doc_ptr, base_ptr, start, start < end, slot, J, q_start, SLOTS, RATIO, BLOCK, INIT, LOCAL, PACKED
    )
    for t in range(start, end):
        # The segment's next place among the block's entries. No other program has this counter: nothing is atomic.
        cursor = cursor_ptr + (pair * J + number) * segments + tl.program_id(0)
        index = tl.load(cursor, mask=live, other=0)
        tl.store(entries_ptr + index, t * SLOTS + slot, mask=live)
        tl.store(cursor, index + 1, mask=live)
        # The next token's list is read while the stores are on their way.
        choice_ptr += HKV * (SLOTS // RATIO)
        number, live = _block_numbers(
            choice_ptr, doc_ptr, base_ptr, t + 1, t + 1 < end, slot, J, q_start, SLOTS, RATIO, BLOCK, INIT, LOCAL,
            PACKED,
        )  # fmt: skip
        tl.debug_barrier()  # the next token reads the counters


@triton.jit(do_not_specialize=["J", "segments", "item_entries", "range_segments"])
def first_item_kernel(
    ends_ptr, first_ptr, J, segments, item_entries, range_segments, BLOCKS: tl.constexpr
):  # fmt: skip
    """Number of each block's first item, among the items of a pair in a range of tokens."""
    pair = tl.program_id(0)
    segment_start = tl.program_id(1) * range_segments
    segment_end = tl.minimum(segment_start + range_segments, segments)
    ends_ptr += pair.to(tl.int64) * J * segments
    first_ptr += (tl.program_id(1).to(tl.int64) * tl.num_programs(0) + pair) * (J + 1)
    total = 0
    tl.store(first_ptr, total)
    for first in range(0, J, BLOCKS):
        j = first + tl.arange(0, BLOCKS)
        live = j < J
        row = j.to(tl.int64) * segments
        # Entries begin where those before end, of the segment before or of the block or pair before; the first at 0.
        entry = tl.load(ends_ptr + row + segment_start - 1, mask=live & (pair + row + segment_start > 0), other=0)
        end = tl.load(ends_ptr + row + segment_end - 1, mask=live, other=0)
        count = tl.where(live, tl.cdiv(end - entry, item_entries), 0)
        tl.store(first_ptr + j + 1, total + tl.cumsum(count, 0), mask=live)
        total += tl.sum(count, 0)


@triton.jit(do_not_specialize=["J", "segments", "item_entries", "range_segments", "bound", "steps"])
def item_kernel(
    ends_ptr, first_ptr, item_ptr, J, segments, item_entries, range_segments, bound, steps, BLOCK: tl.constexpr
):
    """Block, first entry and end of each item; block -1 for those beyond the last."""
    pair = tl.program_id(1)
    segment_start = tl.program_id(2) * range_segments
    segment_end = tl.minimum(segment_start + range_segments, segments)
    ends_ptr += pair.to(tl.int64) * J * segments
    first_ptr += (tl.program_id(2).to(tl.int64) * tl.num_programs(1) + pair) * (J + 1)
    item = tl.program_id(0) * BLOCK + tl.arange(0, BLOCK)
    j = find_document(first_ptr, item, J, steps)  # the last block whose items begin at or before this one
    live = j < J
    row = j.to(tl.int64) * segments
    entry = tl.load(ends_ptr + row + segment_start - 1, mask=live & (pair + row + segment_start > 0), other=0)
    entry += (item - tl.load(first_ptr + j)) * item_entries
    end = tl.load(ends_ptr + row + segment_end - 1, mask=live, other=0)
    item_ptr += ((tl.program_id(2).to(tl.int64) * tl.num_programs(1) + pair) * bound + item) * 3
    tl.store(item_ptr, tl.where(live, j, -1), mask=item < bound)
    tl.store(item_ptr + 1, entry, mask=item < bound)
    tl.store(item_ptr + 2, tl.minimum(entry + item_entries, end), mask=item < bound)


@triton.jit
def item_keys(
    entries_ptr, entry, block, doc_ptr, base_ptr,
    SLOTS: tl.constexpr, RATIO: tl.constexpr, BLOCK: tl.constexpr, PACKED: tl.constexpr,
):  # fmt: skip
    """First key of an item's (sub-)block of BLOCK tokens."""
    start = block * BLOCK
    if PACKED:  # any of its tokens knows the document: an item's block is one document's
        t = tl.load(entries_ptr + entry) // SLOTS
        start = tl.load(doc_ptr + t) + (block - tl.load(base_ptr + t) * RATIO) * BLOCK
    return start


def invert(
    block_indices: Tensor, geometry: BlockGeometry, layout: Layout | None, num_keys: int, q_start: int = 0,
    free_only: bool = False,
) -> Inversion:  # fmt: skip
    """Sorted entries from `block_indices` int32 `[B, T, Hkv, n]`, for keys 0 .. num_keys - 1.

    Args:
        q_start: position of the first token, for `free_only`.
        free_only: leave out the forced blocks, of which every token's list must then hold all.
    """
    B, T, Hkv, count = block_indices.shape
    ratio = sub_block_ratio(geometry.select_block_size)
    slots, device = count * ratio, block_indices.device
    num_blocks = geometry.num_select_blocks(num_keys) * ratio
    if layout is not None:
        num_blocks = (num_keys // geometry.select_block_size + layout.cu_seqlens.numel()) * ratio
    segment = max(128, triton.next_power_of_2(triton.cdiv(T, MAX_SEGMENTS)))
    segments = triton.cdiv(T, segment)
    counts = torch.zeros(B * Hkv, num_blocks, segments, dtype=torch.int32, device=device)
    entries = torch.empty(B * Hkv * T * slots, dtype=torch.int32, device=device)
    documents = document_pointers(layout, block_indices, "doc_start", "block_base")
    shape = {"HKV": Hkv, "SLOTS": slots, "PADDED": triton.next_power_of_2(slots), "RATIO": ratio,
             "BLOCK": geometry.select_block_size, "INIT": geometry.num_init_blocks if free_only else 0,
             "LOCAL": geometry.num_local_blocks if free_only else 0, "PACKED": layout is not None}  # fmt: skip
    sizes, grid = (T, num_blocks, segments, segment, q_start), (segments, B * Hkv)
    count_kernel[grid](block_indices, *documents, counts, *sizes, TOKENS=32, **shape)
    # Over all pairs at once: entries of one pair begin where the one before ends.
    ends = counts.flatten().cumsum(0, dtype=torch.int32).view_as(counts)
    cursor = ends.sub_(counts)  # where they begin; the sort moves each to its end
    sort_kernel[grid](block_indices, *documents, cursor, entries, *sizes, num_warps=1, **shape)
    return Inversion(entries, cursor, segment, geometry.select_block_size // ratio, ratio, slots)


def cut_chunks(num_pairs: int, num_tokens: int, token_bytes: int, granule: int, budget: int) -> list[Chunk]:
    """Chunks of whole granules of tokens whose scratch of `token_bytes` a pair and token stays within `budget`."""
    tokens = max(granule, budget // token_bytes // granule * granule)
    if tokens >= num_tokens:
        pairs = max(1, min(num_pairs, budget // (token_bytes * num_tokens)))
        return [Chunk(p, min(p + pairs, num_pairs), 0, num_tokens) for p in range(0, num_pairs, pairs)]
    starts = range(0, num_tokens, tokens)
    return [Chunk(p, p + 1, t, min(t + tokens, num_tokens)) for p in range(num_pairs) for t in starts]


def make_items(inversion: Inversion, num_tokens: int, range_tokens: int, item_entries: int) -> Items:
    """The work items of every range of `range_tokens` tokens (whole segments), all made at once."""
    pairs, num_blocks, segments = inversion.ends.shape
    device, range_segments = inversion.ends.device, triton.cdiv(range_tokens, inversion.segment)
    num_ranges = triton.cdiv(num_tokens, range_tokens)
    # Each block has at most one item that is not full; how many there are the device alone knows.
    bound = min(range_tokens, num_tokens) * inversion.slots // item_entries + num_blocks
    first = torch.empty(num_ranges, pairs, num_blocks + 1, dtype=torch.int32, device=device)
    table = torch.empty(num_ranges, pairs, bound, 3, dtype=torch.int32, device=device)
    sizes = (num_blocks, segments, item_entries, range_segments)
    first_item_kernel[(pairs, num_ranges)](inversion.ends, first, *sizes, BLOCKS=1024)
    item_kernel[(triton.cdiv(bound, 256), pairs, num_ranges)](
        inversion.ends, first, table, *sizes, bound, (num_blocks + 1).bit_length(), BLOCK=256
    )
    return Items(table, first, range_tokens)
