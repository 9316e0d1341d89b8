"""What the selected branch's kernels by block for Hopper are made of: items, blocks, tiles cut into panels.

A tile of an item's rows is copied row by row into panels of 64 columns, which products then read. Legend: an item's
rows are its entries times the G heads of a group, an entry a token's slot (token * SLOTS + slot, see `invert`); a pair
is a batch row with a group, b * HKV + group.
"""

# Kernels are typed by Triton, not by Python.
# pyright: reportArgumentType=false, reportCallIssue=false, reportAttributeAccessIssue=false, reportReturnType=false
# pyright: reportGeneralTypeIssues=false, reportPossiblyUnboundVariable=false
# pyright: reportAssignmentType=false, reportOperatorIssue=false
# Triton holds fields of aggregates against their annotations, which therefore may not be postponed.
# Lists in kernels are added, not unpacked.
# ruff: noqa: RUF005

from torch import Tensor
from triton.experimental import gluon
from triton.experimental.gluon import language as gl
from triton.experimental.gluon.language.nvidia.hopper import mbarrier
from triton.experimental.gluon.nvidia.hopper import TensorDescriptor
from triton.language.core import _aggregate as aggregate  # public as gluon.aggregate from Triton 3.9 on

from nsa.ops.triton.sm90 import copy_async, make_barriers, tma_load

ROWS = gl.constexpr(64)  # rows of a tile; half as many beside keys of 192
BLOCK = gl.constexpr(64)  # keys of a block
WIDTH = gl.constexpr(64)  # columns of a panel: 128 bytes, the widest swizzle

PANEL = gl.constexpr(gl.NVMMADistributedLayout([3, 0], [4, 1], [16, 64, 16]))  # a product of 64 columns
COPY = gl.constexpr(gl.BlockedLayout([1, 8], [4, 8], [4, 1], [1, 0]))  # 16 bytes a thread, a panel's row by 8 of them
LINE = gl.constexpr(gl.BlockedLayout([1], [32], [4], [0]))  # one number a row
# Tiles whose entries are here at once: while those of the tile after next arrive, threads may lag a tile behind.
ENTRY_TILES = gl.constexpr(4)


@aggregate
class Item:
    """Rows that chose one block, `num_rows` of them; entries of the chunk's first token begin at `first_entry`."""

    entries_ptr: gl.tensor
    num_rows: gl.tensor
    first_entry: gl.tensor
    G: gl.constexpr
    H: gl.constexpr
    SLOTS: gl.constexpr

    @gluon.constexpr_function
    def __init__(self, entries_ptr, num_rows, first_entry, G, H, SLOTS):
        self.entries_ptr, self.num_rows, self.first_entry = entries_ptr, num_rows, first_entry
        self.G, self.H, self.SLOTS = gl.constexpr(G), gl.constexpr(H), gl.constexpr(SLOTS)

    @gluon.jit
    def rows(self, start, ROWS: gl.constexpr, LAYOUT: gl.constexpr):
        """Numbers of a tile's rows; the item's last repeats."""
        return gl.minimum(start + gl.arange(0, ROWS, LAYOUT), self.num_rows - 1).to(gl.uint32)

    @gluon.jit
    def copy_entries(self, tile, start):
        """Begin to copy the entries of a tile's rows."""
        row = self.rows(start, tile.shape[0], LINE)
        copy_async(tile, self.entries_ptr + (row // self.G).to(gl.int32))

    @gluon.jit
    def local_entries(self, entries, LAYOUT: gl.constexpr):
        """The entries of a tile's rows, which are here, counted from the chunk's first token on."""
        return (entries.load(LAYOUT) - self.first_entry).to(gl.uint32)

    @gluon.jit
    def heads(self, entries, start, LAYOUT: gl.constexpr):
        """Where a tile's rows lie in `[tokens, H]` from the chunk's first token and the group's first head on."""
        token = self.local_entries(entries, LAYOUT) // self.SLOTS
        return (token * self.H + self.rows(start, entries.shape[0], LAYOUT) % self.G).to(gl.int32)

    @gluon.jit
    def copy_panels(self, x_ptr, tiles, buffer, entries, start):
        """Begin to copy a tile's rows of `[tokens, H, D]` into panels of `tiles`."""
        D: gl.constexpr = len(tiles) * WIDTH
        offsets = self.heads(entries, start, gl.SliceLayout(1, COPY))[:, None] * D
        offsets += gl.arange(0, WIDTH, gl.SliceLayout(0, COPY))[None, :]
        for panel in gl.static_range(len(tiles)):
            copy_async(tiles[panel].index(buffer), x_ptr + panel * WIDTH + offsets)


@aggregate
class Block:
    """Keys and values of an item's block, cut into panels, and the barrier that says that they are there."""

    k: gl.shared_memory_descriptor
    v: gl.shared_memory_descriptor
    full: gl.shared_memory_descriptor
    PANELS: gl.constexpr
    VALUE_PANELS: gl.constexpr

    @gluon.constexpr_function
    def __init__(self, k, v, full, PANELS, VALUE_PANELS):
        self.k, self.v, self.full = k, v, full
        self.PANELS, self.VALUE_PANELS = gl.constexpr(PANELS), gl.constexpr(VALUE_PANELS)

    @gluon.constexpr_function
    def bytes(self):
        """Bytes of all panels, of 16-bit numbers."""
        return 2 * 64 * 64 * (self.PANELS + self.VALUE_PANELS)

    @gluon.jit
    def load(self, k_desc, v_desc, b, key_start, group):
        """Begin to load all panels."""
        mbarrier.expect(self.full.index(0), self.bytes())
        for panel in gl.static_range(self.PANELS):
            box = [b, key_start, group, panel * WIDTH]
            tma_load(k_desc, box, self.full.index(0), self.k.index(panel))
        for panel in gl.static_range(self.VALUE_PANELS):
            box = [b, key_start, group, panel * WIDTH]
            tma_load(v_desc, box, self.full.index(0), self.v.index(panel))

    @gluon.jit
    def wait(self):
        """Wait until TMA has written all panels: the barrier's first phase, and its only one."""
        mbarrier.wait(self.full.index(0), 0)

    @gluon.jit
    def keys(self, panel):
        """A panel of the keys."""
        return self.k.index(panel).reshape([BLOCK, WIDTH])

    @gluon.jit
    def values(self, panel):
        """A panel of the values."""
        return self.v.index(panel).reshape([BLOCK, WIDTH])

    @gluon.jit
    def close(self):
        """End the barrier's use: the compiler gives its place to something else after its last mention."""
        mbarrier.invalidate(self.full.index(0))


@gluon.jit
def make_block(k_desc, v_desc, DK: gl.constexpr, DV: gl.constexpr):
    """Room for a block's keys and values."""
    k = gl.allocate_shared_memory(k_desc.dtype, [DK // WIDTH] + k_desc.block_shape, k_desc.layout)
    v = gl.allocate_shared_memory(v_desc.dtype, [DV // WIDTH] + v_desc.block_shape, v_desc.layout)
    full = make_barriers(1, 1)  # the program arrives once, with the bytes to come
    return Block(k, v, full, DK // WIDTH, DV // WIDTH)


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
def make_lines(dtype: gl.constexpr, ROWS: gl.constexpr, BUFFERS: gl.constexpr):
    """Room for one number a row."""
    return gl.allocate_shared_memory(dtype, [BUFFERS, ROWS], gl.SwizzledSharedLayout(1, 1, 1, order=[0]))


def describe_panels(x: Tensor) -> TensorDescriptor:
    """Boxes of a panel of a block's keys or values, `[B, S, Hkv, D]`; beyond a sequence they read zeros."""
    box = [1, BLOCK.value, 1, WIDTH.value]
    layout = gl.NVMMASharedLayout.get_default_for(box, gl.bfloat16)
    return TensorDescriptor(x, list(x.shape), list(x.stride()), box, layout)
