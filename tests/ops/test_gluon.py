"""The Gluon kernels for Hopper give the reference's results in an emulator that takes every freedom of the device."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest

pytest.importorskip("triton")

PROGRAM = Path(__file__).with_name("gluon_cases.py")
PATHS = [str(Path(__file__).parents[2] / "src"), str(Path(__file__).parents[1])]
NUM_CASES, NUM_SEEDS, NUM_PARTS = 41, 3, 4
KERNELS = {
    "hopper_forward_kernel", "hopper_key_kernel", "hopper_query_kernel", "hopper_score_kernel",
    "hopper_select_forward_kernel", "hopper_select_backward_kernel", "hopper_union_forward_kernel",
    "hopper_union_query_kernel",
}  # fmt: skip


@pytest.mark.parametrize("part", range(NUM_PARTS))
def test_hopper_kernels_equal_the_reference_under_every_schedule(part):
    """In parts, so that processes can share the cases."""
    environment = {k: v for k, v in os.environ.items() if k != "TRITON_INTERPRET"}
    environment["PYTHONPATH"] = os.pathsep.join(PATHS)
    command = [sys.executable, "-W", "ignore", str(PROGRAM), "", "", str(part), str(NUM_PARTS)]
    run = subprocess.run(command, env=environment, capture_output=True, text=True, timeout=280, check=False)
    assert run.returncode == 0, run.stderr[-3000:]
    lines = [json.loads(line) for line in run.stdout.splitlines()]
    num_cases = len(range(part, NUM_CASES, NUM_PARTS))
    assert len(lines) == num_cases * NUM_SEEDS
    assert set().union(*(line["kernels"] for line in lines)) >= KERNELS
    # Of each row: what is multiplied and the results are rounded to 11 or 8 bits. One wrong key is of order 0.1.
    wrong = {
        f"{line['case']}: {name}": error
        for line in lines
        for name, error in line["errors"].items()
        if not error < (2e-6 if name.endswith("lse") else 5e-3 if line["dtype"] == "float16" else 4e-2)
    }
    assert not wrong
    # No order of partitions or programs changes a bit.
    assert len({json.dumps([line["case"], line["errors"]]) for line in lines}) == num_cases
