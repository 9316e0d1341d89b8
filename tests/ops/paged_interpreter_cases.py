"""A paged decode step in small tiles, to be run in Triton's interpreter (`in_interpreter`)."""

from __future__ import annotations

import triton

from nsa.ops.triton import decode
from paged_caches import PagedCase, make_problem, relative_error


def decode_step(case: PagedCase) -> dict[str, float]:
    """Compare a step that is cut into small tiles and items, so that there are several of each."""
    problem, geometry = make_problem(case), case.geometry
    blocks = max(1, 32 // triton.next_power_of_2(geometry.select_block_size))
    tile = max(2, triton.next_power_of_2(decode.num_spans(geometry) - 1))
    least = max(1, 16 // triton.next_power_of_2(geometry.select_block_size))
    plan = decode.Plan(
        16, tile, stages=3, splits=3, chunk=64, blocks=blocks, window_blocks=least, step=16, overlaps=False
    )
    inputs = (problem.q, problem.gates, problem.view, geometry, case.head_dim**-0.5)
    out, chosen = decode.paged_decode_forward(*inputs, plan)
    return {"out": relative_error(out, problem.out), "blocks": float((chosen != problem.blocks).sum())}
