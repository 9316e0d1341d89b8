"""What the Gluon kernels for Hopper share: pipes, tiles of persistent programs, boxes by TMA, copies of rows.

The partitions of a program run side by side and meet at barriers alone. A `Pipe` holds tiles that one partition, the
producer, fills and others, the consumers, read; a `Schedule` says which `Tile` of the queries a program takes in each
round; a `Shape` says where the rows of a tile lie.

Legend: D columns of a head that are multiplied first, TAIL those after them (192 = 128 + 64); HKV groups of G heads;
row = token * G + head of the group; a pair is a sequence with a group, b * HKV + group.
"""

# Kernels are typed by Triton, not by Python.
# pyright: reportArgumentType=false, reportCallIssue=false, reportAttributeAccessIssue=false, reportReturnType=false
# pyright: reportGeneralTypeIssues=false, reportPossiblyUnboundVariable=false, reportAssignmentType=false
# Lists in kernels are added, not unpacked.
# ruff: noqa: RUF005
# No postponed annotations: Triton holds the fields of aggregates against them.

from torch import Tensor
from triton.experimental import gluon
from triton.experimental.gluon import language as gl
from triton.experimental.gluon.language.nvidia.ampere import async_copy
from triton.experimental.gluon.language.nvidia.hopper import mbarrier, tma, warpgroup_mma
from triton.experimental.gluon.nvidia.hopper import TensorDescriptor
from triton.language.core import _aggregate as aggregate  # public as gluon.aggregate from Triton 3.9 on

# Triton 3.8 gave the copies new names; 3.7 has the old ones alone, 3.9 the new ones.
tma_load = tma.async_load if hasattr(tma, "async_load") else tma.async_copy_global_to_shared
tma_store = tma.async_store if hasattr(tma, "async_store") else tma.async_copy_shared_to_global
copy_async = async_copy.async_load if hasattr(async_copy, "async_load") else async_copy.async_copy_global_to_shared

ROWS = gl.constexpr(64)  # rows of a group of four warps, as one wgmma takes
KEYS = gl.constexpr(64)  # keys of a step: a thread holds 32 of 64 by 64 scores, which leaves registers for sums


def describe_box(x: Tensor, tokens: int, heads: int) -> TensorDescriptor:
    """Boxes of tokens with some heads of `[B, T, H, D]`; beyond a sequence they read zeros and write nothing."""
    box = [1, tokens, heads, x.shape[3]]
    layout = gl.NVMMASharedLayout.get_default_for(box, gl.bfloat16)
    return TensorDescriptor(x, list(x.shape), list(x.stride()), box, layout)


def describe_parts(x: Tensor, size: int, tokens: int, heads: int) -> tuple[TensorDescriptor, TensorDescriptor]:
    """Boxes of the first `size` columns, and of the others where there are any."""
    first = describe_box(x[..., :size], tokens, heads)
    return first, first if x.shape[3] == size else describe_box(x[..., size:], tokens, heads)


@gluon.constexpr_function
def wgmma_layout(COLUMNS):
    """Sums of 64 rows by some columns, as wgmma leaves them with four warps."""
    return gl.NVMMADistributedLayout([3, 0], [4, 1], [16, COLUMNS, 16])


@gluon.constexpr_function
def line_layout(COLUMNS):
    """Rows spread over four warps: neighbours read and write whole lines of memory."""
    # 16 bytes, 8 numbers, are the most that a thread copies at once: 256 numbers a warp.
    return gl.BlockedLayout([1, 8], [256 // COLUMNS, COLUMNS // 8], [4, 1], [1, 0])


@gluon.constexpr_function
def matrix_shape(shape):
    """Rows and columns of a tile whose last size is that of its columns."""
    rows = 1
    for size in shape[:-1]:
        rows *= size
    return [rows, shape[-1]]


@gluon.jit
def as_matrix(tile):
    """A tile of shared memory as rows and columns."""
    SHAPE: gl.constexpr = matrix_shape(tile.shape)
    return tile.reshape(SHAPE)


@aggregate
class Tile:
    """Rows from `row` on of a group of heads in sequence `b`."""

    row: gl.tensor
    b: gl.tensor
    group: gl.tensor

    @gluon.constexpr_function
    def __init__(self, row, b, group):
        self.row, self.b, self.group = row, b, group

    @gluon.jit
    def part(self, PART: gl.constexpr):
        """The rows of a group of four warps."""
        return Tile(self.row + PART * ROWS, self.b, self.group)


@aggregate
class Schedule:
    """Which tiles a persistent program takes: they are dealt out there and back, the heaviest (last) first.

    Attributes:
        num_tiles: tiles of TILE rows, or of what else is counted, for a pair.
        num_pairs: pairs of a sequence and a group of heads.
    """

    num_tiles: gl.tensor
    num_pairs: gl.tensor
    HKV: gl.constexpr
    TILE: gl.constexpr

    @gluon.constexpr_function
    def __init__(self, num_tiles, num_pairs, HKV, TILE):
        self.num_tiles, self.num_pairs = num_tiles, num_pairs
        self.HKV, self.TILE = gl.constexpr(HKV), gl.constexpr(TILE)

    @gluon.jit
    def num_rounds(self):
        """How many tiles the program takes."""
        return num_rounds(self.num_tiles * self.num_pairs)

    @gluon.jit
    def tile(self, round):
        """The program's tile in a round."""
        row, b, group = tile_of_round(round, self.num_tiles, self.num_pairs, self.HKV, self.TILE)
        return Tile(row, b, group)


@aggregate
class Shape:
    """Sizes of queries and what has their rows: `[B, T, HKV * G, D + TAIL]`.

    BOXES says whether whole tokens fill a tile, so that TMA can copy it as a box.
    """

    T: gl.tensor
    G: gl.constexpr
    HKV: gl.constexpr
    D: gl.constexpr
    TAIL: gl.constexpr
    BOXES: gl.constexpr

    @gluon.constexpr_function
    def __init__(self, T, G, HKV, D, TAIL, BOXES):
        self.T = T
        self.G, self.HKV, self.D, self.TAIL = gl.constexpr(G), gl.constexpr(HKV), gl.constexpr(D), gl.constexpr(TAIL)
        self.BOXES = gl.constexpr(BOXES)

    @gluon.jit
    def token(self, row):
        """Token of a row; of rows beyond the sequence the last one."""
        return gl.minimum(row // self.G, self.T - 1)

    @gluon.jit
    def index(self, tile, row):
        """Where a row of a tile's group lies in `[B, T, H]`."""
        first = (tile.b.to(gl.int64) * self.T + self.token(row)) * (self.G * self.HKV)
        return first + tile.group * self.G + row % self.G

    @gluon.jit
    def box(self, tile):
        """Coordinates of a tile in `[B, T, H, D]`."""
        return [tile.b, tile.row // self.G, tile.group * self.G, 0]

    @gluon.jit
    def offsets(self, tile, NUM: gl.constexpr, COLUMNS: gl.constexpr, WIDTH: gl.constexpr, LAYOUT: gl.constexpr):
        """Where the first COLUMNS columns of NUM rows lie in `[B, T, H, WIDTH]`, and which rows exist."""
        row = tile.row + gl.arange(0, NUM, gl.SliceLayout(1, LAYOUT))
        column = gl.arange(0, COLUMNS, gl.SliceLayout(0, LAYOUT))
        return self.index(tile, row)[:, None] * WIDTH + column[None, :], (row < self.T * self.G)[:, None]

    @gluon.jit
    def copy_rows(self, x_ptr, smem, tile, WIDTH: gl.constexpr):
        """Threads begin to copy rows of `[B, T, H, WIDTH]`, where no box fits; those beyond are the last token's."""
        matrix = as_matrix(smem)
        LAYOUT: gl.constexpr = line_layout(matrix.shape[1])
        offsets, _live = self.offsets(tile, matrix.shape[0], matrix.shape[1], WIDTH, LAYOUT)
        copy_async(matrix, x_ptr + offsets)


@aggregate
class Pipe:
    """Tiles that a producer fills and consumers empty, STAGES of them in turn.

    `step` counts the fillings from 0: number `step` lies in stage `step % STAGES`, in round `step // STAGES` of it; the
    parity of the round is the phase that a barrier is waited for with. A stage has PARTS tiles with their own barriers.

    Attributes:
        desc, tail_desc: boxes of the tensor that TMA copies tiles from; None if threads alone do.
        smem: `[STAGES * PARTS, ..., D]`.
        tail: the same for the TAIL columns after the first D; `smem` if there are none.
        full: barriers that wait for all bytes of a tile.
        empty: barriers that wait for all consumers of a tile.
    """

    desc: tma.tensor_descriptor | gl.constexpr
    tail_desc: tma.tensor_descriptor | gl.constexpr
    smem: gl.shared_memory_descriptor
    tail: gl.shared_memory_descriptor
    full: gl.shared_memory_descriptor
    empty: gl.shared_memory_descriptor
    STAGES: gl.constexpr
    PARTS: gl.constexpr
    TAIL: gl.constexpr

    @gluon.constexpr_function
    def __init__(self, desc, tail_desc, smem, tail, full, empty, STAGES, PARTS, TAIL):
        self.desc = gl.constexpr(None) if desc is None else desc
        self.tail_desc = gl.constexpr(None) if tail_desc is None else tail_desc
        self.smem, self.tail, self.full, self.empty = smem, tail, full, empty
        self.STAGES, self.PARTS, self.TAIL = gl.constexpr(STAGES), gl.constexpr(PARTS), gl.constexpr(TAIL)

    @gluon.constexpr_function
    def tile_bytes(self):
        """Bytes of a tile of 16-bit numbers."""
        rows, columns = matrix_shape(self.smem.shape[1:])
        return 2 * rows * (columns + self.TAIL)

    @gluon.jit
    def buffer(self, step, PART: gl.constexpr = 0):
        """Number of a tile's place in shared memory and of its barriers."""
        return step % self.STAGES * self.PARTS + PART

    @gluon.jit
    def tile(self, step, PART: gl.constexpr = 0):
        """The first D columns of a tile."""
        return as_matrix(self.smem.index(self.buffer(step, PART)))

    @gluon.jit
    def tail_tile(self, step, PART: gl.constexpr = 0):
        """The TAIL columns after them; the first D again if there are none."""
        return as_matrix(self.tail.index(self.buffer(step, PART)))

    @gluon.jit
    def producer_wait(self, step, PART: gl.constexpr = 0):
        """Wait until a tile is free."""
        # Every consumer has let go of the tile's round before. Before the first there is none: a fresh barrier takes
        # the opposite phase for over, so that the producer does not wait.
        mbarrier.wait(self.empty.index(self.buffer(step, PART)), (step // self.STAGES & 1) ^ 1)

    @gluon.jit
    def producer_acquire(self, step, BYTES: gl.constexpr, PART: gl.constexpr = 0):
        """Wait until a tile is free and announce BYTES for it, which counts as an arrival."""
        self.producer_wait(step, PART)
        mbarrier.expect(self.full.index(self.buffer(step, PART)), BYTES)

    @gluon.jit
    def copy(self, step, coordinates, PART: gl.constexpr = 0):
        """TMA begins to copy a box to a tile that was acquired."""
        buffer = self.buffer(step, PART)
        full = self.full.index(buffer)
        tma_load(self.desc, coordinates, full, self.smem.index(buffer))
        if self.TAIL > 0:
            tma_load(self.tail_desc, coordinates, full, self.tail.index(buffer))

    @gluon.jit
    def load(self, step, coordinates, PART: gl.constexpr = 0):
        """Fill a tile with a box once it is free."""
        self.producer_acquire(step, self.tile_bytes(), PART)
        self.copy(step, coordinates, PART)

    @gluon.jit
    def copy_rows(self, step, x_ptr, tile, shape, PART: gl.constexpr = 0):
        """Threads begin to copy the rows of a tile of queries, see `Shape.copy_rows`."""
        buffer = self.buffer(step, PART)
        shape.copy_rows(x_ptr, self.smem.index(buffer), tile, shape.D + self.TAIL)
        if self.TAIL > 0:
            shape.copy_rows(x_ptr + shape.D, self.tail.index(buffer), tile, shape.D + self.TAIL)

    @gluon.jit
    def consumer_wait(self, step, PART: gl.constexpr = 0):
        """Wait until a tile is full."""
        # All of its bytes have arrived, which the producer announced.
        mbarrier.wait(self.full.index(self.buffer(step, PART)), step // self.STAGES & 1)

    @gluon.jit
    def consumer_release(self, step, PART: gl.constexpr = 0):
        """Let go of a tile: what read it must be over."""
        # The producer waits for all consumers before it fills the tile again.
        mbarrier.arrive(self.empty.index(self.buffer(step, PART)), count=1)


@gluon.jit
def make_barriers(NUM: gl.constexpr, ARRIVALS: gl.constexpr):
    """Barriers whose phases end after so many arrivals (and the bytes that were announced)."""
    barriers = gl.allocate_shared_memory(gl.int64, [NUM, 1], mbarrier.MBarrierLayout())
    for i in gl.static_range(NUM):
        mbarrier.init(barriers.index(i), count=ARRIVALS)
    return barriers


@gluon.jit
def make_pipe(
    desc, tail_desc, STAGES: gl.constexpr, PARTS: gl.constexpr, TAIL: gl.constexpr, CONSUMERS: gl.constexpr,
    PRODUCERS: gl.constexpr = 1,
):  # fmt: skip
    """A pipe with its shared memory; a fence must follow before partitions use its barriers.

    Args:
        CONSUMERS: arrivals that free a tile; 0 if each is filled once.
        PRODUCERS: arrivals that fill it, beside bytes.
    """
    smem = gl.allocate_shared_memory(desc.dtype, [STAGES * PARTS] + desc.block_shape, desc.layout)
    tail = smem
    if TAIL > 0:
        tail = gl.allocate_shared_memory(desc.dtype, [STAGES * PARTS] + tail_desc.block_shape, tail_desc.layout)
    full = make_barriers(STAGES * PARTS, PRODUCERS)
    empty = full
    if CONSUMERS > 0:
        empty = make_barriers(STAGES * PARTS, CONSUMERS)
    return Pipe(desc, tail_desc, smem, tail, full, empty, STAGES, PARTS, TAIL)


@gluon.jit
def make_companion(pipe, desc):
    """Tiles of another tensor beside those of a pipe, under the same barriers."""
    smem = gl.allocate_shared_memory(desc.dtype, [pipe.STAGES * pipe.PARTS] + desc.block_shape, desc.layout)
    return Pipe(desc, desc, smem, smem, pipe.full, pipe.empty, pipe.STAGES, pipe.PARTS, 0)


@gluon.jit
def begin_scores(x, x_tail, pipe, step, none):
    """Begin the products of a tile's rows with those of a step, which have arrived.

    Rows are queries and a step holds keys, or the other way round. `none` is where the sums begin: wgmma asks for some,
    though these are not used.
    """
    s = warpgroup_mma(x, pipe.tile(step).permute([1, 0]), none, use_acc=False, is_async=True)
    if pipe.TAIL > 0:
        s = warpgroup_mma(x_tail, pipe.tail_tile(step).permute([1, 0]), s, is_async=True)
    return s


@gluon.jit
def num_rounds(num_tiles):
    """How many tiles a program takes when they are dealt out there and back, the heaviest first."""
    programs = gl.num_programs(0)
    full = num_tiles // programs
    number = gl.program_id(0)
    if full % 2 == 1:
        number = programs - 1 - number
    return full + (number < num_tiles - full * programs).to(gl.int32)


@gluon.jit
def tile_of_round(round, num_tiles, num_pairs, HKV: gl.constexpr, TILE: gl.constexpr):
    """First row, sequence and group of a program's tile in a round."""
    # There and back: who had the heaviest tile of a round has the lightest of the next one.
    programs = gl.num_programs(0)
    number = gl.program_id(0)
    if round % 2 == 1:
        number = programs - 1 - number
    work = round * programs + number
    return (num_tiles - 1 - work // num_pairs) * TILE, work % num_pairs // HKV, work % num_pairs % HKV
