"""What the union kernels for Hopper are made of: pipes of tiles in shared memory, tiles of tokens, a part's rows.

Legend: a pair is a batch row with a group of heads, b * HKV + group; a tile has PARTS parts of TOKENS whole tokens, one
for each group of four warps, and a part up to 64 rows (token, head). Programs are persistent: each takes one tile a
round. A step is one block of keys.
"""

# Kernels are typed by Triton, not by Python.
# pyright: reportArgumentType=false, reportCallIssue=false, reportAttributeAccessIssue=false, reportReturnType=false
# pyright: reportGeneralTypeIssues=false, reportPossiblyUnboundVariable=false
# pyright: reportAssignmentType=false, reportOperatorIssue=false
# Triton holds fields against their annotations, which therefore may not be postponed.
# Lists in kernels are added, not unpacked.
# ruff: noqa: RUF005

from triton.experimental import gluon
from triton.experimental.gluon import language as gl
from triton.experimental.gluon.language.nvidia.ampere import async_copy
from triton.experimental.gluon.language.nvidia.hopper import mbarrier, tma, warpgroup_mma
from triton.language.core import _aggregate as aggregate  # public as gluon.aggregate from Triton 3.9 on

from nsa.ops.triton.sm90 import ROWS, make_barriers, num_rounds, tile_of_round


@aggregate
class Pipe:
    """Tiles of 64 rows that one warp loads by TMA and others read, STAGES of them in turn, each in PARTS boxes.

    Number `step` lies in stage `step % STAGES`, in round `step // STAGES` of it, whose parity is the phase of its
    barriers. Columns after the first (192 = 128 + 64) lie in `tail`, which is `smem` again where there are none.
    """

    desc: tma.tensor_descriptor
    tail_desc: tma.tensor_descriptor
    smem: gl.shared_memory_descriptor
    tail: gl.shared_memory_descriptor
    full: gl.shared_memory_descriptor
    empty: gl.shared_memory_descriptor
    STAGES: gl.constexpr
    PARTS: gl.constexpr
    TAIL: gl.constexpr

    @gluon.constexpr_function
    def __init__(self, desc, tail_desc, smem, tail, full, empty, STAGES, PARTS, TAIL):
        self.desc, self.tail_desc = desc, tail_desc
        self.smem, self.tail = smem, tail
        self.full, self.empty = full, empty
        self.STAGES, self.PARTS, self.TAIL = gl.constexpr(STAGES), gl.constexpr(PARTS), gl.constexpr(TAIL)

    @gluon.constexpr_function
    def tile_bytes(self):
        """Bytes of a box of 16-bit numbers."""
        return 2 * 64 * (self.smem.shape[-1] + self.TAIL)

    @gluon.jit
    def buffer(self, step, PART: gl.constexpr = 0):
        """Where a box of a step lies, and its barriers."""
        return step % self.STAGES * self.PARTS + PART

    @gluon.jit
    def tile(self, step, PART: gl.constexpr = 0):
        """The first columns of a step's box."""
        SHAPE: gl.constexpr = matrix_shape(self.smem.shape)
        return self.smem.index(self.buffer(step, PART)).reshape(SHAPE)

    @gluon.jit
    def tail_tile(self, step, PART: gl.constexpr = 0):
        """The columns after the first; without any, the first ones again."""
        SHAPE: gl.constexpr = matrix_shape(self.tail.shape)
        return self.tail.index(self.buffer(step, PART)).reshape(SHAPE)

    @gluon.jit
    def producer_acquire(self, step, BYTES: gl.constexpr, PART: gl.constexpr = 0):
        """Wait until there is room for a box, whose `full` then waits for so many bytes."""
        buffer = self.buffer(step, PART)
        # Readers of the round before have left; before the first round, the phase of the one before has passed.
        mbarrier.wait(self.empty.index(buffer), (step // self.STAGES & 1) ^ 1)
        mbarrier.expect(self.full.index(buffer), BYTES)

    @gluon.jit
    def copy(self, step, coordinates, PART: gl.constexpr = 0):
        """Begin to copy a box to where there is room."""
        buffer = self.buffer(step, PART)
        full = self.full.index(buffer)
        tma.async_copy_global_to_shared(self.desc, coordinates, full, self.smem.index(buffer))
        if self.TAIL > 0:
            tma.async_copy_global_to_shared(self.tail_desc, coordinates, full, self.tail.index(buffer))

    @gluon.jit
    def load(self, step, coordinates, PART: gl.constexpr = 0):
        """Begin to copy a box once there is room."""
        self.producer_acquire(step, self.tile_bytes(), PART)
        self.copy(step, coordinates, PART)

    @gluon.jit
    def consumer_wait(self, step, PART: gl.constexpr = 0):
        """Wait until TMA has written a step's box."""
        mbarrier.wait(self.full.index(self.buffer(step, PART)), step // self.STAGES & 1)

    @gluon.jit
    def consumer_release(self, step, PART: gl.constexpr = 0):
        """Tell the loading warp that this group of warps has read a step's box."""
        mbarrier.arrive(self.empty.index(self.buffer(step, PART)), count=1)


@gluon.constexpr_function
def line_layout(COLUMNS):
    """Rows over four warps, 16 bytes a thread: neighbours read and write whole lines of memory."""
    return gl.BlockedLayout([1, 8], [256 // COLUMNS, COLUMNS // 8], [4, 1], [1, 0])


@gluon.constexpr_function
def matrix_shape(shape):
    """Rows and columns of boxes `[buffers, 1, tokens, heads, columns]`."""
    return [64, shape[-1]]


@gluon.jit
def make_pipe(
    desc, tail_desc, STAGES: gl.constexpr, PARTS: gl.constexpr, TAIL: gl.constexpr, CONSUMERS: gl.constexpr
):  # fmt: skip
    """A pipe each of whose boxes CONSUMERS groups of warps read."""
    smem = gl.allocate_shared_memory(desc.dtype, [STAGES * PARTS] + desc.block_shape, desc.layout)
    tail = smem
    if TAIL > 0:
        tail = gl.allocate_shared_memory(desc.dtype, [STAGES * PARTS] + tail_desc.block_shape, tail_desc.layout)
    full = make_barriers(STAGES * PARTS, 1)  # the loading warp arrives, with the bytes to come
    empty = make_barriers(STAGES * PARTS, CONSUMERS)
    return Pipe(desc, tail_desc, smem, tail, full, empty, STAGES, PARTS, TAIL)


@gluon.jit
def begin_scores(x, x_tail, pipe, step, none):
    """Begin the products of a tile's queries with a step's keys."""
    s = warpgroup_mma(x, pipe.tile(step).permute([1, 0]), none, use_acc=False, is_async=True)
    if pipe.TAIL > 0:
        s = warpgroup_mma(x_tail, pipe.tail_tile(step).permute([1, 0]), s, is_async=True)
    return s


@aggregate
class Shape:
    """Sizes that all partitions know; `num_tiles` are those of a pair.

    BOXES: whole tokens fill a part, whose rows TMA moves. Others are copied by those who need them.
    """

    T: gl.tensor
    q_start: gl.tensor
    num_tiles: gl.tensor
    num_pairs: gl.tensor
    G: gl.constexpr
    HKV: gl.constexpr
    D: gl.constexpr
    TAIL: gl.constexpr
    TOKENS: gl.constexpr
    PARTS: gl.constexpr
    BOXES: gl.constexpr
    TILE: gl.constexpr  # tokens of a tile

    @gluon.constexpr_function
    def __init__(self, T, q_start, num_tiles, num_pairs, G, HKV, D, TAIL, TOKENS, PARTS, BOXES):
        self.T, self.q_start = T, q_start
        self.num_tiles, self.num_pairs = num_tiles, num_pairs
        self.G, self.HKV = gl.constexpr(G), gl.constexpr(HKV)
        self.D, self.TAIL = gl.constexpr(D), gl.constexpr(TAIL)
        self.TOKENS, self.PARTS = gl.constexpr(TOKENS), gl.constexpr(PARTS)
        self.BOXES = gl.constexpr(BOXES)
        self.TILE = gl.constexpr(TOKENS * PARTS)

    @gluon.jit
    def num_rounds(self):
        """How many tiles this program takes."""
        return num_rounds(self.num_tiles * self.num_pairs)

    @gluon.jit
    def tile_of_round(self, number):
        """First token, batch row and group of this program's tile in a round."""
        return tile_of_round(number, self.num_tiles, self.num_pairs, self.HKV, self.TILE)

    @gluon.jit
    def part_of_round(self, number, PART: gl.constexpr):
        """A part of this program's tile in a round."""
        token, b, group = self.tile_of_round(number)
        return Part(self, token + PART * self.TOKENS, b, group)


@aggregate
class Part:
    """The rows (token, head) that a group of four warps holds: those of TOKENS tokens from `token` on."""

    shape: Shape
    token: gl.tensor
    b: gl.tensor
    group: gl.tensor

    @gluon.constexpr_function
    def __init__(self, shape, token, b, group):
        self.shape = shape
        self.token, self.b, self.group = token, b, group

    @gluon.jit
    def box(self):
        """Where the part begins in `[B, T, H, D]`."""
        return [self.b, self.token, self.group * self.shape.G, 0]

    @gluon.jit
    def copy_rows(self, x_ptr, pipe, round, PART: gl.constexpr):
        """Begin to copy the rows of `[B, T, H, D + TAIL]` to their buffer, for tiles that TMA does not move."""
        D: gl.constexpr = self.shape.D
        WIDTH: gl.constexpr = D + pipe.TAIL
        offsets, _live = self.row_offsets(D, WIDTH, line_layout(D))
        async_copy.async_copy_global_to_shared(pipe.tile(round, PART), x_ptr + offsets)
        if pipe.TAIL > 0:
            offsets, _live = self.row_offsets(pipe.TAIL, WIDTH, line_layout(pipe.TAIL))
            async_copy.async_copy_global_to_shared(pipe.tail_tile(round, PART), x_ptr + D + offsets)

    @gluon.jit
    def bits(self, ROW: gl.constexpr):
        """Each row's token, from the part's first on: its bit in the masks. Rows after the last token's have more."""
        return gl.arange(0, ROWS, ROW) // self.shape.G

    @gluon.jit
    def rows(self, ROW: gl.constexpr):
        """Each row's number in `[B, T, H]`, and whether it is there; those that are not are the last token's."""
        shape = self.shape
        row = gl.arange(0, ROWS, ROW)
        bit = row // shape.G
        live = (bit < shape.TOKENS) & (self.token + bit < shape.T)
        token = self.b.to(gl.int64) * shape.T + gl.minimum(self.token + bit, shape.T - 1)
        return token * (shape.G * shape.HKV) + self.group * shape.G + row % shape.G, live

    @gluon.jit
    def row_offsets(self, D: gl.constexpr, WIDTH: gl.constexpr, LAYOUT: gl.constexpr):
        """Where D columns of 64 rows from the part's first on lie in `[B, T, H, WIDTH]`, and which rows exist.

        Rows that do not are the last token's.
        """
        shape = self.shape
        row = self.token * shape.G + gl.arange(0, ROWS, gl.SliceLayout(1, LAYOUT))
        token = self.b.to(gl.int64) * shape.T + gl.minimum(row // shape.G, shape.T - 1)
        index = token * (shape.G * shape.HKV) + self.group * shape.G + row % shape.G
        column = gl.arange(0, D, gl.SliceLayout(0, LAYOUT))
        return index[:, None] * WIDTH + column[None, :], (row < shape.T * shape.G)[:, None]

    @gluon.jit
    def offsets(self, D: gl.constexpr, WIDTH: gl.constexpr, LAYOUT: gl.constexpr):
        """Where D columns of the rows lie in `[B, T, H, WIDTH]`, and which rows are this part's."""
        offsets, live = self.row_offsets(D, WIDTH, LAYOUT)
        whole = gl.arange(0, ROWS, gl.SliceLayout(1, LAYOUT)) < self.shape.TOKENS * self.shape.G
        return offsets, live & whole[:, None]


@aggregate
class Unions:
    """The blocks that a tile's tokens chose, of every tile: first keys, masks of tokens, and how many.

    COUNT: blocks that a token chooses.
    """

    start_ptr: gl.tensor
    mask_ptr: gl.tensor
    count_ptr: gl.tensor
    COUNT: gl.constexpr

    @gluon.constexpr_function
    def __init__(self, start_ptr, mask_ptr, count_ptr, COUNT):
        self.start_ptr, self.mask_ptr, self.count_ptr = start_ptr, mask_ptr, count_ptr
        self.COUNT = gl.constexpr(COUNT)

    @gluon.jit
    def of_tile(self, shape, token, b, group):
        """First keys and masks of the tile that begins at a token, and how many blocks there are."""
        number = (b * shape.HKV + group).to(gl.int64) * shape.num_tiles + token // shape.TILE
        offset = number * (shape.TILE * self.COUNT)
        return self.start_ptr + offset, self.mask_ptr + offset, gl.load(self.count_ptr + number)


@gluon.jit
def tokens_of_part(mask, PART: gl.constexpr, TOKENS: gl.constexpr):
    """Bits of the tokens that a group of warps holds."""
    return ((mask >> (PART * TOKENS)) & ((1 << TOKENS) - 1)).to(gl.int32)
