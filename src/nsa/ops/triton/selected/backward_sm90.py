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
# Triton holds fields of aggregates against their annotations, which therefore may not be postponed.

from torch import Tensor
from triton.experimental import gluon
from triton.experimental.gluon import language as gl
from triton.experimental.gluon.language.nvidia.ampere import async_copy
from triton.experimental.gluon.language.nvidia.hopper import fence_async_shared, warpgroup_mma, warpgroup_mma_wait
from triton.language.core import _aggregate as aggregate  # public as gluon.aggregate from Triton 3.9 on

from nsa.ops.triton.gates import Rows
from nsa.ops.triton.gpu import LOG2E
from nsa.ops.triton.layout import Layout, document_pointers
from nsa.ops.triton.selected.invert import Chunk, Inversion, ItemGradients, item_keys
from nsa.ops.triton.selected.panels_sm90 import (
    BLOCK,
    COPY,
    ENTRY_TILES,
    LINE,
    PANEL,
    ROWS,
    WIDTH,
    Item,
    describe_panels,
    make_block,
    make_lines,
    make_panels,
)
from nsa.ops.triton.sm90 import copy_async

QUERY_PANELS = gl.constexpr(2)  # panels of a transposed dQ in flight at once: three do not fit the registers


@aggregate
class Sources:
    """What an item's rows are copied from, from the chunk's first token and the group's first head on."""

    q_ptr: gl.tensor
    dout_ptr: gl.tensor
    lse_ptr: gl.tensor
    delta_ptr: gl.tensor

    @gluon.constexpr_function
    def __init__(self, q_ptr, dout_ptr, lse_ptr, delta_ptr):
        self.q_ptr, self.dout_ptr = q_ptr, dout_ptr
        self.lse_ptr, self.delta_ptr = lse_ptr, delta_ptr


@aggregate
class Lines:
    """Room for the log-sum-exps and deltas of two tiles' rows and the entries of ENTRY_TILES."""

    lse: gl.shared_memory_descriptor
    delta: gl.shared_memory_descriptor
    entries: gl.shared_memory_descriptor

    @gluon.constexpr_function
    def __init__(self, lse, delta, entries):
        self.lse, self.delta, self.entries = lse, delta, entries

    @gluon.jit
    def entries_of(self, step):
        """The entries of a tile's rows."""
        return self.entries.index(step % ENTRY_TILES)


@gluon.jit
def _num_masked_rows(item, end):
    """How many of an item's rows, in the order of tokens, are of tokens before `end`: these alone need a mask."""
    num_masked = 0
    found = BLOCK + 0
    while found == BLOCK:
        index = num_masked + gl.arange(0, BLOCK, LINE)
        token = gl.load(item.entries_ptr + index, mask=index * item.G < item.num_rows, other=2147483647) // item.SLOTS
        found = gl.sum((token < end).to(gl.int32), 0)
        num_masked += found
    return num_masked * item.G


@gluon.jit
def _copy_tile(item, sources, q_tiles, dout_tiles, lines, buffer, entries, start):
    """Begin to copy a tile's rows, whose entries are here."""
    item.copy_panels(sources.q_ptr, q_tiles, buffer, entries, start)
    item.copy_panels(sources.dout_ptr, dout_tiles, buffer, entries, start)
    row = item.heads(entries, start, LINE)
    copy_async(lines.lse.index(buffer), sources.lse_ptr + row)
    copy_async(lines.delta.index(buffer), sources.delta_ptr + row)


@gluon.jit
def _repeat(x, NUMBER: gl.constexpr):
    """A tuple of NUMBER times `x`."""
    values = ()
    for _ in gl.static_range(NUMBER):
        values += (x,)
    return values


@gluon.jit
def _begin_scores(block, q_tiles, dout_tiles, buffer, none):
    """Begin the products of a block's keys with a tile's queries, then of its values with the output gradients."""
    s = none
    dp = none
    for panel in gl.static_range(block.PANELS):
        q = q_tiles[panel].index(buffer)
        s = warpgroup_mma(block.keys(panel), q.permute([1, 0]), s, use_acc=panel > 0, is_async=True)
    for panel in gl.static_range(block.VALUE_PANELS):
        dout = dout_tiles[panel].index(buffer)
        dp = warpgroup_mma(block.values(panel), dout.permute([1, 0]), dp, use_acc=panel > 0, is_async=True)
    return s, dp


@gluon.jit
def _probabilities(
    s, lse, item, entries, start, num_masked_rows, key_start, q_start, scale_log2, TILE: gl.constexpr
):  # fmt: skip
    """The softmax of scores; 0 for keys after a row's token, and for rows that repeat the item's last."""
    ROWS: gl.constexpr = entries.shape[0]
    COLUMN: gl.constexpr = gl.SliceLayout(0, TILE)
    p = gl.exp2(s * scale_log2 - lse[None, :])
    if (start < num_masked_rows) | (start + ROWS > item.num_rows):
        row = start + gl.arange(0, ROWS, COLUMN)
        t = entries.load(COLUMN) // item.SLOTS
        position = key_start - q_start + gl.arange(0, BLOCK, gl.SliceLayout(1, TILE))
        p = gl.where((position[:, None] <= t[None, :]) & (row < item.num_rows)[None, :], p, 0.0)
    return p


@gluon.jit
def _add_panels(operand, tiles, buffer, sums):
    """Begin to add the products of `operand` and the panels of a tile."""
    added = ()
    for panel in gl.static_range(len(sums)):
        added += (warpgroup_mma(operand, tiles[panel].index(buffer), sums[panel], is_async=True),)
    return added


@gluon.jit
def _wait_panels(sums, LATER: gl.constexpr):
    """These sums, after which `LATER` products were begun."""
    done = ()
    for panel in gl.static_range(len(sums)):
        done += (warpgroup_mma_wait(LATER + len(sums) - 1 - panel, deps=[sums[panel]]),)
    return done


@gluon.jit
def _query_rows(item, entries, start, D: gl.constexpr):
    """Where a tile's rows of dQ go in the scratch, and which rows there are."""
    ROW: gl.constexpr = gl.SliceLayout(1, COPY)
    ROWS: gl.constexpr = entries.shape[0]
    row = item.local_entries(entries, ROW) * item.G + item.rows(start, ROWS, ROW) % item.G
    target = row.to(gl.int32)[:, None] * D + gl.arange(0, WIDTH, gl.SliceLayout(0, COPY))[None, :]
    return target, (start + gl.arange(0, ROWS, ROW) < item.num_rows)[:, None]


@gluon.jit
def _begin_query_panels(block, ds, none, FIRST: gl.constexpr, END: gl.constexpr):
    """Begin panels of dQ, transposed."""
    panels = ()
    for panel in gl.static_range(FIRST, END):
        k = block.keys(panel)
        panels += (warpgroup_mma(k.permute([1, 0]), ds.permute([1, 0]), none, use_acc=False, is_async=True),)
    return panels


@gluon.jit
def _write_transposed_queries(dq, block, ds, dq_tiles, none, part_ptr, target, live):
    """Write dQ, of which the first panels `dq` are begun; it leaves by way of `dq_tiles`, as copies take rows."""
    PANELS: gl.constexpr = block.PANELS
    AHEAD: gl.constexpr = len(dq)
    for panel in gl.static_range(PANELS):
        columns = warpgroup_mma_wait(min(AHEAD, PANELS - panel) - 1, deps=[dq[panel]])
        dq_tiles[panel].index(0).permute([1, 0]).store(columns.to(ds.dtype))
        if panel + AHEAD < PANELS:
            dq += _begin_query_panels(block, ds, none, panel + AHEAD, panel + AHEAD + 1)
    for panel in gl.static_range(PANELS):
        gl.store(part_ptr + panel * WIDTH + target, dq_tiles[panel].index(0).load(COPY), mask=live)


@gluon.jit
def _write_queries(block, ds, q_tiles, buffer, none, part_ptr, target, live):
    """Write dQ, panel by panel; it leaves from the queries' buffer, as these are done with."""
    for panel in gl.static_range(block.PANELS):
        dq = warpgroup_mma(ds.permute([1, 0]), block.keys(panel), none, use_acc=False, is_async=True)
        dq = warpgroup_mma_wait(0, deps=[dq])
        tile = q_tiles[panel].index(buffer)
        tile.store(dq.to(ds.dtype))
        gl.store(part_ptr + panel * WIDTH + target, tile.load(COPY), mask=live)


@gluon.jit
def _item_gradients(
    item, block, sources, q_tiles, dout_tiles, lines, ds_smem, dq_tiles, part_ptr, key_start, q_start, scale_log2,
    log2e, QUERIES: gl.constexpr,
):  # fmt: skip
    """Panels of dK and dV that an item's rows give to its block; with QUERIES, rows of dQ go to the scratch."""
    PANELS: gl.constexpr = block.PANELS
    VALUE_PANELS: gl.constexpr = block.VALUE_PANELS
    ROWS: gl.constexpr = ds_smem.shape[0]
    TRANSPOSED: gl.constexpr = len(dq_tiles) > 0
    AHEAD: gl.constexpr = min(QUERY_PANELS, PANELS) if TRANSPOSED else 0
    TILE: gl.constexpr = gl.NVMMADistributedLayout([3, 0], [4, 1], [16, ROWS, 16])
    COLUMN: gl.constexpr = gl.SliceLayout(0, TILE)
    OPERAND: gl.constexpr = gl.DotOperandLayout(0, PANEL, 2)
    dtype: gl.constexpr = ds_smem.dtype
    num_masked_rows = _num_masked_rows(item, key_start + BLOCK - q_start)
    item.copy_entries(lines.entries_of(0), 0)
    item.copy_entries(lines.entries_of(1), ROWS)
    async_copy.commit_group()
    async_copy.wait_group(0)
    _copy_tile(item, sources, q_tiles, dout_tiles, lines, 0, lines.entries_of(0), 0)
    async_copy.commit_group()

    none = gl.zeros([BLOCK, WIDTH], gl.float32, PANEL)
    nothing = gl.zeros([BLOCK, ROWS], gl.float32, TILE)
    dk = _repeat(none, PANELS)
    dv = _repeat(none, VALUE_PANELS)
    block.wait()  # until TMA has written keys and values
    for start in range(0, item.num_rows, ROWS):
        step = start // ROWS
        buffer = step % 2
        entries = lines.entries_of(step)
        async_copy.wait_group(0)
        fence_async_shared()  # rows were written by threads, the products read them as TMA does
        s, dp = _begin_scores(block, q_tiles, dout_tiles, buffer, nothing)
        if start + ROWS < item.num_rows:
            _copy_tile(item, sources, q_tiles, dout_tiles, lines, 1 - buffer, lines.entries_of(step + 1), start + ROWS)
            item.copy_entries(lines.entries_of(step + 2), start + 2 * ROWS)
        async_copy.commit_group()

        lse = lines.lse.index(buffer).load(COLUMN) * log2e
        s = warpgroup_mma_wait(VALUE_PANELS, deps=[s])  # the products of dP were begun after it
        p = _probabilities(s, lse, item, entries, start, num_masked_rows, key_start, q_start, scale_log2, TILE)
        dv = _add_panels(gl.convert_layout(p.to(dtype), OPERAND), dout_tiles, buffer, dv)
        dp = warpgroup_mma_wait(VALUE_PANELS, deps=[dp])  # the products of dV were begun after it
        delta = lines.delta.index(buffer).load(COLUMN)
        ds = (p * (dp - delta[None, :])).to(dtype)
        dk = _add_panels(gl.convert_layout(ds, OPERAND), q_tiles, buffer, dk)
        if QUERIES:
            if TRANSPOSED:
                ds_smem.permute([1, 0]).store(ds)
            else:
                ds_smem.store(ds)
            fence_async_shared()  # threads wrote what the products of dQ read
        dq = _begin_query_panels(block, ds_smem, nothing, 0, AHEAD)
        dv = _wait_panels(dv, PANELS + AHEAD)
        dk = _wait_panels(dk, AHEAD)
        if QUERIES:
            target, live = _query_rows(item, entries, start, PANELS * WIDTH)
            if TRANSPOSED:
                _write_transposed_queries(dq, block, ds_smem, dq_tiles, nothing, part_ptr, target, live)
            else:
                _write_queries(block, ds_smem, q_tiles, buffer, none, part_ptr, target, live)
    return dk, dv


@gluon.jit
def _store_panels(x_ptr, panels, number):
    """Write an item's panels of dK or dV."""
    row = number.to(gl.int64) * BLOCK + gl.arange(0, BLOCK, gl.SliceLayout(1, PANEL))
    for panel in gl.static_range(len(panels)):
        column = panel * WIDTH + gl.arange(0, WIDTH, gl.SliceLayout(0, PANEL))
        gl.store(x_ptr + row[:, None] * (len(panels) * WIDTH) + column[None, :], panels[panel])


@gluon.jit(do_not_specialize=["T", "S", "q_start", "pair_start", "token_start", "num_tokens", "bound"])
def selected_backward_sm90_kernel(
    q_ptr, k_desc, v_desc, dout_ptr, lse_ptr, delta_ptr, part_ptr, dk_ptr, dv_ptr, key_ptr, entries_ptr, item_ptr,
    doc_ptr, doc_end_ptr, base_ptr, scale_log2, log2e, T, S, q_start, pair_start, token_start, num_tokens, bound,
    G: gl.constexpr, HKV: gl.constexpr, DK: gl.constexpr, DV: gl.constexpr, ROWS: gl.constexpr, RATIO: gl.constexpr,
    SLOTS: gl.constexpr, PACKED: gl.constexpr, QUERIES: gl.constexpr,
):  # fmt: skip
    """What an item gives to dK and dV of its block, which keys these are, and with QUERIES its rows of dQ."""
    H: gl.constexpr = G * HKV
    dtype: gl.constexpr = k_desc.dtype
    square: gl.constexpr = gl.NVMMASharedLayout(swizzle_byte_width=128, element_bitwidth=16, rank=2)
    block = make_block(k_desc, v_desc, DK, DV)
    q_tiles = make_panels(dtype, ROWS, block.PANELS)
    dout_tiles = make_panels(dtype, ROWS, block.VALUE_PANELS)
    lse_smem = make_lines(gl.float32, ROWS, 2)
    delta_smem = make_lines(gl.float32, ROWS, 2)
    lines = Lines(lse_smem, delta_smem, make_lines(gl.int32, ROWS, ENTRY_TILES))
    ds_smem = gl.allocate_shared_memory(dtype, [ROWS, BLOCK], square)
    # A product has 64 rows at least: for tiles of fewer, dQ is computed transposed.
    dq_tiles = make_panels(dtype, ROWS, block.PANELS if QUERIES and ROWS < BLOCK else 0, 1)
    fence_async_shared()  # TMA sees the barrier

    number = gl.program_id(1) * bound + gl.program_id(0)
    item_ptr += number.to(gl.int64) * 3
    block_number = gl.load(item_ptr)
    if block_number >= 0:
        entry = gl.load(item_ptr + 1)
        num_rows = (gl.load(item_ptr + 2) - entry) * G
        pair = pair_start + gl.program_id(1)
        b = pair // HKV
        group = pair % HKV
        key_start = item_keys(entries_ptr, entry, block_number, doc_ptr, base_ptr, SLOTS, RATIO, BLOCK, PACKED)
        key_end = gl.minimum(key_start + BLOCK, S)
        if PACKED:
            key_end = gl.minimum(key_end, gl.load(doc_end_ptr + gl.load(entries_ptr + entry) // SLOTS))
        gl.store(key_ptr + 2 * number, key_start)
        gl.store(key_ptr + 2 * number + 1, key_end)
        block.load(k_desc, v_desc, b, key_start, group)

        # One 64-bit base for each tensor; offsets within the chunk fit 32 bits (see `chunk_token_bytes`).
        first_row = (b.to(gl.int64) * T + token_start) * H + group * G
        sources = Sources(
            q_ptr + first_row * DK, dout_ptr + first_row * DV, lse_ptr + first_row, delta_ptr + first_row
        )  # fmt: skip
        part_ptr += gl.program_id(1).to(gl.int64) * num_tokens * (SLOTS * G * DK)
        item = Item(entries_ptr + entry, num_rows, token_start * SLOTS, G, H, SLOTS)
        dk, dv = _item_gradients(
            item, block, sources, q_tiles, dout_tiles, lines, ds_smem, dq_tiles, part_ptr, key_start, q_start,
            scale_log2, log2e, QUERIES,
        )  # fmt: skip
        _store_panels(dk_ptr, dk, number)
        _store_panels(dv_ptr, dv, number)
    block.close()


def selected_backward_sm90(
    q: Tensor, k: Tensor, v: Tensor, dout: Tensor, rows: Rows, part: Tensor, grads: ItemGradients,
    inversion: Inversion, table: Tensor, layout: Layout | None, chunk: Chunk, q_start: int, scale: float,
    with_dq: bool,
) -> None:  # fmt: skip
    """Write what `selected_backward_kernel` gives for a chunk."""
    T, H, Dk = q.shape[1:]
    S, Hkv = k.shape[1:3]
    bound = table.shape[1]
    selected_backward_sm90_kernel[(bound, chunk.num_pairs)](
        q, describe_panels(k), describe_panels(v), dout, *rows, part, *grads, inversion.entries, table,
        *document_pointers(layout, q, "doc_start", "doc_end", "block_base"), scale * LOG2E, LOG2E, T, S, q_start,
        chunk.pair, chunk.token, chunk.num_tokens, bound,
        G=H // Hkv, HKV=Hkv, DK=Dk, DV=v.shape[3], ROWS=ROWS.value // (2 if Dk > 128 else 1), RATIO=inversion.ratio,
        SLOTS=inversion.slots, PACKED=layout is not None, QUERIES=with_dq, num_warps=4,
    )  # fmt: skip
