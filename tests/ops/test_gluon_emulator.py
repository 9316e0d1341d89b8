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
NUM_RUNS = 30
HOPPER_KERNELS = {"hopper_forward_kernel", "hopper_key_kernel", "hopper_query_kernel"}


def test_hopper_kernels_equal_the_reference_under_every_schedule():
    environment = {k: v for k, v in os.environ.items() if k != "TRITON_INTERPRET"}
    environment["PYTHONPATH"] = os.pathsep.join(PATHS)
    command = [sys.executable, "-W", "ignore", str(PROGRAM)]
    run = subprocess.run(command, env=environment, capture_output=True, text=True, timeout=280, check=False)
    assert run.returncode == 0, run.stderr[-3000:]
    lines = [json.loads(line) for line in run.stdout.splitlines()]
    assert len(lines) == NUM_RUNS
    assert all(set(line["kernels"]) >= HOPPER_KERNELS for line in lines)
    # Each row's error: p, dS and the results are rounded to 11 or 8 bits. A wrong key in a row is of order 0.1.
    wrong = {
        f"{line['case']}: {name}": error
        for line in lines
        for name, error in line["errors"].items()
        if not error < (2e-6 if name.endswith("lse") else 3e-3 if line["dtype"] == "float16" else 2e-2)
    }
    assert not wrong
