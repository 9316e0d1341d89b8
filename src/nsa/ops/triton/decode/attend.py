"""Selected and window attention of a decode step, split into items of blocks, and the sum of all branches.

A program takes one item for all heads of a group: some of the chosen blocks, or some of those that hold the window.
`decode_merge_kernel` joins the items and the splits of `compressed.py` to the branches' softmaxes and weighs them
with the gates.
"""

# Kernels are typed by Triton, not by Python.
# pyright: reportArgumentType=false, reportCallIssue=false, reportAttributeAccessIssue=false, reportReturnType=false
# pyright: reportGeneralTypeIssues=false, reportPossiblyUnboundVariable=false, reportAssignmentType=false
from __future__ import annotations

import triton
import triton.language as tl
from triton.language.extra.cuda import gdc_wait

from nsa.ops.triton.decode.choice import choose_blocks
from nsa.ops.triton.decode.compressed import num_compressed, split_of_blocks


@triton.jit
def attend_item(
    item, head, which, q_ptr, k_ptr, v_ptr, table_ptr, length_ptr, index_ptr, out_ptr, stat_ptr, scale_log2,
    table_stride, k_page, k_head, v_page, v_head, ring, num_blocks, IS_WINDOW: tl.constexpr, Q: tl.constexpr,
    G: tl.constexpr, HKV: tl.constexpr, DK: tl.constexpr, DV: tl.constexpr, DK_PADDED: tl.constexpr,
    DV_PADDED: tl.constexpr, ROWS: tl.constexpr, BLOCKS: tl.constexpr, STEP: tl.constexpr, SELECTED: tl.constexpr,
    ITEMS: tl.constexpr, SELECT: tl.constexpr, N: tl.constexpr, WINDOW: tl.constexpr, RING: tl.constexpr,
    PRECISION: tl.constexpr, STAGES: tl.constexpr,
):  # fmt: skip
    """BLOCKS blocks of one query and group, STEP keys at a time: of those that hold the window, or of the chosen ones.

    Item SELECTED + i is the window's i-th. With RING, the window's token p is entry p % ring of the row `k_ptr[batch]`.
    The blocks' pages are loaded before the loop, so that its copies wait for nothing.
    """
    PADDED: tl.constexpr = 2 ** (SELECT - 1).bit_length()
    WITHIN: tl.constexpr = min(STEP, PADDED)
    TOGETHER: tl.constexpr = STEP // WITHIN  # blocks a step
    PARTS: tl.constexpr = PADDED // WITHIN  # steps a block
    batch, query = which // Q, which % Q
    position = tl.load(length_ptr + batch) - Q + query
    oldest = position - WINDOW + 1
    slot = tl.arange(0, BLOCKS)
    if IS_WINDOW:
        number = tl.maximum(oldest, 0) // SELECT + item * BLOCKS + slot
        number = tl.where((position >= 0) & (number <= position // SELECT) & (number < num_blocks), number, -1)
    else:
        index_ptr += (which * HKV + head) * N
        number = tl.load(index_ptr + item * BLOCKS + slot, item * BLOCKS + slot < N, -1)
    page = slot * 0 + batch
    if not (RING and IS_WINDOW):
        page = tl.load(table_ptr + batch * table_stride + number, number >= 0, 0)
    count = tl.sum((number >= 0).to(tl.int32), 0)  # they come first
    lane, feature, value = tl.arange(0, ROWS), tl.arange(0, DK_PADDED), tl.arange(0, DV_PADDED)
    live = lane < G
    q_row = which * (HKV * G) + head * G + lane
    q = tl.load(q_ptr + q_row[:, None] * DK + feature[None, :], (live[:, None] & (feature < DK)[None, :]), 0.0)
    acc = tl.zeros([ROWS, DV_PADDED], tl.float32)
    best = tl.full([ROWS], -float("inf"), tl.float32)
    total = tl.zeros([ROWS], tl.float32)
    for step in tl.range(0, tl.cdiv(count, TOGETHER) * PARTS, num_stages=STAGES):
        mine = slot[None, :] == ((step // PARTS) * TOGETHER + tl.arange(0, TOGETHER))[:, None]
        first = tl.sum(tl.where(mine, number[None, :], 0), 1)[:, None] * SELECT
        held = tl.sum(tl.where(mine & (number >= 0)[None, :], 1, 0), 1)[:, None] > 0
        offset = ((step % PARTS) * WITHIN + tl.arange(0, WITHIN))[None, :]
        token = tl.reshape(first + offset, [STEP])
        within = tl.reshape(offset + first * 0, [STEP])
        there = tl.reshape(held & (offset < SELECT), [STEP]) & (token <= position)
        where = tl.reshape(tl.sum(tl.where(mine, page[None, :], 0), 1)[:, None] + offset * 0, [STEP]).to(tl.int64)
        if IS_WINDOW:
            there &= token >= oldest
            if RING:
                within = token % ring
        k_at = where * k_page + head * k_head + within * DK
        v_at = where * v_page + head * v_head + within * DV
        k = tl.load(k_ptr + k_at[:, None] + feature[None, :], there[:, None] & (feature < DK)[None, :], 0.0)
        v = tl.load(v_ptr + v_at[:, None] + value[None, :], there[:, None] & (value < DV)[None, :], 0.0)
        s = tl.dot(q, tl.trans(k), input_precision=PRECISION) * scale_log2
        s = tl.where(there[None, :], s, -float("inf"))
        top = tl.maximum(best, tl.max(s, 1))
        shift = tl.where(top == -float("inf"), 0.0, top)
        p = tl.exp2(s - shift[:, None])
        decay = tl.exp2(best - shift)
        acc = acc * decay[:, None] + tl.dot(p.to(v.dtype), v, input_precision=PRECISION)
        total = total * decay + tl.sum(p, 1)
        best = top
    part = q_row.to(tl.int64) * ITEMS + item
    if IS_WINDOW:
        part += SELECTED
    tl.store(out_ptr + part[:, None] * DV + value[None, :], acc, live[:, None] & (value < DV)[None, :])
    tl.store(stat_ptr + part * 2, best, live)
    tl.store(stat_ptr + part * 2 + 1, total, live)


@triton.jit
def decode_selected_kernel(
    q_ptr, k_ptr, v_ptr, table_ptr, length_ptr, index_ptr, out_ptr, stat_ptr, scale_log2, table_stride, k_page,
    k_head, v_page, v_head, Q: tl.constexpr, G: tl.constexpr, HKV: tl.constexpr, DK: tl.constexpr, DV: tl.constexpr,
    DK_PADDED: tl.constexpr, DV_PADDED: tl.constexpr, ROWS: tl.constexpr, BLOCKS: tl.constexpr, STEP: tl.constexpr,
    SELECTED: tl.constexpr, ITEMS: tl.constexpr, SELECT: tl.constexpr, N: tl.constexpr, PRECISION: tl.constexpr,
    STAGES: tl.constexpr, PDL: tl.constexpr,
):  # fmt: skip
    """One item of the chosen blocks."""
    if PDL:
        gdc_wait()
    attend_item(
        tl.program_id(0), tl.program_id(1), tl.program_id(2), q_ptr, k_ptr, v_ptr, table_ptr, length_ptr, index_ptr,
        out_ptr, stat_ptr, scale_log2, table_stride, k_page, k_head, v_page, v_head, 1, 0, False, Q, G, HKV, DK, DV,
        DK_PADDED, DV_PADDED, ROWS, BLOCKS, STEP, SELECTED, ITEMS, SELECT, N, 1, False, PRECISION, STAGES,
    )  # fmt: skip


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
    head, batch, part = tl.program_id(0), tl.program_id(1), tl.program_id(2)
    if part < Q:
        choose_blocks(
            part, head, batch, length_ptr, score_ptr, index_ptr, num_blocks, Q, HKV, SIZE, STRIDE, SELECT, PER_BLOCK,
            SPANS, INIT, LOCAL, N, N_PADDED, FEW, CANDIDATES,
        )  # fmt: skip
    else:
        attend_item(
            part // Q - 1, head, batch * Q + part % Q, q_ptr, k_ptr, v_ptr, table_ptr, length_ptr, index_ptr, out_ptr,
            stat_ptr, scale_log2, table_stride, k_page, k_head, v_page, v_head, ring, num_blocks, True, Q, G, HKV, DK,
            DV, DK_PADDED, DV_PADDED, ROWS, BLOCKS, STEP, SELECTED, ITEMS, SELECT, N, WINDOW, RING, PRECISION, STAGES,
        )  # fmt: skip


@triton.jit
def merged(out_ptr, stat_ptr, place, first, end, DV: tl.constexpr, DV_PADDED: tl.constexpr, PARTS: tl.constexpr):
    """Parts [first, end) of one row `place`, a softmax together; 0 where they hold nothing."""
    part = first + tl.arange(0, PARTS)
    there = part < end
    best = tl.load(stat_ptr + (place + part) * 2, there, -float("inf"))
    total = tl.load(stat_ptr + (place + part) * 2 + 1, there, 0.0)
    top = tl.max(best, 0)
    weight = tl.exp2(best - tl.where(top == -float("inf"), 0.0, top))
    whole = tl.sum(total * weight, 0)
    value = tl.arange(0, DV_PADDED)
    at = (place + part)[:, None] * DV + value[None, :]
    x = tl.load(out_ptr + at, there[:, None] & (value < DV)[None, :], 0.0)
    return tl.sum(x * weight[:, None], 0) / tl.where(whole > 0, whole, 1.0)


@triton.jit
def decode_merge_kernel(
    cmp_ptr, cmp_stat_ptr, part_ptr, stat_ptr, gate_ptr, length_ptr, out_ptr, Q: tl.constexpr, G: tl.constexpr,
    HKV: tl.constexpr, DV: tl.constexpr, DV_PADDED: tl.constexpr, TILE: tl.constexpr, NUM_SPLITS: tl.constexpr,
    SPLITS_PADDED: tl.constexpr, SIZE: tl.constexpr, STRIDE: tl.constexpr, PER_BLOCK: tl.constexpr,
    SELECTED: tl.constexpr, ITEMS: tl.constexpr, ITEMS_PADDED: tl.constexpr, PDL: tl.constexpr,
):  # fmt: skip
    """The output of one query head."""
    if PDL:
        gdc_wait()
    q_head, which = tl.program_id(0), tl.program_id(1)
    batch, query, head = which // Q, which % Q, q_head // G
    length = tl.load(length_ptr + batch)
    first, end = split_of_blocks(length, 0, NUM_SPLITS, TILE, SIZE, STRIDE, PER_BLOCK)
    last = tl.cdiv(num_compressed(length, SIZE, STRIDE), PER_BLOCK)
    used = tl.cdiv(last, tl.maximum(end - first, 1))
    row = which * (HKV * G) + q_head
    unit = ((batch * HKV + head).to(tl.int64) * (Q * G) + query * G + q_head % G) * NUM_SPLITS
    place = row.to(tl.int64) * ITEMS
    out_cmp = merged(cmp_ptr, cmp_stat_ptr, unit, 0, used, DV, DV_PADDED, SPLITS_PADDED)
    out_slc = merged(part_ptr, stat_ptr, place, 0, SELECTED, DV, DV_PADDED, ITEMS_PADDED)
    out_win = merged(part_ptr, stat_ptr, place, SELECTED, ITEMS, DV, DV_PADDED, ITEMS_PADDED)
    gate = gate_ptr + row * 3
    out = out_cmp * tl.load(gate).to(tl.float32) + out_slc * tl.load(gate + 1).to(tl.float32)
    out += out_win * tl.load(gate + 2).to(tl.float32)
    value = tl.arange(0, DV_PADDED)
    tl.store(out_ptr + row * DV + value, out, value < DV)
