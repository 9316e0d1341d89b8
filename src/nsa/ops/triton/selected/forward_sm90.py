"""Forward of the selected branch's free blocks on Hopper, in Gluon: the next tile's rows arrive under the present one.

Items and scratch are those of `forward.py`. Queries have one place, so that four programs fit a multiprocessor: the
next tile's are ordered as soon as the present one's scores are there. Lanes exchange results, so that each stores eight
columns that lie together.

Shapes are those of `forward.py`; blocks of 64 tokens, before all tokens that chose them (`forced` holds the others),
so that nothing is masked.
"""

# Kernels are typed by Triton, not by Python.
# pyright: reportArgumentType=false, reportCallIssue=false, reportAttributeAccessIssue=false, reportReturnType=false
# pyright: reportGeneralTypeIssues=false, reportPossiblyUnboundVariable=false
# pyright: reportAssignmentType=false, reportOperatorIssue=false
# Lists in kernels are added, not unpacked.
# ruff: noqa: RUF005
from __future__ import annotations

import triton
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

from nsa.ops.triton.gpu import LOG2E
from nsa.ops.triton.layout import Layout, document_pointers
from nsa.ops.triton.selected.invert import Chunk, Inversion, Items, item_keys
from nsa.ops.triton.selected.panels_sm90 import (
    BLOCK,
    ROWS,
    WIDTH,
    copy_entries,
    copy_panels,
    describe_panels,
    make_panels,
    rows_of_tile,
)
from nsa.ops.triton.sm90 import make_barriers

# A range of tokens has so many rows for each block there is, and so many bytes of a group's queries at least. Long ones
# leave L2 before the next block reads them, short ones make items of few rows.
RANGE_ROWS, RANGE_BYTES = 32, 2**22


def range_tokens(num_blocks: int, row_bytes: int, group_size: int, segment: int, most: int) -> int:
    """Tokens of a range: whole segments, but at most `most` tokens or one segment."""
    rows = max(num_blocks * RANGE_ROWS, RANGE_BYTES // row_bytes)
    return max(min(rows // group_size, most) // segment, 1) * segment


@gluon.jit(do_not_specialize=["T", "head_start", "token_start", "num_tokens", "num_heads", "bound"])
def selected_forward_sm90_kernel(
    q_ptr, k_desc, v_desc, part_ptr, part_lse_ptr, entries_ptr, item_ptr, doc_ptr, base_ptr, scale_log2, T, head_start,
    token_start, num_tokens, num_heads, bound,
    G: gl.constexpr, HKV: gl.constexpr, DK: gl.constexpr, DV: gl.constexpr, RATIO: gl.constexpr, SLOTS: gl.constexpr,
    FREE: gl.constexpr, SHIFT: gl.constexpr, PACKED: gl.constexpr,
):  # fmt: skip
    H: gl.constexpr = G * HKV
    PANELS: gl.constexpr = DK // WIDTH
    PANEL: gl.constexpr = gl.NVMMADistributedLayout([3, 0], [4, 1], [16, WIDTH, 16])
    ROW: gl.constexpr = gl.SliceLayout(1, PANEL)
    LAYOUT: gl.constexpr = gl.BlockedLayout([1, 8], [4, 8], [4, 1], [1, 0])
    # PANEL with columns exchanged among four lanes: each has eight that lie together, in the same two rows.
    OUT: gl.constexpr = gl.DistributedLinearLayout(
        [[0, 1], [0, 2], [0, 4], [8, 0], [0, 32]], [[0, 8], [0, 16], [1, 0], [2, 0], [4, 0]], [[16, 0], [32, 0]], [],
        [64, 64],
    )  # fmt: skip
    LINE: gl.constexpr = gl.BlockedLayout([1], [32], [4], [0])
    dtype: gl.constexpr = k_desc.dtype
    line: gl.constexpr = gl.SwizzledSharedLayout(1, 1, 1, order=[0])
    k_smem = gl.allocate_shared_memory(dtype, [PANELS] + k_desc.block_shape, k_desc.layout)
    v_smem = gl.allocate_shared_memory(dtype, [DV // WIDTH] + v_desc.block_shape, v_desc.layout)
    q_smem = make_panels(dtype, ROWS, PANELS, 1)
    entry_smem = gl.allocate_shared_memory(gl.int32, [4, ROWS], line)
    k_full = make_barriers(1, 1)
    fence_async_shared()

    # All items of a range of tokens before those of the next one, so that its queries stay in L2.
    unit = gl.program_id(2).to(gl.int64) * num_heads + head_start + gl.program_id(1)
    item_ptr += (unit * bound + gl.program_id(0)) * 3
    block = gl.load(item_ptr)
    if block >= 0:
        entry = gl.load(item_ptr + 1)
        num_rows = (gl.load(item_ptr + 2) - entry) * G
        head = head_start + gl.program_id(1)
        b = head // HKV
        group = head % HKV
        key_start = item_keys(entries_ptr, entry, block, doc_ptr, base_ptr, SLOTS, RATIO, BLOCK, PACKED)
        mbarrier.expect(k_full.index(0), 2 * BLOCK * (DK + DV))
        for panel in gl.static_range(PANELS):
            box = [b, key_start, group, panel * WIDTH]
            tma.async_copy_global_to_shared(k_desc, box, k_full.index(0), k_smem.index(panel))
        for panel in gl.static_range(DV // WIDTH):
            box = [b, key_start, group, panel * WIDTH]
            tma.async_copy_global_to_shared(v_desc, box, k_full.index(0), v_smem.index(panel))

        # One 64-bit base for each tensor; offsets within the chunk fit 32 bits (see `chunk_token_bytes`).
        q_ptr += ((b.to(gl.int64) * T + token_start) * H + group * G) * DK
        part_row = gl.program_id(1).to(gl.int64) * num_tokens * (FREE * G)
        part_ptr += part_row * DV
        part_lse_ptr += part_row
        entries_ptr += entry
        first_place = token_start * SLOTS
        copy_entries(entries_ptr, entry_smem.index(0), 0, num_rows, G, LINE)
        copy_entries(entries_ptr, entry_smem.index(1), ROWS, num_rows, G, LINE)
        async_copy.commit_group()
        async_copy.wait_group(0)
        copy_panels(q_ptr, q_smem, 0, entry_smem.index(0), first_place, 0, num_rows, G, H, DK, SLOTS, LAYOUT)
        async_copy.commit_group()
        none = gl.zeros([ROWS, BLOCK], gl.float32, PANEL)
        mbarrier.wait(k_full.index(0), 0)
        for start in range(0, num_rows, ROWS):
            step = start // ROWS
            async_copy.wait_group(0)
            fence_async_shared()  # rows were written by threads, the products read them as TMA does
            s = none
            for panel in gl.static_range(PANELS):
                k = k_smem.index(panel).reshape([BLOCK, WIDTH])
                s = warpgroup_mma(q_smem[panel].index(0), k.permute([1, 0]), s, use_acc=panel > 0, is_async=True)
            # The last row may repeat, with its own values.
            place = (entry_smem.index(step % 4).load(ROW) - first_place).to(gl.uint32)
            row = (place // SLOTS * FREE + place % SLOTS - SHIFT) * G + rows_of_tile(start, num_rows, ROWS, ROW) % G
            row = row.to(gl.int32)
            s = warpgroup_mma_wait(0, deps=[s])
            if start + ROWS < num_rows:
                low = start + ROWS
                what = entry_smem.index((step + 1) % 4)
                copy_panels(q_ptr, q_smem, 0, what, first_place, low, num_rows, G, H, DK, SLOTS, LAYOUT)
                copy_entries(entries_ptr, entry_smem.index((step + 2) % 4), low + ROWS, num_rows, G, LINE)
            async_copy.commit_group()

            best = gl.max(s, 1) * scale_log2
            p = gl.exp2(s * scale_log2 - best[:, None])
            total = gl.sum(p, 1)
            share = (1.0 / total)[:, None]
            operand = gl.convert_layout(p.to(dtype), gl.DotOperandLayout(0, PANEL, 2))
            gl.store(part_lse_ptr + row, best + gl.log2(total))
            target = gl.convert_layout(row, gl.SliceLayout(1, OUT), assert_trivial=True)[:, None] * DV
            target += gl.arange(0, WIDTH, gl.SliceLayout(0, OUT))[None, :]
            for panel in gl.static_range(DV // WIDTH):
                v = v_smem.index(panel).reshape([BLOCK, WIDTH])
                out = warpgroup_mma(operand, v, none, use_acc=False, is_async=True)
                out = warpgroup_mma_wait(0, deps=[out])
                gl.store(part_ptr + panel * WIDTH + target, gl.convert_layout((out * share).to(dtype), OUT))
    mbarrier.invalidate(k_full.index(0))  # not before, or the compiler gives its place to something else


def selected_forward_sm90(
    q: Tensor, k: Tensor, v: Tensor, part: Tensor, part_lse: Tensor, inversion: Inversion, items: Items,
    layout: Layout | None, chunk: Chunk, shift: int, free: int, scale: float,
) -> None:  # fmt: skip
    """Write what `selected_forward_kernel` gives for a chunk of whole ranges and tensors that the kernel serves.

    Args:
        shift: slots of a token before its free ones.
        free: slots that are free.
    """
    B, T, H, Dk = q.shape
    Hkv, bound, tokens = k.shape[2], items.table.shape[2], chunk.token_end - chunk.token
    table = items.table[chunk.token // items.range_tokens :]
    grid = (bound, chunk.head_end - chunk.head, triton.cdiv(tokens, items.range_tokens))
    selected_forward_sm90_kernel[grid](
        q, describe_panels(k), describe_panels(v), part, part_lse, inversion.entries, table,
        *document_pointers(layout, q, "doc_start", "block_base"), scale * LOG2E, T, chunk.head, chunk.token, tokens,
        B * Hkv, bound,
        G=H // Hkv, HKV=Hkv, DK=Dk, DV=v.shape[3], RATIO=inversion.ratio, SLOTS=inversion.slots, FREE=free, SHIFT=shift,
        PACKED=layout is not None, num_warps=4,
    )  # fmt: skip
