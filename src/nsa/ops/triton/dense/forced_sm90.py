"""Which keys `forward_sm90.py` takes for the forced blocks: two intervals for each row, numbered as one for a tile.

Numbers below `early` are the initial blocks of the tile's first document, in whole steps; from there on they are the
keys from the first local block of the tile's first token on. Later documents of a tile begin within it, so that all of
their keys are among these.
"""

# Kernels are typed by Triton, not by Python.
# pyright: reportArgumentType=false, reportCallIssue=false, reportAttributeAccessIssue=false, reportReturnType=false
# pyright: reportGeneralTypeIssues=false, reportPossiblyUnboundVariable=false
# pyright: reportAssignmentType=false, reportOperatorIssue=false
# No postponed annotations: Triton holds the fields of aggregates against them.

from triton.experimental import gluon
from triton.experimental.gluon import language as gl
from triton.language.core import _aggregate as aggregate  # public as gluon.aggregate from Triton 3.9 on

from nsa.ops.triton.dense.mask_sm90 import ScoreMask
from nsa.ops.triton.layout import local_start, num_early
from nsa.ops.triton.sm90 import KEYS


@aggregate
class ForcedKeys:
    """Numbered keys of a tile from 0 to `end`: its first document, the first local number, and the first local key."""

    doc: gl.tensor
    early: gl.tensor
    local: gl.tensor
    begin: gl.tensor
    end: gl.tensor

    @gluon.constexpr_function
    def __init__(self, doc, early, local, begin, end):
        self.doc, self.early, self.local, self.begin, self.end = doc, early, local, begin, end

    @gluon.jit
    def key(self, number):
        """Where the key with a number lies; `early` is a multiple of KEYS, so that a step lies on one side of it."""
        return gl.where(number < self.early, self.doc + number, self.local + (number - self.early))


@aggregate
class ForcedMask:
    """Which of S keys a query sees in the forced blocks: INIT initial ones and LOCAL local ones of BLOCK keys."""

    doc_ptr: gl.tensor
    S: gl.tensor
    q_start: gl.tensor
    BLOCK: gl.constexpr
    INIT: gl.constexpr
    LOCAL: gl.constexpr
    PACKED: gl.constexpr

    @gluon.constexpr_function
    def __init__(self, doc_ptr, S, q_start, BLOCK, INIT, LOCAL, PACKED):
        self.doc_ptr, self.S, self.q_start = doc_ptr, S, q_start
        self.BLOCK, self.INIT, self.LOCAL = gl.constexpr(BLOCK), gl.constexpr(INIT), gl.constexpr(LOCAL)
        self.PACKED = gl.constexpr(PACKED)

    @gluon.jit
    def document(self, t):
        """Where the documents of tokens begin."""
        doc = t * 0
        if self.PACKED:
            doc = gl.load(self.doc_ptr + t)
        return doc

    @gluon.jit
    def local_start(self, t, doc):
        """First key of a query's local blocks."""
        return local_start(t + self.q_start, doc, self.BLOCK, self.LOCAL)

    @gluon.jit
    def num_early(self, t, doc):
        """Keys of a query's initial blocks before the local ones."""
        return num_early(t + self.q_start, doc, self.BLOCK, self.INIT, self.LOCAL)

    @gluon.jit
    def local_end(self, t):
        """End of the keys that a query sees."""
        return gl.minimum(t + self.q_start + 1, self.S)

    @gluon.jit
    def of_tile(self, tile, shape, NUM: gl.constexpr):
        """Numbered keys of a tile's first NUM rows."""
        low, high = shape.token(tile.row), shape.token(tile.row + NUM - 1)
        doc = self.document(low)
        early = gl.cdiv(self.num_early(high, doc), KEYS) * KEYS
        local = self.local_start(low, doc)
        begin = 0
        return ForcedKeys(doc, early, local, begin, early + self.local_end(high) - local)

    @gluon.jit
    def of_rows(self, keys, rows, shape, row):
        """Numbers that rows of a tile's part see, by `row`: local ones and early ones."""
        t = shape.token(row)
        doc = self.document(t)
        begin = keys.early + self.local_start(t, doc) - keys.local
        end = keys.early + self.local_end(t) - keys.local
        early_begin = gl.where(doc == keys.doc, 0, keys.early + doc - keys.local)
        early_end = early_begin + self.num_early(t, doc)
        low, high = shape.token(rows.row), shape.token(rows.row + row.shape[0] - 1)
        # What all rows see begins with the last one's local keys, or with number 0 where early and local keys join.
        apart = self.local_start(high, keys.doc) - keys.local
        joined = (apart == 0) & (self.num_early(low, keys.doc) == keys.early)
        full_begin = gl.where(joined, 0, keys.early + apart)
        # It ends with the first row, and is empty if another document begins among the rows.
        full_end = gl.where(self.document(high) == keys.doc, keys.early + self.local_end(low) - keys.local, 0)
        return ScoreMask(begin, end, early_begin, early_end, full_begin, full_end, True, True)
