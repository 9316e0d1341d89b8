"""Tiles cut into panels of 64 columns, which the selected branch's kernels for Hopper copy row by row and multiply."""

# Kernels are typed by Triton, not by Python.
# pyright: reportArgumentType=false, reportCallIssue=false, reportAttributeAccessIssue=false, reportReturnType=false
# pyright: reportGeneralTypeIssues=false, reportPossiblyUnboundVariable=false, reportAssignmentType=false
from __future__ import annotations

from torch import Tensor
from triton.experimental import gluon
from triton.experimental.gluon import language as gl
from triton.experimental.gluon.language.nvidia.ampere import async_copy
from triton.experimental.gluon.language.nvidia.hopper import warpgroup_mma, warpgroup_mma_wait
from triton.experimental.gluon.nvidia.hopper import TensorDescriptor

ROWS = gl.constexpr(64)  # rows of a tile; half as many beside keys of 192
BLOCK = gl.constexpr(64)  # keys of a block
WIDTH = gl.constexpr(64)  # columns of a panel


@gluon.jit
def rows_of_tile(start, num_rows, ROWS: gl.constexpr, LAYOUT: gl.constexpr):
    """Numbers of a tile's rows; the item's last repeats."""
    return gl.minimum(start + gl.arange(0, ROWS, LAYOUT), num_rows - 1).to(gl.uint32)


@gluon.jit
def copy_entries(entries_ptr, tile, start, num_rows, G: gl.constexpr, LINE: gl.constexpr):
    """Begin to copy the entries of a tile's rows."""
    row = rows_of_tile(start, num_rows, tile.shape[0], LINE)
    async_copy.async_copy_global_to_shared(tile, entries_ptr + (row // G).to(gl.int32))


@gluon.jit
def make_panels(dtype: gl.constexpr, ROWS: gl.constexpr, PANELS: gl.constexpr, BUFFERS: gl.constexpr = 2):
    """Room for tiles cut into panels.

    Within one allocation the compiler has threads wait between accesses to different panels too.
    """
    square: gl.constexpr = gl.NVMMASharedLayout(swizzle_byte_width=128, element_bitwidth=16, rank=2)
    tiles = ()
    for _ in gl.static_range(PANELS):
        tiles += (gl.allocate_shared_memory(dtype, [BUFFERS, ROWS, WIDTH], square),)
    return tiles


@gluon.jit
def copy_panels(
    x_ptr, tiles, buffer, entries, first_place, start, num_rows, G: gl.constexpr, H: gl.constexpr, D: gl.constexpr,
    SLOTS: gl.constexpr, LAYOUT: gl.constexpr,
):  # fmt: skip
    """Begin to copy a tile's rows, whose entries are here, into panels of `tiles`."""
    ROW: gl.constexpr = gl.SliceLayout(1, LAYOUT)
    token = (entries.load(ROW) - first_place).to(gl.uint32) // SLOTS
    offsets = (token * H + rows_of_tile(start, num_rows, entries.shape[0], ROW) % G).to(gl.int32)[:, None] * D
    offsets += gl.arange(0, WIDTH, gl.SliceLayout(0, LAYOUT))[None, :]
    for panel in gl.static_range(len(tiles)):
        async_copy.async_copy_global_to_shared(tiles[panel].index(buffer), x_ptr + panel * WIDTH + offsets)


@gluon.jit
def _copy_lines(
    lse_ptr, delta_ptr, entries, lse_tile, delta_tile, first_place, start, num_rows, G: gl.constexpr, H: gl.constexpr,
    SLOTS: gl.constexpr, LINE: gl.constexpr,
):  # fmt: skip
    """Begin to copy the log-sum-exps and deltas of a tile's rows."""
    token = (entries.load(LINE) - first_place).to(gl.uint32) // SLOTS
    row = (token * H + rows_of_tile(start, num_rows, entries.shape[0], LINE) % G).to(gl.int32)
    async_copy.async_copy_global_to_shared(lse_tile, lse_ptr + row)
    async_copy.async_copy_global_to_shared(delta_tile, delta_ptr + row)


@gluon.jit
def _repeat(x, NUMBER: gl.constexpr):
    values = ()
    for _ in gl.static_range(NUMBER):
        values += (x,)
    return values


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
def _transposed_panel(k_smem, panel, ds, none):
    """Begin a panel of dQ, transposed."""
    k = k_smem.index(panel).reshape([BLOCK, WIDTH])
    return warpgroup_mma(k.permute([1, 0]), ds.permute([1, 0]), none, use_acc=False, is_async=True)


@gluon.jit
def _query_places(
    entries, first_place, start, num_rows, G: gl.constexpr, D: gl.constexpr, LAYOUT: gl.constexpr
):  # fmt: skip
    """Where a tile's rows of dQ go in the scratch, and which rows there are."""
    ROW: gl.constexpr = gl.SliceLayout(1, LAYOUT)
    ROWS: gl.constexpr = entries.shape[0]
    row = (entries.load(ROW) - first_place).to(gl.uint32) * G + rows_of_tile(start, num_rows, ROWS, ROW) % G
    target = row.to(gl.int32)[:, None] * D + gl.arange(0, WIDTH, gl.SliceLayout(0, LAYOUT))[None, :]
    return target, (start + gl.arange(0, ROWS, ROW) < num_rows)[:, None]


@gluon.jit
def _store_panel(x_ptr, x, item, panel, D: gl.constexpr, PANEL: gl.constexpr):
    row = item.to(gl.int64) * BLOCK + gl.arange(0, BLOCK, gl.SliceLayout(1, PANEL))
    column = panel * WIDTH + gl.arange(0, WIDTH, gl.SliceLayout(0, PANEL))
    gl.store(x_ptr + row[:, None] * D + column[None, :], x)


def describe_panels(x: Tensor) -> TensorDescriptor:
    """Boxes of a panel of a block's keys or values, `[B, S, Hkv, D]`; beyond a sequence they read zeros."""
    box = [1, BLOCK.value, 1, WIDTH.value]
    layout = gl.NVMMASharedLayout.get_default_for(box, gl.bfloat16)
    return TensorDescriptor(x, list(x.shape), list(x.stride()), box, layout)
