"""Which keys `forward_sm90.py` takes for the forced blocks: two intervals for each row, numbered as one for a tile.

Numbers below `early` are the initial blocks of the tile's first document, in whole steps; from there on they are the
keys from the first local block of the tile's first token on. Later documents of a tile begin within it, so that all of
their keys are among these.
"""

# Kernels are typed by Triton, not by Python.
# pyright: reportArgumentType=false, reportCallIssue=false, reportAttributeAccessIssue=false, reportReturnType=false
# pyright: reportGeneralTypeIssues=false, reportPossiblyUnboundVariable=false
# pyright: reportAssignmentType=false, reportOperatorIssue=false
from __future__ import annotations

from triton.experimental import gluon
from triton.experimental.gluon import language as gl

from nsa.ops.triton.layout import local_start, num_early


@gluon.jit
def _document(t, doc_ptr, PACKED: gl.constexpr):
    doc = t * 0
    if PACKED:
        doc = gl.load(doc_ptr + t)
    return doc


@gluon.jit
def forced_keys_of_tile(
    row, rows, doc_ptr, T, S, q_start, G: gl.constexpr, BLOCK: gl.constexpr, INIT: gl.constexpr, LOCAL: gl.constexpr,
    PACKED: gl.constexpr, KEYS: gl.constexpr,
):  # fmt: skip
    """Of `rows` rows from `row` on: their first document, `early`, the first local key, and where the numbers end."""
    t_low = gl.minimum(row // G, T - 1)
    high = gl.minimum((row + rows - 1) // G, T - 1) + q_start
    doc = _document(t_low, doc_ptr, PACKED)
    early = gl.cdiv(num_early(high, doc, BLOCK, INIT, LOCAL), KEYS) * KEYS
    local = local_start(t_low + q_start, doc, BLOCK, LOCAL)
    return doc, early, local, early + gl.minimum(high + 1, S) - local


@gluon.jit
def forced_keys_of_rows(
    t, low, rows, tile_doc, early, local, doc_ptr, T, S, q_start, G: gl.constexpr, BLOCK: gl.constexpr,
    INIT: gl.constexpr, LOCAL: gl.constexpr, PACKED: gl.constexpr,
):  # fmt: skip
    """Numbers that rows of tokens `t` see, the local ones and the initial ones, and those that all `rows` see.

    Args:
        low: the first row.
        tile_doc, early, local: of the tile, from `forced_keys_of_tile`.
    """
    doc = _document(t, doc_ptr, PACKED)
    first = early + local_start(t + q_start, doc, BLOCK, LOCAL) - local
    end = early + gl.minimum(t + q_start + 1, S) - local
    row_early = gl.where(doc == tile_doc, 0, early + doc - local)
    early_end = row_early + num_early(t + q_start, doc, BLOCK, INIT, LOCAL)
    t_low = gl.minimum(low // G, T - 1)
    t_high = gl.minimum((low + rows - 1) // G, T - 1)
    apart = local_start(t_high + q_start, tile_doc, BLOCK, LOCAL) - local
    whole = (apart == 0) & (num_early(t_low + q_start, tile_doc, BLOCK, INIT, LOCAL) == early)
    plain_end = early + gl.minimum(t_low + q_start + 1, S) - local
    plain_end = gl.where(_document(t_high, doc_ptr, PACKED) == tile_doc, plain_end, 0)
    return first, end, row_early, early_end, gl.where(whole, 0, early + apart), plain_end
