"""Run the kernels of a paged decode step in the interpreter against the reference; one JSON line for each case.

A program of its own, because TRITON_INTERPRET is read when the kernels are defined:

    TRITON_INTERPRET=1 PYTHONPATH=src:tests python tests/ops/paged_interpreter_cases.py
"""

from __future__ import annotations

import json

import torch
import triton

from nsa.ops.triton import decode
from paged_caches import CASES, PagedCase, make_problem, relative_error


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


if __name__ == "__main__":
    torch.set_num_threads(1)
    for name, case in CASES.items():
        limit = 2e-3 if case.dtype == torch.float16 else 2e-6
        print(json.dumps({"case": name, "limit": limit, "errors": decode_step(case)}), flush=True)
