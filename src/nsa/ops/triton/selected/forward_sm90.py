"""Forward of the selected branch's free blocks on Hopper, in Gluon: the next tile's rows arrive under the present one.

Items and scratch are those of `forward.py`. Queries have one buffer, so that four programs fit a multiprocessor: the
next tile's are ordered as soon as the present one's scores are there. Lanes exchange results, so that each stores eight
columns that lie together.

Shapes are those of `forward.py`; blocks of 64 tokens, before all tokens that chose them (`forced` holds the others),
so that nothing is masked.
"""

# Kernels are typed by Triton, not by Python.
# pyright: reportArgumentType=false, reportCallIssue=false, reportAttributeAccessIssue=false, reportReturnType=false
# pyright: reportGeneralTypeIssues=false, reportPossiblyUnboundVariable=false
# pyright: reportAssignmentType=false, reportOperatorIssue=false

import triton
from torch import Tensor
from triton.experimental import gluon
from triton.experimental.gluon import language as gl
from triton.experimental.gluon.language.nvidia.ampere import async_copy
from triton.experimental.gluon.language.nvidia.hopper import fence_async_shared, warpgroup_mma, warpgroup_mma_wait

from nsa.ops.triton.gpu import LOG2E
from nsa.ops.triton.layout import Layout, document_pointers
from nsa.ops.triton.selected.invert import Chunk, Inversion, Items, item_keys
from nsa.ops.triton.selected.panels_sm90 import (
    BLOCK,
    ENTRY_TILES,
    PANEL,
    ROWS,
    WIDTH,
    Item,
    describe_panels,
    make_block,
    make_lines,
    make_panels,
)

# A range of tokens has so many rows for each block there is, and so many bytes of a group's queries at least. Long ones
# leave L2 before the next block reads them, short ones make items of few rows.
RANGE_ROWS, RANGE_BYTES = 32, 2**22


def range_tokens(num_blocks: int, row_bytes: int, group_size: int, segment: int, most: int) -> int:
    """Tokens of a range: whole segments, but at most `most` tokens or one segment."""
    rows = max(num_blocks * RANGE_ROWS, RANGE_BYTES // row_bytes)
    return max(min(rows // group_size, most) // segment, 1) * segment


# PANEL with columns exchanged among four lanes: each has eight that lie together, in the same two rows.
OUT = gl.constexpr(
    gl.DistributedLinearLayout(
        [[0, 1], [0, 2], [0, 4], [8, 0], [0, 32]], [[0, 8], [0, 16], [1, 0], [2, 0], [4, 0]], [[16, 0], [32, 0]], [],
        [64, 64],
    )
)  # fmt: skip
ROW = gl.constexpr(gl.SliceLayout(1, PANEL.value))  # one number a row of scores


@gluon.jit
def _part_rows(item, entries, start, FREE: gl.constexpr, SHIFT: gl.constexpr):
    """Where a tile's rows go in the scratch `[tokens, FREE, G]`. The last row may repeat, with its own values."""
    entry = item.local_entries(entries, ROW)
    free = entry // item.SLOTS * FREE + entry % item.SLOTS - SHIFT
    return (free * item.G + item.rows(start, ROWS, ROW) % item.G).to(gl.int32)


@gluon.jit
def _begin_scores(q_tiles, block, none):
    """Begin the products of a tile's queries with the block's keys."""
    s = none
    for panel in gl.static_range(block.PANELS):
        k = block.keys(panel)
        s = warpgroup_mma(q_tiles[panel].index(0), k.permute([1, 0]), s, use_acc=panel > 0, is_async=True)
    return s


@gluon.jit
def _attend(s, block, part_ptr, part_lse_ptr, row, scale_log2):
    """Write the attention of a tile's rows to the block, and its log-sum-exps in base 2."""
    dtype: gl.constexpr = block.v.dtype
    row_max = gl.max(s, 1) * scale_log2
    p = gl.exp2(s * scale_log2 - row_max[:, None])
    row_sum = gl.sum(p, 1)
    share = (1.0 / row_sum)[:, None]
    operand = gl.convert_layout(p.to(dtype), gl.DotOperandLayout(0, PANEL, 2))
    gl.store(part_lse_ptr + row, row_max + gl.log2(row_sum))
    target = gl.convert_layout(row, gl.SliceLayout(1, OUT), assert_trivial=True)[:, None]
    target = target * (block.VALUE_PANELS * WIDTH) + gl.arange(0, WIDTH, gl.SliceLayout(0, OUT))[None, :]
    none = gl.zeros([ROWS, WIDTH], gl.float32, PANEL)
    for panel in gl.static_range(block.VALUE_PANELS):
        out = warpgroup_mma(operand, block.values(panel), none, use_acc=False, is_async=True)
        out = warpgroup_mma_wait(0, deps=[out])
        gl.store(part_ptr + panel * WIDTH + target, gl.convert_layout((out * share).to(dtype), OUT))


@gluon.jit(do_not_specialize=["T", "pair_start", "token_start", "num_tokens", "num_pairs", "bound"])
def selected_forward_sm90_kernel(
    q_ptr, k_desc, v_desc, part_ptr, part_lse_ptr, entries_ptr, item_ptr, doc_ptr, base_ptr, scale_log2, T, pair_start,
    token_start, num_tokens, num_pairs, bound,
    G: gl.constexpr, HKV: gl.constexpr, DK: gl.constexpr, DV: gl.constexpr, RATIO: gl.constexpr, SLOTS: gl.constexpr,
    FREE: gl.constexpr, SHIFT: gl.constexpr, PACKED: gl.constexpr,
):  # fmt: skip
    """Attention of an item's rows to its block, a tile of rows after another."""
    H: gl.constexpr = G * HKV
    block = make_block(k_desc, v_desc, DK, DV)
    q_smem = make_panels(k_desc.dtype, ROWS, block.PANELS, 1)
    entry_smem = make_lines(gl.int32, ROWS, ENTRY_TILES)
    fence_async_shared()  # TMA sees the barrier

    # All items of a range of tokens before those of the next one, so that its queries stay in L2.
    unit = gl.program_id(2).to(gl.int64) * num_pairs + pair_start + gl.program_id(1)
    item_ptr += (unit * bound + gl.program_id(0)) * 3
    number = gl.load(item_ptr)
    if number >= 0:
        entry = gl.load(item_ptr + 1)
        num_rows = (gl.load(item_ptr + 2) - entry) * G
        pair = pair_start + gl.program_id(1)
        b = pair // HKV
        group = pair % HKV
        key_start = item_keys(entries_ptr, entry, number, doc_ptr, base_ptr, SLOTS, RATIO, BLOCK, PACKED)
        block.load(k_desc, v_desc, b, key_start, group)

        # One 64-bit base for each tensor; offsets within the chunk fit 32 bits (see `chunk_token_bytes`).
        q_ptr += ((b.to(gl.int64) * T + token_start) * H + group * G) * DK
        part_row = gl.program_id(1).to(gl.int64) * num_tokens * (FREE * G)
        part_ptr += part_row * DV
        part_lse_ptr += part_row
        item = Item(entries_ptr + entry, num_rows, token_start * SLOTS, G, H, SLOTS)
        item.copy_entries(entry_smem.index(0), 0)
        item.copy_entries(entry_smem.index(1), ROWS)
        async_copy.commit_group()
        async_copy.wait_group(0)
        item.copy_panels(q_ptr, q_smem, 0, entry_smem.index(0), 0)
        async_copy.commit_group()
        none = gl.zeros([ROWS, BLOCK], gl.float32, PANEL)
        block.wait()  # until TMA has written keys and values
        for start in range(0, num_rows, ROWS):
            step = start // ROWS
            async_copy.wait_group(0)
            fence_async_shared()  # rows were written by threads, the products read them as TMA does
            s = _begin_scores(q_smem, block, none)
            row = _part_rows(item, entry_smem.index(step % ENTRY_TILES), start, FREE, SHIFT)
            s = warpgroup_mma_wait(0, deps=[s])  # the queries are read: the next tile's may take their place
            if start + ROWS < num_rows:
                next_start = start + ROWS
                item.copy_panels(q_ptr, q_smem, 0, entry_smem.index((step + 1) % ENTRY_TILES), next_start)
                item.copy_entries(entry_smem.index((step + 2) % ENTRY_TILES), next_start + ROWS)
            async_copy.commit_group()
            _attend(s, block, part_ptr, part_lse_ptr, row, scale_log2)
    block.close()


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
    grid = (bound, chunk.pair_end - chunk.pair, triton.cdiv(tokens, items.range_tokens))
    selected_forward_sm90_kernel[grid](
        q, describe_panels(k), describe_panels(v), part, part_lse, inversion.entries, table,
        *document_pointers(layout, q, "doc_start", "block_base"), scale * LOG2E, T, chunk.pair, chunk.token, tokens,
        B * Hkv, bound,
        G=H // Hkv, HKV=Hkv, DK=Dk, DV=v.shape[3], RATIO=inversion.ratio, SLOTS=inversion.slots, FREE=free, SHIFT=shift,
        PACKED=layout is not None, num_warps=4,
    )  # fmt: skip
