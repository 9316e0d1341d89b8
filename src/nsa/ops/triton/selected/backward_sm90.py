"""Backward of the selected branch on Hopper, in Gluon: the next tile's rows arrive under the present tile's products.

Items, scratch and steps are those of `backward.py`, whose kernel waits for each tile's rows: Triton issues the copies
of the next tile behind the present one. Here a program of four warps, two on a multiprocessor, orders them first, and
knows their tokens a tile before. Offsets within a chunk fit 32 bits, and heads are cut into panels of 64 columns, so
that all that a step needs fits the registers.

Beside dK of keys of 192, registers and shared memory have room for tiles of 32 rows only. A product has 64 rows at
least: those of dQ are then its columns, and dQ leaves transposed.

Shapes are those of `backward.py`; blocks of 64 tokens.
"""

# Kernels are typed by Triton, not by Python.
# pyright: reportArgumentType=false, reportCallIssue=false, reportAttributeAccessIssue=false, reportReturnType=false
# pyright: reportGeneralTypeIssues=false, reportPossiblyUnboundVariable=false
# pyright: reportAssignmentType=false, reportOperatorIssue=false
# Lists in kernels are added, not unpacked.
# ruff: noqa: RUF005
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

from nsa.ops.triton.gates import Rows
from nsa.ops.triton.gpu import LOG2E
from nsa.ops.triton.layout import Layout, document_pointers
from nsa.ops.triton.selected.invert import Chunk, Inversion, ItemGradients, item_keys
from nsa.ops.triton.selected.panels_sm90 import (
    BLOCK,
    ROWS,
    WIDTH,
    _add_panels,
    _copy_lines,
    _query_places,
    _repeat,
    _store_panel,
    _transposed_panel,
    _wait_panels,
    copy_entries,
    copy_panels,
    describe_panels,
    make_panels,
)
from nsa.ops.triton.sm90 import make_barriers

QUERY_PANELS = gl.constexpr(2)  # panels of a transposed dQ in flight at once: three do not fit the registers


@gluon.jit(do_not_specialize=["T", "S", "q_start", "head_start", "token_start", "num_tokens", "bound"])
def selected_backward_sm90_kernel(
    q_ptr, k_desc, v_desc, dout_ptr, lse_ptr, delta_ptr, part_ptr, dk_ptr, dv_ptr, key_ptr, entries_ptr, item_ptr,
    doc_ptr, doc_end_ptr, base_ptr, scale_log2, log2e, T, S, q_start, head_start, token_start, num_tokens, bound,
    G: gl.constexpr, HKV: gl.constexpr, DK: gl.constexpr, DV: gl.constexpr, ROWS: gl.constexpr, RATIO: gl.constexpr,
    SLOTS: gl.constexpr, PACKED: gl.constexpr, QUERIES: gl.constexpr,
):  # fmt: skip
    H: gl.constexpr = G * HKV
    PANELS: gl.constexpr = DK // WIDTH
    VALUE_PANELS: gl.constexpr = DV // WIDTH
    TRANSPOSED: gl.constexpr = QUERIES and ROWS < BLOCK
    AHEAD: gl.constexpr = min(QUERY_PANELS, PANELS) if TRANSPOSED else 0
    PANEL: gl.constexpr = gl.NVMMADistributedLayout([3, 0], [4, 1], [16, WIDTH, 16])
    TILE: gl.constexpr = gl.NVMMADistributedLayout([3, 0], [4, 1], [16, ROWS, 16])
    COLUMN: gl.constexpr = gl.SliceLayout(0, TILE)
    OPERAND: gl.constexpr = gl.DotOperandLayout(0, PANEL, 2)
    LAYOUT: gl.constexpr = gl.BlockedLayout([1, 8], [4, 8], [4, 1], [1, 0])
    LINE: gl.constexpr = gl.BlockedLayout([1], [32], [4], [0])
    dtype: gl.constexpr = k_desc.dtype
    square: gl.constexpr = gl.NVMMASharedLayout(swizzle_byte_width=128, element_bitwidth=16, rank=2)
    line: gl.constexpr = gl.SwizzledSharedLayout(1, 1, 1, order=[0])
    k_smem = gl.allocate_shared_memory(dtype, [PANELS] + k_desc.block_shape, k_desc.layout)
    v_smem = gl.allocate_shared_memory(dtype, [VALUE_PANELS] + v_desc.block_shape, v_desc.layout)
    q_smem = make_panels(dtype, ROWS, PANELS)
    dout_smem = make_panels(dtype, ROWS, VALUE_PANELS)
    lse_smem = gl.allocate_shared_memory(gl.float32, [2, ROWS], line)
    delta_smem = gl.allocate_shared_memory(gl.float32, [2, ROWS], line)
    entry_smem = gl.allocate_shared_memory(gl.int32, [4, ROWS], line)
    ds_smem = gl.allocate_shared_memory(dtype, [ROWS, BLOCK], square)
    dq_smem = make_panels(dtype, ROWS, PANELS if TRANSPOSED else 0, 1)
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
        mbarrier.expect(k_full.index(0), 2 * BLOCK * (DK + DV))
        for panel in gl.static_range(PANELS):
            box = [b, key_start, group, panel * WIDTH]
            tma.async_copy_global_to_shared(k_desc, box, k_full.index(0), k_smem.index(panel))
            if panel < VALUE_PANELS:
                tma.async_copy_global_to_shared(v_desc, box, k_full.index(0), v_smem.index(panel))

        # One 64-bit base for each tensor; offsets within the chunk fit 32 bits (see `chunk_token_bytes`).
        first_row = (b.to(gl.int64) * T + token_start) * H + group * G
        q_ptr += first_row * DK
        dout_ptr += first_row * DV
        lse_ptr += first_row
        delta_ptr += first_row
        part_ptr += gl.program_id(1).to(gl.int64) * num_tokens * (SLOTS * G * DK)
        entries_ptr += entry
        first_place = token_start * SLOTS
        # Entries are in the order of tokens: those of the block's own tokens, and any before it, come first and alone
        # need a mask.
        num_masked = 0
        found = BLOCK + 0
        while found == BLOCK:
            index = num_masked + gl.arange(0, BLOCK, LINE)
            token = gl.load(entries_ptr + index, mask=index * G < num_rows, other=2147483647) // SLOTS
            found = gl.sum((token < key_start + BLOCK - q_start).to(gl.int32), 0)
            num_masked += found
        masked_rows = num_masked * G

        copy_entries(entries_ptr, entry_smem.index(0), 0, num_rows, G, LINE)
        copy_entries(entries_ptr, entry_smem.index(1), ROWS, num_rows, G, LINE)
        async_copy.commit_group()
        async_copy.wait_group(0)
        _copy_lines(
            lse_ptr, delta_ptr, entry_smem.index(0), lse_smem.index(0), delta_smem.index(0), first_place, 0, num_rows,
            G, H, SLOTS, LINE,
        )  # fmt: skip
        what = entry_smem.index(0)
        copy_panels(q_ptr, q_smem, 0, what, first_place, 0, num_rows, G, H, DK, SLOTS, LAYOUT)
        copy_panels(dout_ptr, dout_smem, 0, what, first_place, 0, num_rows, G, H, DV, SLOTS, LAYOUT)
        async_copy.commit_group()

        none = gl.zeros([BLOCK, WIDTH], gl.float32, PANEL)
        nothing = gl.zeros([BLOCK, ROWS], gl.float32, TILE)
        dk = _repeat(none, PANELS)
        dv = _repeat(none, VALUE_PANELS)
        mbarrier.wait(k_full.index(0), 0)
        for start in range(0, num_rows, ROWS):
            step = start // ROWS
            buffer = step % 2
            entries = entry_smem.index(step % 4)
            async_copy.wait_group(0)
            fence_async_shared()  # rows were written by threads, the products read them as TMA does
            s = nothing
            dp = nothing
            for panel in gl.static_range(PANELS):
                q = q_smem[panel].index(buffer)
                k = k_smem.index(panel).reshape([BLOCK, WIDTH])
                s = warpgroup_mma(k, q.permute([1, 0]), s, use_acc=panel > 0, is_async=True)
            for panel in gl.static_range(VALUE_PANELS):
                dout = dout_smem[panel].index(buffer)
                v = v_smem.index(panel).reshape([BLOCK, WIDTH])
                dp = warpgroup_mma(v, dout.permute([1, 0]), dp, use_acc=panel > 0, is_async=True)
            if start + ROWS < num_rows:
                low = start + ROWS
                other = 1 - buffer
                what = entry_smem.index((step + 1) % 4)
                copy_panels(q_ptr, q_smem, other, what, first_place, low, num_rows, G, H, DK, SLOTS, LAYOUT)
                copy_panels(dout_ptr, dout_smem, other, what, first_place, low, num_rows, G, H, DV, SLOTS, LAYOUT)
                _copy_lines(
                    lse_ptr, delta_ptr, what, lse_smem.index(other), delta_smem.index(other), first_place, low,
                    num_rows, G, H, SLOTS, LINE,
                )  # fmt: skip
                copy_entries(entries_ptr, entry_smem.index((step + 2) % 4), low + ROWS, num_rows, G, LINE)
            async_copy.commit_group()

            lse = lse_smem.index(buffer).load(COLUMN) * log2e
            s = warpgroup_mma_wait(VALUE_PANELS, deps=[s])
            p = gl.exp2(s * scale_log2 - lse[None, :])
            if (start < masked_rows) | (start + ROWS > num_rows):
                row = start + gl.arange(0, ROWS, COLUMN)
                t = entries.load(COLUMN) // SLOTS
                position = key_start - q_start + gl.arange(0, BLOCK, gl.SliceLayout(1, TILE))
                p = gl.where((position[:, None] <= t[None, :]) & (row < num_rows)[None, :], p, 0.0)
            operand = gl.convert_layout(p.to(dtype), OPERAND)
            dv = _add_panels(operand, dout_smem, buffer, dv)
            dp = warpgroup_mma_wait(VALUE_PANELS, deps=[dp])
            delta = delta_smem.index(buffer).load(COLUMN)
            ds = (p * (dp - delta[None, :])).to(dtype)
            operand = gl.convert_layout(ds, OPERAND)
            dk = _add_panels(operand, q_smem, buffer, dk)
            if QUERIES:
                if TRANSPOSED:
                    ds_smem.permute([1, 0]).store(ds)
                else:
                    ds_smem.store(ds)
                fence_async_shared()
            dq = ()
            for panel in gl.static_range(AHEAD):
                dq += (_transposed_panel(k_smem, panel, ds_smem, nothing),)
            dv = _wait_panels(dv, PANELS + AHEAD)
            dk = _wait_panels(dk, AHEAD)
            if QUERIES:
                target, live = _query_places(entries, first_place, start, num_rows, G, DK, LAYOUT)
            if TRANSPOSED:
                for panel in gl.static_range(PANELS):
                    columns = warpgroup_mma_wait(min(AHEAD, PANELS - panel) - 1, deps=[dq[panel]])
                    dq_smem[panel].index(0).permute([1, 0]).store(columns.to(dtype))
                    if panel + AHEAD < PANELS:
                        dq += (_transposed_panel(k_smem, panel + AHEAD, ds_smem, nothing),)
                for panel in gl.static_range(PANELS):
                    gl.store(part_ptr + panel * WIDTH + target, dq_smem[panel].index(0).load(LAYOUT), mask=live)
            elif QUERIES:
                for panel in gl.static_range(PANELS):
                    k = k_smem.index(panel).reshape([BLOCK, WIDTH])
                    whole = warpgroup_mma(ds_smem.permute([1, 0]), k, none, use_acc=False, is_async=True)
                    whole = warpgroup_mma_wait(0, deps=[whole])
                    tile = q_smem[panel].index(buffer)  # dQ leaves from the queries' place, as these are done with
                    tile.store(whole.to(dtype))
                    gl.store(part_ptr + panel * WIDTH + target, tile.load(LAYOUT), mask=live)
        for panel in gl.static_range(PANELS):
            _store_panel(dk_ptr, dk[panel], item, panel, DK, PANEL)
            if panel < VALUE_PANELS:
                _store_panel(dv_ptr, dv[panel], item, panel, DV, PANEL)
    mbarrier.invalidate(k_full.index(0))  # not before, or the compiler gives its place to something else


def selected_backward_sm90(
    q: Tensor, k: Tensor, v: Tensor, dout: Tensor, rows: Rows, part: Tensor, grads: ItemGradients,
    inversion: Inversion, table: Tensor, layout: Layout | None, chunk: Chunk, q_start: int, scale: float,
    with_dq: bool,
) -> None:  # fmt: skip
    """Write what `selected_backward_kernel` gives for a chunk."""
    T, H, Dk = q.shape[1:]
    S, Hkv = k.shape[1:3]
    bound = table.shape[1]
    selected_backward_sm90_kernel[(bound, chunk.num_heads)](
        q, describe_panels(k), describe_panels(v), dout, *rows, part, *grads, inversion.entries, table,
        *document_pointers(layout, q, "doc_start", "doc_end", "block_base"), scale * LOG2E, LOG2E, T, S, q_start,
        chunk.head, chunk.token, chunk.num_tokens, bound,
        G=H // Hkv, HKV=Hkv, DK=Dk, DV=v.shape[3], ROWS=ROWS.value // (2 if Dk > 128 else 1), RATIO=inversion.ratio,
        SLOTS=inversion.slots, PACKED=layout is not None, QUERIES=with_dq, num_warps=4,
    )  # fmt: skip
