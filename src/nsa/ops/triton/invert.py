"""From "which blocks does a token choose" to "which tokens chose a block": a counting sort on the device.

The selected branch works block by block. The choice `[B, T, Hkv, n]` becomes, for each batch row and group, one list of
entries (token * slots + slot) sorted by block and, within a block, by token, so that every later sum has one order. The
lists are cut into items of at most `item_entries` entries of one block, the unit of work of the attention kernels.

Blocks longer than 128 tokens are cut into `ratio` sub-blocks, each a slot of its own. Packed documents number their
blocks from `Layout.block_base`. Legend: slots = n * ratio, J block numbers, segments of `segment` tokens.
"""

from __future__ import annotations

from typing import NamedTuple

import torch
import triton
import triton.language as tl
from torch import Tensor

from nsa.geometry import BlockGeometry
from nsa.ops.triton.common import Layout

MAX_SUB_BLOCK = 128
MAX_SEGMENTS = 512


class Inversion(NamedTuple):
    """Sorted entries of every block.

    Attributes:
        entries: int32 `[B*Hkv, T*slots]`, token * slots + slot; only those before the last end are set.
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
    """Work items of the tokens of one chunk: int32 `[heads, bound]` each, block -1 where there is none.

    `first` is int32 `[heads, J + 1]`: the items of a block are first[j] .. first[j + 1] - 1.
    """

    block: Tensor
    entry: Tensor
    end: Tensor
    first: Tensor


class Chunk(NamedTuple):
    """A part of the work that fits the scratch: (batch row, group) pairs and tokens, from and to."""

    head: int
    head_end: int
    token: int
    token_end: int


def sub_block_ratio(select_block_size: int) -> int:
    """The fewest equal parts of at most MAX_SUB_BLOCK tokens."""
    parts = range(1, select_block_size + 1)
    return next(r for r in parts if select_block_size % r == 0 and select_block_size // r <= MAX_SUB_BLOCK)


@triton.jit
def _block_numbers(
    choice_ptr, base_ptr, t, live, slot, J, SLOTS: tl.constexpr, RATIO: tl.constexpr, PACKED: tl.constexpr
):
    """Numbers of the sub-blocks in the slots of tokens t, and which of them are set."""
    base = 0
    if PACKED:
        base = tl.load(base_ptr + t, mask=live, other=0)
    live = live & (slot < SLOTS)
    chosen = tl.load(choice_ptr + slot // RATIO, mask=live, other=-1)
    number = (base + chosen) * RATIO + slot % RATIO
    live = live & (chosen >= 0) & (number < J)
    return tl.where(live, number, 0), live


@triton.jit(do_not_specialize=["T", "J", "segments", "segment"])
def count_kernel(
    choice_ptr, base_ptr, counts_ptr, T, J, segments, segment,
    HKV: tl.constexpr, SLOTS: tl.constexpr, PADDED: tl.constexpr, RATIO: tl.constexpr, PACKED: tl.constexpr,
    TOKENS: tl.constexpr,
):  # fmt: skip
    start = tl.program_id(0) * segment
    head = tl.program_id(1).to(tl.int64)
    slot = tl.arange(0, PADDED)[None, :]
    for first in range(start, tl.minimum(start + segment, T), TOKENS):
        t = (first + tl.arange(0, TOKENS))[:, None]
        row = ((head // HKV) * T + t) * HKV + head % HKV
        number, live = _block_numbers(
            choice_ptr + row * (SLOTS // RATIO), base_ptr, t, t < tl.minimum(start + segment, T), slot, J,
            SLOTS, RATIO, PACKED,
        )  # fmt: skip
        live = live & (slot < SLOTS)
        target = counts_ptr + (head * J + number) * segments + tl.program_id(0)
        tl.atomic_add(target, 1, mask=live, sem="relaxed")  # integers: the order does not matter


@triton.jit(do_not_specialize=["T", "J", "segments", "segment"])
def sort_kernel(
    choice_ptr, base_ptr, cursor_ptr, entries_ptr, T, J, segments, segment,
    HKV: tl.constexpr, SLOTS: tl.constexpr, PADDED: tl.constexpr, RATIO: tl.constexpr, PACKED: tl.constexpr,
):  # fmt: skip
    """Write the entries token after token; a token's blocks are distinct, so its slots never meet in one counter."""
    start = tl.program_id(0) * segment
    head = tl.program_id(1).to(tl.int64)
    slot = tl.arange(0, PADDED)
    for t in range(start, tl.minimum(start + segment, T)):
        row = ((head // HKV) * T + t) * HKV + head % HKV
        number, live = _block_numbers(
            choice_ptr + row * (SLOTS // RATIO), base_ptr, t, t < T, slot, J, SLOTS, RATIO, PACKED
        )
        cursor = cursor_ptr + (head * J + number) * segments + tl.program_id(0)
        place = tl.load(cursor, mask=live, other=0)
        tl.store(entries_ptr + head * T * SLOTS + place, t * SLOTS + slot, mask=live)
        tl.store(cursor, place + 1, mask=live)
        tl.debug_barrier()  # the next token reads the counters


@triton.jit(do_not_specialize=["J", "segments", "head_start", "segment_start", "segment_end", "item_entries", "bound"])
def plan_kernel(
    ends_ptr, block_ptr, entry_ptr, end_ptr, first_ptr, J, segments, head_start, segment_start, segment_end,
    item_entries, bound, BLOCKS: tl.constexpr,
):  # fmt: skip
    """Cut each block's entries of segments segment_start .. segment_end - 1 into items."""
    head = tl.program_id(0)
    ends_ptr += (head_start + head).to(tl.int64) * J * segments
    total = 0
    tl.store(first_ptr + head * (J + 1), total)
    for first in range(0, J, BLOCKS):
        j = first + tl.arange(0, BLOCKS)
        live = j < J
        row = j.to(tl.int64) * segments
        begins = live & (row + segment_start > 0)
        entry = tl.load(ends_ptr + row + segment_start - 1, mask=begins, other=0)
        end = tl.load(ends_ptr + row + segment_end - 1, mask=live, other=0)
        count = tl.where(live, tl.cdiv(end - entry, item_entries), 0)
        place = total + tl.cumsum(count, 0)
        tl.store(first_ptr + head * (J + 1) + j + 1, place, mask=live)
        place += head * bound - count
        for i in range(tl.max(count, 0)):
            item = live & (i < count)
            tl.store(block_ptr + place + i, j, mask=item)
            tl.store(entry_ptr + place + i, entry + i * item_entries, mask=item)
            tl.store(end_ptr + place + i, tl.minimum(entry + (i + 1) * item_entries, end), mask=item)
        total += tl.sum(count, 0)


def invert(block_indices: Tensor, geometry: BlockGeometry, layout: Layout | None, num_keys: int) -> Inversion:
    """Sorted entries from `block_indices` int32 `[B, T, Hkv, n]`, for keys 0 .. num_keys - 1."""
    B, T, Hkv, count = block_indices.shape
    ratio = sub_block_ratio(geometry.select_block_size)
    slots, device = count * ratio, block_indices.device
    num_blocks = geometry.num_select_blocks(num_keys) * ratio
    if layout is not None:
        num_blocks = (num_keys // geometry.select_block_size + layout.cu_seqlens.numel()) * ratio
    segment = max(128, triton.next_power_of_2(triton.cdiv(T, MAX_SEGMENTS)))
    segments = triton.cdiv(T, segment)
    counts = torch.zeros(B * Hkv, num_blocks, segments, dtype=torch.int32, device=device)
    entries = torch.empty(B * Hkv, T * slots, dtype=torch.int32, device=device)
    base = block_indices if layout is None else layout.block_base
    shape = {"HKV": Hkv, "SLOTS": slots, "PADDED": triton.next_power_of_2(slots), "RATIO": ratio,
             "PACKED": layout is not None}  # fmt: skip
    sizes, grid = (T, num_blocks, segments, segment), (segments, B * Hkv)
    count_kernel[grid](block_indices, base, counts, *sizes, TOKENS=32, **shape)
    ends = counts.flatten(1).cumsum(1, dtype=torch.int32).view_as(counts)
    cursor = ends.sub_(counts)
    sort_kernel[grid](block_indices, base, cursor, entries, *sizes, num_warps=1, **shape)
    return Inversion(entries, cursor, segment, geometry.select_block_size // ratio, ratio, slots)


def cut_chunks(num_heads: int, num_tokens: int, token_bytes: int, segment: int, budget: int) -> list[Chunk]:
    """Chunks whose scratch of `token_bytes` for each head and token stays within `budget` where a segment does."""
    tokens = max(segment, budget // token_bytes // segment * segment)
    if tokens >= num_tokens:
        heads = max(1, min(num_heads, budget // (token_bytes * num_tokens)))
        return [Chunk(h, min(h + heads, num_heads), 0, num_tokens) for h in range(0, num_heads, heads)]
    starts = range(0, num_tokens, tokens)
    return [Chunk(h, h + 1, t, min(t + tokens, num_tokens)) for h in range(num_heads) for t in starts]


def plan(inversion: Inversion, chunk: Chunk, item_entries: int) -> Items:
    """The work items of a chunk."""
    heads, num_blocks, segments = chunk.head_end - chunk.head, *inversion.ends.shape[1:]
    bound = num_items(inversion, chunk, item_entries)
    device = inversion.ends.device
    block = torch.full((heads, bound), -1, dtype=torch.int32, device=device)
    entry, end = torch.empty_like(block), torch.empty_like(block)
    first = torch.empty(heads, num_blocks + 1, dtype=torch.int32, device=device)
    segment = inversion.segment
    plan_kernel[(heads,)](
        inversion.ends, block, entry, end, first, num_blocks, segments, chunk.head, chunk.token // segment,
        triton.cdiv(chunk.token_end, segment), item_entries, bound, BLOCKS=1024,
    )  # fmt: skip
    return Items(block, entry, end, first)


def num_items(inversion: Inversion, chunk: Chunk, item_entries: int) -> int:
    """The most items that one head of a chunk can have."""
    tokens = chunk.token_end - chunk.token
    return tokens * inversion.slots // item_entries + inversion.ends.shape[1]
