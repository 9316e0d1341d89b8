"""Selected and window attention of a decode step, split into items of blocks, and the sum of all branches.

A program takes one item for all heads of a group: some of the chosen blocks, or some of those that hold the window.
`decode_merge_kernel` joins the items and the splits of `compressed.py` to the branches' softmaxes and weighs them
with the gates.
"""

# Kernels are typed by Triton, not by Python.
# pyright: reportArgumentType=false, reportCallIssue=false, reportAttributeAccessIssue=false, reportReturnType=false
# pyright: reportGeneralTypeIssues=false, reportPossiblyUnboundVariable=false, reportAssignmentType=false
from __future__ import annotations

from typing import Any, NamedTuple

import triton
import triton.language as tl
from triton.language.extra.cuda import gdc_wait

from nsa.ops.triton.decode.choice import Blocks, choose_blocks
from nsa.ops.triton.decode.compressed import num_used_splits


class Pages(NamedTuple):
    """Keys and values in pages `[P, Hkv, tokens, D]`, or the window's rings `[B, Hkv, ring, D]`, and their strides."""

    k_ptr: Any
    v_ptr: Any
    k_page: Any
    k_head: Any
    v_page: Any
    v_head: Any


class ItemShape(NamedTuple):
    """Constants of an item: head sizes and their powers of two, BLOCKS of SELECT tokens, STEP keys a step.

    An output row has ITEMS parts, one an item: first those of chosen blocks, then the window's.
    """

    G: Any
    HKV: Any
    DK: Any
    DV: Any
    DK_PADDED: Any
    DV_PADDED: Any
    ROWS: Any
    BLOCKS: Any
    STEP: Any
    SELECT: Any
    ITEMS: Any
    PRECISION: Any
    STAGES: Any


@triton.jit
def step_tokens(step, number, page, SHAPE: tl.constexpr, TOGETHER: tl.constexpr, PARTS: tl.constexpr):
    """The STEP keys of a step over blocks `number` `[BLOCKS]` (-1 for none) in pages `page` `[BLOCKS]`.

    A step takes TOGETHER blocks, a block PARTS steps; one of the two is 1.
    Gives, each `[STEP]`, a key's token, its place within the block, its page, and whether there is such a key.
    """
    WITHIN: tl.constexpr = SHAPE.STEP // TOGETHER
    i = tl.arange(0, SHAPE.BLOCKS)
    # Sums with one term: a tensor in registers has no index.
    taken = i[None, :] == ((step // PARTS) * TOGETHER + tl.arange(0, TOGETHER))[:, None]
    first = tl.sum(tl.where(taken, number[None, :], 0), 1)[:, None] * SHAPE.SELECT
    held = tl.sum(tl.where(taken & (number >= 0)[None, :], 1, 0), 1)[:, None] > 0
    offset = ((step % PARTS) * WITHIN + tl.arange(0, WITHIN))[None, :]
    token = tl.reshape(first + offset, [SHAPE.STEP])
    within = tl.reshape(offset + first * 0, [SHAPE.STEP])
    exists = tl.reshape(held & (offset < SHAPE.SELECT), [SHAPE.STEP])
    token_page = tl.reshape(tl.sum(tl.where(taken, page[None, :], 0), 1)[:, None] + offset * 0, [SHAPE.STEP])
    return token, within, token_page.to(tl.int64), exists


@triton.jit
def attend_item(
    item, group, q_index, number, page, position, ring, q_ptr, pages, out_ptr, stat_ptr, scale_log2,
    SHAPE: tl.constexpr, WINDOW: tl.constexpr, RING: tl.constexpr,
):  # fmt: skip
    """Attention of one query (`q_index` in `[B * Q]`, at `position`) and group to the blocks of an item.

    `number` and `page` as in `step_tokens`, blocks that exist first. With WINDOW > 0 it sees its last WINDOW tokens
    only; with RING token p of these is entry p % ring. Writes the unscaled output, row_max and row_sum of part `item`.
    """
    # Blocks of any size, tiles of powers of two.
    PADDED: tl.constexpr = 2 ** (SHAPE.SELECT - 1).bit_length()
    TOGETHER: tl.constexpr = max(SHAPE.STEP // PADDED, 1)
    PARTS: tl.constexpr = max(PADDED // SHAPE.STEP, 1)
    count = tl.sum((number >= 0).to(tl.int32), 0)
    head, feature, value = tl.arange(0, SHAPE.ROWS), tl.arange(0, SHAPE.DK_PADDED), tl.arange(0, SHAPE.DV_PADDED)
    live = head < SHAPE.G
    q_row = q_index * (SHAPE.HKV * SHAPE.G) + group * SHAPE.G + head
    has_feature, has_value = (feature < SHAPE.DK)[None, :], (value < SHAPE.DV)[None, :]
    q = tl.load(q_ptr + q_row[:, None] * SHAPE.DK + feature[None, :], (live[:, None] & has_feature), 0.0)
    acc = tl.zeros([SHAPE.ROWS, SHAPE.DV_PADDED], tl.float32)
    row_max = tl.full([SHAPE.ROWS], -float("inf"), tl.float32)
    row_sum = tl.zeros([SHAPE.ROWS], tl.float32)
    for step in tl.range(0, tl.cdiv(count, TOGETHER) * PARTS, num_stages=SHAPE.STAGES):
        token, within, token_page, exists = step_tokens(step, number, page, SHAPE, TOGETHER, PARTS)
        seen = exists & (token <= position)
        if WINDOW > 0:
            seen &= token >= position - WINDOW + 1
            if RING:
                within = token % ring
        k_at = token_page * pages.k_page + group * pages.k_head + within * SHAPE.DK
        v_at = token_page * pages.v_page + group * pages.v_head + within * SHAPE.DV
        k = tl.load(pages.k_ptr + k_at[:, None] + feature[None, :], seen[:, None] & has_feature, 0.0)
        v = tl.load(pages.v_ptr + v_at[:, None] + value[None, :], seen[:, None] & has_value, 0.0)
        s = tl.dot(q, tl.trans(k), input_precision=SHAPE.PRECISION) * scale_log2
        s = tl.where(seen[None, :], s, -float("inf"))
        new_max = tl.maximum(row_max, tl.max(s, 1))
        safe_max = tl.where(new_max == -float("inf"), 0.0, new_max)  # no key seen yet: no -inf less -inf
        p = tl.exp2(s - safe_max[:, None])
        alpha = tl.exp2(row_max - safe_max)
        acc = acc * alpha[:, None] + tl.dot(p.to(v.dtype), v, input_precision=SHAPE.PRECISION)
        row_sum = row_sum * alpha + tl.sum(p, 1)
        row_max = new_max
    part = q_row.to(tl.int64) * SHAPE.ITEMS + item
    tl.store(out_ptr + part[:, None] * SHAPE.DV + value[None, :], acc, live[:, None] & has_value)
    tl.store(stat_ptr + part * 2, row_max, live)
    tl.store(stat_ptr + part * 2 + 1, row_sum, live)


@triton.jit
def decode_selected_kernel(
    q_ptr, k_ptr, v_ptr, table_ptr, length_ptr, index_ptr, out_ptr, stat_ptr, scale_log2, table_stride, k_page,
    k_head, v_page, v_head, Q: tl.constexpr, G: tl.constexpr, HKV: tl.constexpr, DK: tl.constexpr, DV: tl.constexpr,
    DK_PADDED: tl.constexpr, DV_PADDED: tl.constexpr, ROWS: tl.constexpr, BLOCKS: tl.constexpr, STEP: tl.constexpr,
    ITEMS: tl.constexpr, SELECT: tl.constexpr, N: tl.constexpr, PRECISION: tl.constexpr, STAGES: tl.constexpr,
    PDL: tl.constexpr,
):  # fmt: skip
    """One item of the chosen blocks, for one query and group."""
    if PDL:  # what the launch before writes is read from here on
        gdc_wait()
    item, group, q_index = tl.program_id(0), tl.program_id(1), tl.program_id(2)
    batch = q_index // Q
    position = tl.load(length_ptr + batch) - Q + q_index % Q
    entry = item * BLOCKS + tl.arange(0, BLOCKS)
    index_ptr += (q_index * HKV + group) * N
    number = tl.load(index_ptr + entry, entry < N, -1)
    # Pages are loaded before the loop, so that its copies wait for nothing.
    page = tl.load(table_ptr + batch * table_stride + number, number >= 0, 0)
    pages = Pages(k_ptr, v_ptr, k_page, k_head, v_page, v_head)
    SHAPE: tl.constexpr = ItemShape(
        G, HKV, DK, DV, DK_PADDED, DV_PADDED, ROWS, BLOCKS, STEP, SELECT, ITEMS, PRECISION, STAGES
    )
    attend_item(
        item, group, q_index, number, page, position, 1, q_ptr, pages, out_ptr, stat_ptr, scale_log2, SHAPE, 0, False
    )


@triton.jit
def decode_choice_window_kernel(
    q_ptr, k_ptr, v_ptr, table_ptr, length_ptr, score_ptr, index_ptr, out_ptr, stat_ptr, scale_log2, table_stride,
    k_page, k_head, v_page, v_head, ring, num_blocks, Q: tl.constexpr, G: tl.constexpr, HKV: tl.constexpr,
    DK: tl.constexpr, DV: tl.constexpr, DK_PADDED: tl.constexpr, DV_PADDED: tl.constexpr, ROWS: tl.constexpr,
    BLOCKS: tl.constexpr, STEP: tl.constexpr, SELECTED: tl.constexpr, ITEMS: tl.constexpr, SELECT: tl.constexpr,
    N: tl.constexpr, PRECISION: tl.constexpr, STAGES: tl.constexpr, WINDOW: tl.constexpr, RING: tl.constexpr,
    SIZE: tl.constexpr, STRIDE: tl.constexpr, PER_BLOCK: tl.constexpr, SPANS: tl.constexpr, INIT: tl.constexpr,
    LOCAL: tl.constexpr, N_PADDED: tl.constexpr, FEW: tl.constexpr, CANDIDATES: tl.constexpr, PDL: tl.constexpr,
):  # fmt: skip
    """The blocks of one query, or one item of its window, whose reads fill the memory's time meanwhile."""
    if PDL:
        gdc_wait()
    # The choice's programs come first in the grid: they wait more than they read.
    group, batch, task = tl.program_id(0), tl.program_id(1), tl.program_id(2)
    if task < Q:
        CHOICE: tl.constexpr = Blocks(SIZE, STRIDE, SELECT, PER_BLOCK, SPANS, INIT, LOCAL, N)
        choose_blocks(
            task, group, batch, length_ptr, score_ptr, index_ptr, num_blocks, CHOICE, Q, HKV, N_PADDED, FEW, CANDIDATES
        )
    else:
        item, q_index = task // Q - 1, batch * Q + task % Q
        position = tl.load(length_ptr + batch) - Q + task % Q
        oldest = tl.maximum(position - WINDOW + 1, 0)
        number = oldest // SELECT + item * BLOCKS + tl.arange(0, BLOCKS)
        number = tl.where((position >= 0) & (number <= position // SELECT) & (number < num_blocks), number, -1)
        page = number * 0 + batch  # a ring is a page of its row's own
        if not RING:
            page = tl.load(table_ptr + batch * table_stride + number, number >= 0, 0)
        pages = Pages(k_ptr, v_ptr, k_page, k_head, v_page, v_head)
        SHAPE: tl.constexpr = ItemShape(
            G, HKV, DK, DV, DK_PADDED, DV_PADDED, ROWS, BLOCKS, STEP, SELECT, ITEMS, PRECISION, STAGES
        )
        attend_item(
            SELECTED + item, group, q_index, number, page, position, ring, q_ptr, pages, out_ptr, stat_ptr,
            scale_log2, SHAPE, WINDOW, RING,
        )  # fmt: skip


@triton.jit
def merged(out_ptr, stat_ptr, row, first, end, DV: tl.constexpr, DV_PADDED: tl.constexpr, PARTS: tl.constexpr):
    """Softmax over parts [first, end) of the row that begins at part `row`, `[DV_PADDED]`; 0 if they are empty."""
    part = first + tl.arange(0, PARTS)
    exists = part < end
    row_max = tl.load(stat_ptr + (row + part) * 2, exists, -float("inf"))
    row_sum = tl.load(stat_ptr + (row + part) * 2 + 1, exists, 0.0)
    top = tl.max(row_max, 0)
    weight = tl.exp2(row_max - tl.where(top == -float("inf"), 0.0, top))
    whole = tl.sum(row_sum * weight, 0)
    value = tl.arange(0, DV_PADDED)
    at = (row + part)[:, None] * DV + value[None, :]
    x = tl.load(out_ptr + at, exists[:, None] & (value < DV)[None, :], 0.0)
    return tl.sum(x * weight[:, None], 0) / tl.where(whole > 0, whole, 1.0)


@triton.jit
def decode_merge_kernel(
    cmp_ptr, cmp_stat_ptr, part_ptr, stat_ptr, gate_ptr, length_ptr, out_ptr, Q: tl.constexpr, G: tl.constexpr,
    HKV: tl.constexpr, DV: tl.constexpr, DV_PADDED: tl.constexpr, TILE: tl.constexpr, NUM_SPLITS: tl.constexpr,
    SPLITS_PADDED: tl.constexpr, SIZE: tl.constexpr, STRIDE: tl.constexpr, PER_BLOCK: tl.constexpr,
    SELECTED: tl.constexpr, ITEMS: tl.constexpr, ITEMS_PADDED: tl.constexpr, PDL: tl.constexpr,
):  # fmt: skip
    """The output of one query head: the branches' softmaxes, weighed with its gates."""
    if PDL:
        gdc_wait()
    q_head, q_index = tl.program_id(0), tl.program_id(1)
    batch, query, group = q_index // Q, q_index % Q, q_head // G
    used = num_used_splits(tl.load(length_ptr + batch), NUM_SPLITS, TILE, SIZE, STRIDE, PER_BLOCK)
    row = q_index * (HKV * G) + q_head
    # The compressed branch orders its rows by pair, the other two by query.
    pair_row = (batch * HKV + group).to(tl.int64) * (Q * G) + query * G + q_head % G
    first_item = row.to(tl.int64) * ITEMS
    out_cmp = merged(cmp_ptr, cmp_stat_ptr, pair_row * NUM_SPLITS, 0, used, DV, DV_PADDED, SPLITS_PADDED)
    out_slc = merged(part_ptr, stat_ptr, first_item, 0, SELECTED, DV, DV_PADDED, ITEMS_PADDED)
    out_win = merged(part_ptr, stat_ptr, first_item, SELECTED, ITEMS, DV, DV_PADDED, ITEMS_PADDED)
    gate = gate_ptr + row * 3
    out = out_cmp * tl.load(gate).to(tl.float32) + out_slc * tl.load(gate + 1).to(tl.float32)
    out += out_win * tl.load(gate + 2).to(tl.float32)
    value = tl.arange(0, DV_PADDED)
    tl.store(out_ptr + row * DV + value, out, value < DV)
