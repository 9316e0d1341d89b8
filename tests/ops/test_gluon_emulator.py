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
NUM_CASES, NUM_SEEDS = 14, 3
KERNELS = {
    "hopper_forward_kernel", "hopper_key_kernel", "hopper_query_kernel", "hopper_select_kernel",
    "hopper_select_backward_kernel",
}  # fmt: skip


def test_hopper_kernels_equal_the_reference_under_every_schedule():
    environment = {k: v for k, v in os.environ.items() if k != "TRITON_INTERPRET"}
    environment["PYTHONPATH"] = os.pathsep.join(PATHS)
    command = [sys.executable, "-W", "ignore", str(PROGRAM)]
    run = subprocess.run(command, env=environment, capture_output=True, text=True, timeout=280, check=False)
    assert run.returncode == 0, run.stderr[-3000:]
    lines = [json.loads(line) for line in run.stdout.splitlines()]
    assert len(lines) == NUM_CASES * NUM_SEEDS
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
    assert len({json.dumps([line["case"], line["errors"]]) for line in lines}) == NUM_CASES
