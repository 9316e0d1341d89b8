"""Which keys queries see and which queries see keys, of tiles and of rows, for the dense kernels on Hopper.

Both ends of the keys that a query sees never decrease with the query, and the other way round: the first and the last
row of a tile tell all of it. `DenseMask` is for kernels that hold queries, as is `ForcedMask` of `forced_sm90.py` with
the same methods; `InverseMask` for those that hold keys.
"""

# Kernels are typed by Triton, not by Python.
# pyright: reportArgumentType=false, reportCallIssue=false, reportAttributeAccessIssue=false, reportReturnType=false
# pyright: reportGeneralTypeIssues=false, reportPossiblyUnboundVariable=false
# pyright: reportAssignmentType=false, reportOperatorIssue=false
# No postponed annotations: Triton holds the fields of aggregates against them.

from triton.experimental import gluon
from triton.experimental.gluon import language as gl
from triton.language.core import _aggregate as aggregate  # public as gluon.aggregate from Triton 3.9 on

from nsa.ops.triton.layout import key_interval, query_interval


@aggregate
class Interval:
    """Columns of a tile of scores: rows take some of `begin` to `end`, and all of `full_begin` to `full_end`."""

    begin: gl.tensor
    full_begin: gl.tensor
    full_end: gl.tensor
    end: gl.tensor

    @gluon.constexpr_function
    def __init__(self, begin, full_begin, full_end, end):
        self.begin, self.full_begin, self.full_end, self.end = begin, full_begin, full_end, end

    @gluon.jit
    def key(self, number):
        """Where a key lies, of which `begin` and `end` are numbers."""
        return number


@aggregate
class ScoreMask:
    """Columns of scores that each row takes: `begin` to `end`, and with EARLY also `early_begin` to `early_end`.

    All rows take those from `full_begin` to `full_end`. Without LEFT there are none before `begin`.
    """

    begin: gl.tensor
    end: gl.tensor
    early_begin: gl.tensor
    early_end: gl.tensor
    full_begin: gl.tensor
    full_end: gl.tensor
    LEFT: gl.constexpr
    EARLY: gl.constexpr

    @gluon.constexpr_function
    def __init__(self, begin, end, early_begin, early_end, full_begin, full_end, LEFT, EARLY):
        self.begin, self.end, self.early_begin, self.early_end = begin, end, early_begin, early_end
        self.full_begin, self.full_end = full_begin, full_end
        self.LEFT, self.EARLY = gl.constexpr(LEFT), gl.constexpr(EARLY)

    @gluon.jit
    def apply(self, x, start, HIDDEN: gl.constexpr):
        """The columns from `start` on, with HIDDEN where a row does not take one."""
        NUM: gl.constexpr = x.shape[1]
        # Most steps lie within what all rows take and need no mask.
        if (start < self.full_begin) | (start + NUM > self.full_end):
            column = start + gl.arange(0, NUM, gl.SliceLayout(0, x.type.layout))
            taken = column[None, :] < self.end[:, None]
            if self.LEFT:
                taken = taken & (column[None, :] >= self.begin[:, None])
            if self.EARLY:
                early = (column[None, :] >= self.early_begin[:, None]) & (column[None, :] < self.early_end[:, None])
                taken = taken | early
            x = gl.where(taken, x, HIDDEN)
        return x


@aggregate
class DenseMask:
    """Which of S keys a query sees in the compressed (WINDOW 0) or the window branch; see `key_interval`."""

    doc_ptr: gl.tensor
    cmp_ptr: gl.tensor
    S: gl.tensor
    q_start: gl.tensor
    k_start: gl.tensor
    SIZE: gl.constexpr
    STRIDE: gl.constexpr
    WINDOW: gl.constexpr
    PACKED: gl.constexpr

    @gluon.constexpr_function
    def __init__(self, doc_ptr, cmp_ptr, S, q_start, k_start, SIZE, STRIDE, WINDOW, PACKED):
        self.doc_ptr, self.cmp_ptr = doc_ptr, cmp_ptr
        self.S, self.q_start, self.k_start = S, q_start, k_start
        self.SIZE, self.STRIDE = gl.constexpr(SIZE), gl.constexpr(STRIDE)
        self.WINDOW, self.PACKED = gl.constexpr(WINDOW), gl.constexpr(PACKED)

    @gluon.jit
    def of_token(self, t):
        """First key that a query sees, and their end."""
        return key_interval(
            t, self.doc_ptr, self.cmp_ptr, self.S, self.q_start, self.k_start, self.SIZE, self.STRIDE, self.WINDOW,
            self.PACKED,
        )  # fmt: skip

    @gluon.jit
    def of_tile(self, tile, shape, NUM: gl.constexpr):
        """Keys of a tile's first NUM rows."""
        low_begin, low_end = self.of_token(shape.token(tile.row))
        high_begin, high_end = self.of_token(shape.token(tile.row + NUM - 1))
        return Interval(low_begin, high_begin, low_end, high_end)

    @gluon.jit
    def of_rows(self, _keys, rows, shape, row):
        """Keys that rows of a tile's part see, by `row`."""
        full = self.of_tile(rows, shape, row.shape[0])
        begin, end = self.of_token(shape.token(row))
        LEFT: gl.constexpr = self.PACKED or self.WINDOW > 0
        return ScoreMask(begin, end, begin, begin, full.full_begin, full.full_end, LEFT, False)


@aggregate
class InverseMask:
    """Which of the rows from `row_begin` to `row_end`, those of a split, see a key of S; see `query_interval`."""

    doc_ptr: gl.tensor
    first_ptr: gl.tensor
    end_ptr: gl.tensor
    S: gl.tensor
    q_start: gl.tensor
    k_start: gl.tensor
    row_begin: gl.tensor
    row_end: gl.tensor
    SIZE: gl.constexpr
    STRIDE: gl.constexpr
    WINDOW: gl.constexpr
    PACKED: gl.constexpr

    @gluon.constexpr_function
    def __init__(
        self, doc_ptr, first_ptr, end_ptr, S, q_start, k_start, row_begin, row_end, SIZE, STRIDE, WINDOW, PACKED
    ):  # fmt: skip
        self.doc_ptr, self.first_ptr, self.end_ptr = doc_ptr, first_ptr, end_ptr
        self.S, self.q_start, self.k_start = S, q_start, k_start
        self.row_begin, self.row_end = row_begin, row_end
        self.SIZE, self.STRIDE = gl.constexpr(SIZE), gl.constexpr(STRIDE)
        self.WINDOW, self.PACKED = gl.constexpr(WINDOW), gl.constexpr(PACKED)

    @gluon.jit
    def of_key(self, key, shape):
        """First query that sees a key, and their end."""
        return query_interval(
            key, self.first_ptr, self.end_ptr, shape.T, self.q_start, self.k_start, self.SIZE, self.STRIDE,
            self.WINDOW, self.PACKED,
        )  # fmt: skip

    @gluon.jit
    def of_tile(self, low, NUM: gl.constexpr, shape):
        """Rows that see NUM keys from `low` on."""
        key_low = gl.minimum(low, self.S - 1)
        key_high = gl.maximum(gl.minimum(low + NUM, self.S) - 1, key_low)
        low_begin, low_end = self.of_key(key_low, shape)
        high_begin, high_end = self.of_key(key_high, shape)
        # Boxes of lse and delta begin at 16 bytes; rows before the first are masked like any other.
        begin = gl.maximum(low_begin * shape.G, self.row_begin) // 4 * 4
        end = gl.minimum(high_end * shape.G, self.row_end)
        full = low + NUM <= self.S
        if self.PACKED and self.WINDOW > 0:  # rows outside any document see nothing
            full = full & (gl.load(self.doc_ptr + key_high) < shape.T)
        full_begin = gl.where(full, gl.maximum(high_begin * shape.G, self.row_begin), self.row_end)
        return Interval(begin, full_begin, gl.minimum(low_end * shape.G, self.row_end), end)

    @gluon.jit
    def of_keys(self, rows, key, shape):
        """Rows that see each of a tile's keys, of which `rows` are those of the tile."""
        near = gl.minimum(key, self.S - 1)
        begin, end = self.of_key(near, shape)
        begin = gl.maximum(begin * shape.G, self.row_begin)
        end = gl.where(key < self.S, gl.minimum(end * shape.G, self.row_end), 0)
        if self.PACKED and self.WINDOW > 0:  # keys outside any document
            end = gl.where(gl.load(self.doc_ptr + near) < shape.T, end, 0)
        return ScoreMask(begin, end, begin, begin, rows.full_begin, rows.full_end, True, False)
