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
from triton.experimental.gluon.language.nvidia.hopper import mbarrier, tma, warpgroup_mma
from triton.language.core import _aggregate as aggregate  # public as gluon.aggregate from Triton 3.9 on

from nsa.ops.triton.sm90 import ROWS, copy_rows, make_barriers, num_rounds, row_offsets, tile_of_round


@aggregate
class Pipe:
    """Tiles that one warp loads by TMA and others read, STAGES of them in turn, each in PARTS boxes of 64 rows.

    Number `step` lies in stage `step % STAGES`, in round `step // STAGES` of it; each box of a stage has its buffer.
    Columns after the first D (192 = 128 + 64) lie in `tail`, which is `smem` again where there are none.
    """

    desc: tma.tensor_descriptor
    tail_desc: tma.tensor_descriptor
    smem: gl.shared_memory_descriptor
    tail: gl.shared_memory_descriptor
    full: gl.shared_memory_descriptor
    empty: gl.shared_memory_descriptor
    STAGES: gl.constexpr
    PARTS: gl.constexpr
    D: gl.constexpr
    TAIL: gl.constexpr

    @gluon.constexpr_function
    def __init__(self, desc, tail_desc, smem, tail, full, empty, STAGES, PARTS, D, TAIL):
        self.desc, self.tail_desc = desc, tail_desc
        self.smem, self.tail = smem, tail
        self.full, self.empty = full, empty
        self.STAGES, self.PARTS = gl.constexpr(STAGES), gl.constexpr(PARTS)
        self.D, self.TAIL = gl.constexpr(D), gl.constexpr(TAIL)

    @gluon.constexpr_function
    def box_bytes(self):
        """Bytes of a box of 16-bit numbers."""
        return 2 * 64 * (self.D + self.TAIL)

    @gluon.jit
    def buffer(self, step, part=0):
        """Where a box of a step lies."""
        return step % self.STAGES * self.PARTS + part

    @gluon.jit
    def phase(self, step):
        """Parity of the round, for which `full` is waited for."""
        return step // self.STAGES & 1

    @gluon.jit
    def claim(self, step, part, BYTES: gl.constexpr):
        """A buffer for a box, once it is free, whose `full` then waits for so many bytes."""
        buffer = self.buffer(step, part)
        # Readers of the round before have left; before the first round, the parity of the one before has passed.
        mbarrier.wait(self.empty.index(buffer), self.phase(step) ^ 1)
        mbarrier.expect(self.full.index(buffer), BYTES)
        return buffer

    @gluon.jit
    def copy(self, buffer, box):
        """Begin to copy a box to a buffer that was claimed."""
        tma.async_copy_global_to_shared(self.desc, box, self.full.index(buffer), self.smem.index(buffer))
        if self.TAIL > 0:
            tma.async_copy_global_to_shared(self.tail_desc, box, self.full.index(buffer), self.tail.index(buffer))

    @gluon.jit
    def load(self, step, box, part=0):
        """Begin to copy a box once there is room."""
        self.copy(self.claim(step, part, self.box_bytes()), box)

    @gluon.jit
    def wait(self, step, part=0):
        """Wait until TMA has written a step's box."""
        mbarrier.wait(self.full.index(self.buffer(step, part)), self.phase(step))

    @gluon.jit
    def release(self, step, part=0):
        """Tell the loading warp that this group of warps has read a step's box."""
        mbarrier.arrive(self.empty.index(self.buffer(step, part)), count=1)

    @gluon.jit
    def tile(self, step, part=0):
        """The first D columns of a step's box."""
        return self.smem.index(self.buffer(step, part)).reshape([ROWS, self.D])

    @gluon.jit
    def tail_tile(self, step, part=0):
        """The columns after the first D; without any, the first ones again."""
        if self.TAIL > 0:
            tile = self.tail.index(self.buffer(step, part)).reshape([ROWS, self.TAIL])
        else:
            tile = self.tile(step, part)
        return tile


@gluon.jit
def make_pipe(
    desc, tail_desc, STAGES: gl.constexpr, PARTS: gl.constexpr, READERS: gl.constexpr, D: gl.constexpr,
    TAIL: gl.constexpr,
):  # fmt: skip
    """A pipe each of whose boxes READERS groups of warps read."""
    smem = gl.allocate_shared_memory(desc.dtype, [STAGES * PARTS] + desc.block_shape, desc.layout)
    tail = smem
    if TAIL > 0:
        tail = gl.allocate_shared_memory(desc.dtype, [STAGES * PARTS] + tail_desc.block_shape, tail_desc.layout)
    full = make_barriers(STAGES * PARTS, 1)  # the loading warp arrives, with the bytes to come
    empty = make_barriers(STAGES * PARTS, READERS)
    return Pipe(desc, tail_desc, smem, tail, full, empty, STAGES, PARTS, D, TAIL)


@gluon.jit
def begin_scores(q, q_tail, k, k_tail, none, TAIL: gl.constexpr):
    """Begin the products of a tile's queries with a block's keys."""
    s = warpgroup_mma(q, k.permute([1, 0]), none, use_acc=False, is_async=True)
    if TAIL > 0:
        s = warpgroup_mma(q_tail, k_tail.permute([1, 0]), s, is_async=True)
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
    def first_row(self):
        """The first row, among the rows of a pair."""
        return self.token * self.shape.G

    @gluon.jit
    def copy(self, x_ptr, pipe, round, PART: gl.constexpr):
        """Begin to copy the rows of `[B, T, H, D + TAIL]` to their buffer, for tiles that TMA does not move."""
        shape = self.shape
        row, buffer = self.first_row(), pipe.buffer(round, PART)
        D: gl.constexpr = pipe.D
        WIDTH: gl.constexpr = pipe.D + pipe.TAIL
        G: gl.constexpr = shape.G
        HKV: gl.constexpr = shape.HKV
        copy_rows(x_ptr, pipe.smem.index(buffer), row, self.b, self.group, shape.T, G, HKV, D, WIDTH, ROWS)
        if pipe.TAIL > 0:
            tile = pipe.tail.index(buffer)
            copy_rows(x_ptr + D, tile, row, self.b, self.group, shape.T, G, HKV, pipe.TAIL, WIDTH, ROWS)

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
    def offsets(self, D: gl.constexpr, WIDTH: gl.constexpr, LAYOUT: gl.constexpr):
        """Where D columns of the rows lie in `[B, T, H, WIDTH]`, and which rows are this part's."""
        shape = self.shape
        offsets, live = row_offsets(
            self.first_row(), self.b, self.group, shape.T, shape.G, shape.HKV, D, WIDTH, ROWS, LAYOUT
        )  # fmt: skip
        whole = gl.arange(0, ROWS, gl.SliceLayout(1, LAYOUT)) < shape.TOKENS * shape.G
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
