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


@pytest.fixture(scope="module")
def errors() -> dict[str, dict[str, float]]:
    """Relative errors of each stage of each case, from one process with the interpreter on."""
    environment = {**os.environ, "TRITON_INTERPRET": "1", "PYTHONPATH": str(SOURCE)}
    run = subprocess.run(
        [sys.executable, "-W", "ignore", str(PROGRAM)],
        env=environment,
        capture_output=True,
        text=True,
        timeout=250,
        check=False,
    )
    assert run.returncode == 0, run.stderr[-3000:]
    lines = [json.loads(line) for line in run.stdout.splitlines()]
    return {line["case"]: line["errors"] for line in lines}


@pytest.mark.parametrize(
    "case",
    [
        "three heads a group, batch of two, Dk != Dv",
        "packed, empty and short documents",
        "rows after the last document",
        "chunk of a prefill",
        "one token",
        "no token",
        "long selection blocks in parts",
        "long stencil",
        "choice in many chunks",
        "scratch for few tokens",
    ],
)
def test_stages_equal_the_reference_in_fp32(errors, case):
    assert errors[case]
    wrong = {name: error for name, error in errors[case].items() if not error < 2e-6}
    assert not wrong


def test_head_sizes_without_a_tile_of_their_own_are_padded_and_cut_back(errors):
    found = errors["head size that fits no tile, fp16"]
    # Half precision rounds p and the results to 11 bits; a wrong column would be an error of order 1.
    assert {name: error for name, error in found.items() if not error < 3e-3} == {}
