"""What the union kernels for Hopper share: tiles of tokens, a part's rows, the unions of tiles; pipes are `sm90.py`'s.

Legend: a pair is a batch row with a group of heads, b * HKV + group; a tile has PARTS parts of TOKENS whole tokens, one
for each group of four warps, and a part up to 64 rows (token, head). Programs are persistent: each takes one tile a
round. A step is one block of keys.
"""

# Kernels are typed by Triton, not by Python.
# pyright: reportArgumentType=false, reportCallIssue=false, reportAttributeAccessIssue=false, reportReturnType=false
# pyright: reportGeneralTypeIssues=false, reportPossiblyUnboundVariable=false
# pyright: reportAssignmentType=false, reportOperatorIssue=false
# Triton holds fields against their annotations, which therefore may not be postponed.

from triton.experimental import gluon
from triton.experimental.gluon import language as gl
from triton.language.core import _aggregate as aggregate  # public as gluon.aggregate from Triton 3.9 on

from nsa.ops.triton.sm90 import ROWS, copy_async, line_layout, num_rounds, tile_of_round


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
        # All 64: where a part's tokens do not fill them, rows of the next part are read too, and never stored.
        offsets, _live = self.row_offsets(D, WIDTH, line_layout(D))
        copy_async(pipe.tile(round, PART), x_ptr + offsets)
        if pipe.TAIL > 0:
            offsets, _live = self.row_offsets(pipe.TAIL, WIDTH, line_layout(pipe.TAIL))
            copy_async(pipe.tail_tile(round, PART), x_ptr + D + offsets)

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
        # 64 bits: the callers multiply by the size of a row.
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
        # Room for the choices of all of its tokens, as they may have none in common.
        offset = number * (shape.TILE * self.COUNT)
        return self.start_ptr + offset, self.mask_ptr + offset, gl.load(self.count_ptr + number)


@gluon.jit
def tokens_of_part(mask, PART: gl.constexpr, TOKENS: gl.constexpr):
    """Bits of the tokens that a group of warps holds."""
    # 64 rows are at most 21 tokens of three heads, and three parts fit the 64 bits of a mask.
    return ((mask >> (PART * TOKENS)) & ((1 << TOKENS) - 1)).to(gl.int32)
