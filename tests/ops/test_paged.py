"""A step on a paged cache equals the last rows of the whole sequence; what does not fit is refused by name."""

from __future__ import annotations

import re
from collections.abc import Callable
from typing import Any

import pytest
import torch
from hypothesis import given, settings, strategies as st

from nsa import BlockGeometry, PagedView, paged_decode
from paged_caches import CASES, SMALL, PagedCase, PagedProblem, make_problem, relative_error


def check(problem: PagedProblem, geometry: BlockGeometry, tolerance: float) -> None:
    out, blocks = paged_decode(*problem.to("cpu"), geometry)
    assert torch.equal(blocks, problem.blocks)
    assert relative_error(out, problem.out) < tolerance
    assert not out[problem.view.lengths == 0].any()


@pytest.mark.parametrize("name", CASES)
def test_a_step_equals_the_reference(name: str) -> None:
    case = CASES[name]
    check(make_problem(case), case.geometry, 2e-3 if case.dtype == torch.float16 else 2e-6)


@settings(max_examples=25)
@given(
    st.lists(st.integers(0, 120), min_size=1, max_size=3),
    st.integers(1, 8),
    st.sampled_from([1, 2, 3, 5]),
    st.booleans(),
    st.sampled_from([SMALL, BlockGeometry(4, 2, 4, 5, 0, 2, 3), BlockGeometry(24, 4, 8, 5, 2, 1, 7)]),
)
def test_any_lengths_and_queries(lengths: list[int], queries: int, group: int, ring: bool, geometry: BlockGeometry):
    case = PagedCase(tuple(lengths), queries, 2 * group, 2, geometry=geometry, ring=ring, dtype=torch.float64)
    check(make_problem(case), geometry, 1e-12)


def test_a_row_does_not_depend_on_the_others_or_on_the_room_of_the_table() -> None:
    alone = make_problem(PagedCase((90,), queries=2))
    out, _ = paged_decode(*alone.to("cpu"), SMALL)
    q, view, gates = alone.to("cpu")
    table = torch.cat([view.block_table, view.block_table[:, :1].expand(1, 9)], dim=1)
    wide = view._replace(block_table=table.repeat(3, 1), lengths=torch.tensor([40, 90, 0], dtype=torch.int32))
    beside, _ = paged_decode(q.repeat(3, 1, 1, 1), wide, gates.repeat(3, 1, 1, 1), SMALL)
    torch.testing.assert_close(beside[1:2], out, rtol=0, atol=1e-6)


def test_the_operator_is_registered_and_compiles_whole() -> None:
    problem = make_problem(CASES["more queries than tokens"])
    q, view, gates = problem.to("cpu")
    arguments = (q, gates, *view, SMALL.as_tuple(), 0.25, "torch")
    torch.library.opcheck(torch.ops.nsa.paged_decode, arguments)
    compiled = torch.compile(lambda q, gates: paged_decode(q, view, gates, SMALL), fullgraph=True, backend="aot_eager")
    for x, y in zip(compiled(q, gates), paged_decode(q, view, gates, SMALL), strict=True):
        torch.testing.assert_close(x, y, rtol=0, atol=0)


PROBLEM = make_problem(PagedCase((40, 20), queries=2, ring=True))
WRONG = {
    "too many queries": (lambda q, view, g: (q.repeat(1, 5, 1, 1), view, g), "1 to 8 queries, not 10"),
    "gates": (lambda q, view, g: (q, view, g[..., :2]), "gates must be [2, 2, 4, 3]"),
    "page size": (lambda q, view, g: (q, view._replace(v=view.v[:, :, :8]), g), "v must be [13, 2, 16]"),
    "compressed page": (lambda q, view, g: (q, view._replace(k_cmp=view.k), g), "k_cmp must be [13, 2, 4]"),
    "dtype": (lambda q, view, g: (q, view._replace(k=view.k.half()), g), "k is torch.float16 but q is torch.float32"),
    "head size": (lambda q, view, g: (q[..., :8], view, g), "k has head size 16, expected 8"),
    "heads": (lambda q, view, g: (q[:, :, :3], view, g[:, :, :3]), "3 query heads must be a multiple of the 2"),
    "half a window": (lambda q, view, g: (q, view._replace(v_win=None), g), "give both k_win and v_win"),
    "short ring": (lambda q, view, g: (q, view._replace(k_win=view.k_win[:, :, :24]), g), "at least 25 tokens"),
    "table of other rows": (
        lambda q, view, g: (q, view._replace(block_table=view.block_table[:1]), g), "block_table must be int32 [2,"),
    "table of int64": (
        lambda q, view, g: (q, view._replace(block_table=view.block_table.long()), g), "not torch.int64"),
    "lengths": (lambda q, view, g: (q, view._replace(lengths=view.lengths[:1]), g), "lengths must be int32 [2]"),
    "negative length": (
        lambda q, view, g: (q, view._replace(lengths=view.lengths - 30), g), "row 1 has length -10"),
    "longer than the table": (
        lambda q, view, g: (q, view._replace(lengths=view.lengths + 99), g), "row 0 has length 139; the 5 pages"),
    "a page that is not there": (
        lambda q, view, g: (q, view._replace(block_table=view.block_table + 9), g), "the pool has 0..12"),
    "another device": (lambda q, view, g: (q, view._replace(lengths=view.lengths.to("meta")), g), "lengths is on meta"),
}  # fmt: skip


@pytest.mark.parametrize("name", WRONG)
def test_what_does_not_fit_is_named(name: str) -> None:
    change, message = WRONG[name]
    q, view, gates = change(*PROBLEM.to("cpu"))
    with pytest.raises(ValueError, match=re.escape(message)):
        paged_decode(q, view, gates, SMALL)


def test_backends_without_a_paged_cache_are_refused() -> None:
    q, view, gates = PROBLEM.to("cpu")
    for backend, message in (("reference", "'torch' or 'triton'"), ("triton", "cannot run here")):
        with pytest.raises(ValueError, match=message):
            paged_decode(q, PagedView(*view), gates, SMALL, backend=backend)


@pytest.mark.parametrize("name", CASES)
def test_the_kernels_equal_the_reference_in_the_interpreter(name: str, in_interpreter: Callable[..., Any]) -> None:
    pytest.importorskip("triton")
    from ops.paged_interpreter_cases import decode_step

    errors = in_interpreter(decode_step, CASES[name])
    assert errors["blocks"] == 0
    assert errors["out"] < (2e-3 if CASES[name].dtype == torch.float16 else 2e-6)
