"""A step on a paged cache on the GPU: the reference's results by the relative rule, and one graph for all lengths."""

from __future__ import annotations

from dataclasses import replace

import pytest
import torch

from nsa import BlockGeometry, paged_decode
from paged_caches import CASES, SMALL, PagedCase, make_problem, relative_error

PAPER = BlockGeometry()
LARGE = {
    "16 heads a group": PagedCase((5000, 777), 1, 64, 4, 128, 128, PAPER),
    "4 heads a group, four queries": PagedCase((3000, 31, 0), 4, 32, 8, 128, 128, PAPER),
    "keys of 192, eight queries": PagedCase((1500, 2000), 8, 16, 1, 192, 128, PAPER),
    "heads of 64": PagedCase((100, 64, 65, 1), 1, 4, 4, 64, 64, PAPER),
    "32 heads a group": PagedCase((333,), 8, 96, 3, 80, 80, SMALL),
    "heads of 256": PagedCase((2048, 4097), 1, 64, 2, 256, 256, PAPER),
    "three heads a group": PagedCase((300, 7), 3, 6, 2, 48, 48, BlockGeometry(24, 4, 8, 5, 1, 1, 7)),
    "more blocks than the short search takes": PagedCase(
        (17000, 100), 2, 4, 2, 32, 32, BlockGeometry(8, 4, 8, 8, 1, 2, 24)),
}  # fmt: skip
STEPS = {
    f"{name}, {str(dtype).removeprefix('torch.')}": replace(case, dtype=dtype, ring=ring)
    for index, (name, case) in enumerate({**LARGE, **CASES}.items())
    for dtype, ring in ((torch.float32, False), (torch.bfloat16, True), (torch.float16, index % 2 == 0))
}


@pytest.mark.parametrize("name", STEPS)
def test_a_step_equals_the_reference(name: str) -> None:
    case = STEPS[name]
    problem = make_problem(case)
    out, blocks = paged_decode(*problem.to("cuda"), case.geometry, backend="triton")
    assert torch.equal(blocks.cpu(), problem.blocks)
    assert relative_error(out, problem.out) < max(2 * relative_error(problem.plain, problem.out), 2e-6)


def test_one_graph_serves_all_lengths_and_a_row_is_the_same_whatever_the_others_hold() -> None:
    case = PagedCase((4000, 2500, 900), 1, 16, 4, 64, 64, PAPER, dtype=torch.bfloat16)
    q, view, gates = make_problem(case).to("cuda")
    for _ in range(2):
        paged_decode(q, view, gates, PAPER)
    torch.cuda.synchronize()
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        out, blocks = paged_decode(q, view, gates, PAPER)
    first = None
    for lengths in ((4000, 2500, 900), (4000, 1, 0), (64, 2500, 31), (4000, 65, 899)):
        view.lengths.copy_(torch.tensor(lengths, dtype=torch.int32))
        graph.replay()
        graph_out, graph_blocks = out.clone(), blocks.clone()
        eager_out, eager_blocks = paged_decode(q, view, gates, PAPER)
        assert torch.equal(graph_out, eager_out)
        assert torch.equal(graph_blocks, eager_blocks)
        assert torch.isfinite(eager_out).all()
        if lengths[0] == 4000:
            first = graph_out[0] if first is None else first
            assert torch.equal(graph_out[0], first)


def test_lengths_beyond_the_table_read_nothing_outside_it() -> None:
    q, view, gates = make_problem(PagedCase((900, 40), 1, 16, 4, 64, 64, PAPER, dtype=torch.bfloat16)).to("cuda")
    view.lengths.copy_(torch.tensor([10**6, -5], dtype=torch.int32))
    out, blocks = paged_decode(q, view, gates, PAPER)
    torch.cuda.synchronize()
    assert int(blocks.max()) < view.block_table.shape[1]
    assert not out[1].any()
