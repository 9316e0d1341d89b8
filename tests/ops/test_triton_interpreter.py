"""Every Triton kernel gives the reference's results in Triton's interpreter, on the CPU."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest

pytest.importorskip("triton")

PROGRAM = Path(__file__).with_name("triton_interpreter_cases.py")
SOURCE = Path(__file__).parents[2] / "src"
NUM_CASES = 52


def test_every_stage_equals_the_reference_forward_and_backward():
    """One process for all cases: its start takes as long as several of them."""
    environment = {**os.environ, "TRITON_INTERPRET": "1", "PYTHONPATH": str(SOURCE)}
    command = [sys.executable, "-W", "ignore", str(PROGRAM)]
    run = subprocess.run(command, env=environment, capture_output=True, text=True, timeout=280, check=False)
    assert run.returncode == 0, run.stderr[-3000:]
    lines = [json.loads(line) for line in run.stdout.splitlines()]
    assert len(lines) == NUM_CASES
    assert all(line["errors"] for line in lines)
    # fp32 is exact to a few roundings; fp16 rounds p and the results to 11 bits. A wrong column is of order 1.
    wrong = {
        f"{line['case']}: {name}": error
        for line in lines
        for name, error in line["errors"].items()
        if not error < (3e-3 if line["dtype"] == "float16" else 2e-6)
    }
    assert not wrong
