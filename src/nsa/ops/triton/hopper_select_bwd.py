"""Backward of the selected branch on Hopper, in Gluon: the next tile's rows arrive under the present tile's products.

Items, scratch and steps are those of `select_bwd`, whose kernel waits for each tile's rows: Triton issues the copies of
the next tile behind the present one. Here a program of four warps, two on a multiprocessor, begins with these copies,
and knows their tokens a tile before; offsets within a chunk fit 32 bits.

Shapes are those of `select_bwd`; blocks of 64 tokens.
"""

# Kernels are typed by Triton, not by Python.
# pyright: reportArgumentType=false, reportCallIssue=false, reportAttributeAccessIssue=false, reportReturnType=false
# pyright: reportGeneralTypeIssues=false, reportPossiblyUnboundVariable=false
# pyright: reportAssignmentType=false, reportOperatorIssue=false
from __future__ import annotations

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

from nsa.ops.triton.common import LOG2E, Layout, hopper_serves
from nsa.ops.triton.dense_bwd import Rows
from nsa.ops.triton.hopper_fwd import describe_box, make_barriers
from nsa.ops.triton.invert import Chunk, Inversion, item_keys

ROWS = gl.constexpr(64)  # rows of a tile
BLOCK = gl.constexpr(64)  # keys of a block


def hopper_select_backward_serves(q: Tensor, v: Tensor, sub_block: int) -> bool:
    """Whether the kernel takes these fitting tensors and blocks."""
    return hopper_serves(q, v) and q.shape[3] == v.shape[3] and sub_block == BLOCK.value


@gluon.jit
def _rows(start, num_rows, LAYOUT: gl.constexpr):
    """Numbers of a tile's rows; the item's last repeats."""
    return gl.minimum(start + gl.arange(0, ROWS, LAYOUT), num_rows - 1).to(gl.uint32)


@gluon.jit
def _copy_entries(entries_ptr, tile, start, num_rows, G: gl.constexpr, LINE: gl.constexpr):
    """Begin to copy the entries of a tile's rows."""
    async_copy.async_copy_global_to_shared(tile, entries_ptr + (_rows(start, num_rows, LINE) // G).to(gl.int32))


@gluon.jit
def _copy_rows(
    q_ptr, dout_ptr, lse_ptr, delta_ptr, entries, q_tile, dout_tile, lse_tile, delta_tile, first_place, start, num_rows,
    G: gl.constexpr, H: gl.constexpr, D: gl.constexpr, SLOTS: gl.constexpr, LAYOUT: gl.constexpr, LINE: gl.constexpr,
):  # fmt: skip
    """Begin to copy a tile's rows, whose entries are here."""
    ROW: gl.constexpr = gl.SliceLayout(1, LAYOUT)
    token = (entries.load(ROW) - first_place).to(gl.uint32) // SLOTS
    offsets = (token * H + _rows(start, num_rows, ROW) % G).to(gl.int32)[:, None] * D
    offsets += gl.arange(0, D, gl.SliceLayout(0, LAYOUT))[None, :]
    async_copy.async_copy_global_to_shared(q_tile, q_ptr + offsets)
    async_copy.async_copy_global_to_shared(dout_tile, dout_ptr + offsets)
    token = (entries.load(LINE) - first_place).to(gl.uint32) // SLOTS
    line = (token * H + _rows(start, num_rows, LINE) % G).to(gl.int32)
    async_copy.async_copy_global_to_shared(lse_tile, lse_ptr + line)
    async_copy.async_copy_global_to_shared(delta_tile, delta_ptr + line)


@gluon.jit(do_not_specialize=["T", "S", "q_start", "head_start", "token_start", "num_tokens", "bound"])
def hopper_select_backward_kernel(
    q_ptr, k_desc, v_desc, dout_ptr, lse_ptr, delta_ptr, part_ptr, dk_ptr, dv_ptr, key_ptr, entries_ptr, item_ptr,
    doc_ptr, doc_end_ptr, base_ptr, scale_log2, log2e, T, S, q_start, head_start, token_start, num_tokens, bound,
    G: gl.constexpr, HKV: gl.constexpr, D: gl.constexpr, RATIO: gl.constexpr, SLOTS: gl.constexpr,
    PACKED: gl.constexpr, QUERIES: gl.constexpr,
):  # fmt: skip
    H: gl.constexpr = G * HKV
    S_LAYOUT: gl.constexpr = gl.NVMMADistributedLayout([3, 0], [4, 1], [16, ROWS, 16])
    K_LAYOUT: gl.constexpr = gl.NVMMADistributedLayout([3, 0], [4, 1], [16, D, 16])
    COLUMN: gl.constexpr = gl.SliceLayout(0, S_LAYOUT)
    OPERAND: gl.constexpr = gl.DotOperandLayout(0, K_LAYOUT, 2)
    LAYOUT: gl.constexpr = gl.BlockedLayout([1, 8], [256 // D, D // 8], [4, 1], [1, 0])
    ROW: gl.constexpr = gl.SliceLayout(1, LAYOUT)
    LINE: gl.constexpr = gl.BlockedLayout([1], [32], [4], [0])
    dtype: gl.constexpr = k_desc.dtype
    tile_layout: gl.constexpr = gl.NVMMASharedLayout.get_default_for([ROWS, D], dtype)
    ds_layout: gl.constexpr = gl.NVMMASharedLayout.get_default_for([BLOCK, ROWS], dtype)
    line_layout: gl.constexpr = gl.SwizzledSharedLayout(1, 1, 1, order=[0])
    k_smem = gl.allocate_shared_memory(dtype, k_desc.block_shape, k_desc.layout)
    v_smem = gl.allocate_shared_memory(dtype, v_desc.block_shape, v_desc.layout)
    q_smem = gl.allocate_shared_memory(dtype, [2, ROWS, D], tile_layout)
    dout_smem = gl.allocate_shared_memory(dtype, [2, ROWS, D], tile_layout)
    lse_smem = gl.allocate_shared_memory(gl.float32, [2, ROWS], line_layout)
    delta_smem = gl.allocate_shared_memory(gl.float32, [2, ROWS], line_layout)
    entry_smem = gl.allocate_shared_memory(gl.int32, [4, ROWS], line_layout)
    ds_smem = gl.allocate_shared_memory(dtype, [BLOCK, ROWS], ds_layout)
    k_full = make_barriers(1, 1)
    fence_async_shared()

    item = gl.program_id(1) * bound + gl.program_id(0)
    item_ptr += item.to(gl.int64) * 3
    block = gl.load(item_ptr)
    if block >= 0:
        entry = gl.load(item_ptr + 1)
        num_rows = (gl.load(item_ptr + 2) - entry) * G
        head = head_start + gl.program_id(1)
        b = head // HKV
        group = head % HKV
        key_start = item_keys(entries_ptr, entry, block, doc_ptr, base_ptr, SLOTS, RATIO, BLOCK, PACKED)
        key_end = gl.minimum(key_start + BLOCK, S)
        if PACKED:
            key_end = gl.minimum(key_end, gl.load(doc_end_ptr + gl.load(entries_ptr + entry) // SLOTS))
        gl.store(key_ptr + 2 * item, key_start)
        gl.store(key_ptr + 2 * item + 1, key_end)
        mbarrier.expect(k_full.index(0), 2 * BLOCK * 2 * D)
        box = [b, key_start, group, 0]
        tma.async_copy_global_to_shared(k_desc, box, k_full.index(0), k_smem)
        tma.async_copy_global_to_shared(v_desc, box, k_full.index(0), v_smem)

        # One 64-bit base for each tensor; offsets within the chunk fit 32 bits (see `chunk_token_bytes`).
        first_row = (b.to(gl.int64) * T + token_start) * H + group * G
        q_ptr += first_row * D
        dout_ptr += first_row * D
        lse_ptr += first_row
        delta_ptr += first_row
        part_ptr += gl.program_id(1).to(gl.int64) * num_tokens * (SLOTS * G * D)
        entries_ptr += entry
        first_place = token_start * SLOTS
        # Entries are in the order of tokens: those of the block's own tokens come first, and they alone need a mask.
        index = gl.arange(0, BLOCK, LINE)
        token = gl.load(entries_ptr + index, mask=index * G < num_rows, other=2147483647) // SLOTS
        masked_rows = gl.sum((token < key_start + BLOCK - q_start).to(gl.int32), 0) * G

        _copy_entries(entries_ptr, entry_smem.index(0), 0, num_rows, G, LINE)
        _copy_entries(entries_ptr, entry_smem.index(1), ROWS, num_rows, G, LINE)
        async_copy.commit_group()
        async_copy.wait_group(0)
        _copy_rows(
            q_ptr, dout_ptr, lse_ptr, delta_ptr, entry_smem.index(0), q_smem.index(0), dout_smem.index(0),
            lse_smem.index(0), delta_smem.index(0), first_place, 0, num_rows, G, H, D, SLOTS, LAYOUT, LINE,
        )  # fmt: skip
        async_copy.commit_group()

        k = k_smem.reshape([BLOCK, D])
        v = v_smem.reshape([BLOCK, D])
        none = gl.zeros([BLOCK, ROWS], gl.float32, S_LAYOUT)
        nothing = gl.zeros([ROWS, D], gl.float32, K_LAYOUT)
        dk = gl.zeros([BLOCK, D], gl.float32, K_LAYOUT)
        dv = gl.zeros([BLOCK, D], gl.float32, K_LAYOUT)
        mbarrier.wait(k_full.index(0), 0)
        for start in range(0, num_rows, ROWS):
            buffer = start // ROWS % 2
            entries = entry_smem.index(start // ROWS % 4)
            async_copy.wait_group(0)
            fence_async_shared()  # rows were written by threads, the products read them as TMA does
            if start + ROWS < num_rows:
                _copy_rows(
                    q_ptr, dout_ptr, lse_ptr, delta_ptr, entry_smem.index((start // ROWS + 1) % 4),
                    q_smem.index(1 - buffer), dout_smem.index(1 - buffer), lse_smem.index(1 - buffer),
                    delta_smem.index(1 - buffer), first_place, start + ROWS, num_rows, G, H, D, SLOTS, LAYOUT, LINE,
                )  # fmt: skip
                _copy_entries(
                    entries_ptr, entry_smem.index((start // ROWS + 2) % 4), start + 2 * ROWS, num_rows, G, LINE
                )  # fmt: skip
            async_copy.commit_group()

            q = q_smem.index(buffer)
            dout = dout_smem.index(buffer)
            minus_delta = none - delta_smem.index(buffer).load(COLUMN)[None, :]
            s = warpgroup_mma(k, q.permute([1, 0]), none, use_acc=False, is_async=True)
            dp = warpgroup_mma(v, dout.permute([1, 0]), minus_delta, is_async=True)
            lse = lse_smem.index(buffer).load(COLUMN) * log2e
            s = warpgroup_mma_wait(1, deps=[s])
            p = gl.exp2(s * scale_log2 - lse[None, :])
            if (start < masked_rows) | (start + ROWS > num_rows):
                row = start + gl.arange(0, ROWS, COLUMN)
                t = entries.load(COLUMN) // SLOTS
                position = key_start - q_start + gl.arange(0, BLOCK, gl.SliceLayout(1, S_LAYOUT))
                p = gl.where((position[:, None] <= t[None, :]) & (row < num_rows)[None, :], p, 0.0)
            dv = warpgroup_mma(gl.convert_layout(p.to(dtype), OPERAND), dout, dv, is_async=True)
            dp = warpgroup_mma_wait(1, deps=[dp])
            ds = (p * dp).to(dtype)
            dk = warpgroup_mma(gl.convert_layout(ds, OPERAND), q, dk, is_async=True)
            if QUERIES:
                ds_smem.store(ds)
                fence_async_shared()
                dq = warpgroup_mma(ds_smem.permute([1, 0]), k, nothing, use_acc=False, is_async=True)
                dv = warpgroup_mma_wait(2, deps=[dv])
                dk = warpgroup_mma_wait(1, deps=[dk])
                dq = warpgroup_mma_wait(0, deps=[dq])
                q.store(dq.to(dtype))  # the queries are done with: rows leave from their place, whole
                live = start + gl.arange(0, ROWS, ROW) < num_rows
                place = (entries.load(ROW) - first_place).to(gl.uint32)
                target = (place * G + _rows(start, num_rows, ROW) % G).to(gl.int32)
                target = target[:, None] * D + gl.arange(0, D, gl.SliceLayout(0, LAYOUT))[None, :]
                gl.store(part_ptr + target, q.load(LAYOUT), mask=live[:, None])
            else:
                dv = warpgroup_mma_wait(1, deps=[dv])
                dk = warpgroup_mma_wait(0, deps=[dk])
        row_64 = item.to(gl.int64) * BLOCK + gl.arange(0, BLOCK, gl.SliceLayout(1, K_LAYOUT))
        target_64 = row_64[:, None] * D + gl.arange(0, D, gl.SliceLayout(0, K_LAYOUT))[None, :]
        gl.store(dk_ptr + target_64, dk)
        gl.store(dv_ptr + target_64, dv)


def hopper_select_backward(
    q: Tensor, k: Tensor, v: Tensor, dout: Tensor, rows: Rows, part: Tensor, item_dk: Tensor, item_dv: Tensor,
    item_key: Tensor, inversion: Inversion, table: Tensor, layout: Layout | None, chunk: Chunk, q_start: int,
    scale: float, queries: bool,
) -> None:  # fmt: skip
    """Write what `select_backward_kernel` gives for a chunk of tensors that the kernel serves."""
    T, H, D = q.shape[1:]
    S, Hkv = k.shape[1:3]
    documents = (q, q, q) if layout is None else (layout.doc_start, layout.doc_end, layout.block_base)
    bound = table.shape[1]
    hopper_select_backward_kernel[(bound, chunk.head_end - chunk.head)](
        q, describe_box(k, BLOCK.value, 1), describe_box(v, BLOCK.value, 1), dout, *rows, part, item_dk, item_dv,
        item_key, inversion.entries, table, *documents, scale * LOG2E, LOG2E, T, S, q_start, chunk.head, chunk.token,
        chunk.token_end - chunk.token, bound,
        G=H // Hkv, HKV=Hkv, D=D, RATIO=inversion.ratio, SLOTS=inversion.slots, PACKED=layout is not None,
        QUERIES=queries, num_warps=4,
    )  # fmt: skip
