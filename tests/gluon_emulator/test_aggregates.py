"""Kernels with aggregates compile for Hopper, run in the emulator as others do, and their faults are found."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch

pytest.importorskip("triton")

from gluon_emulator import EmulationError, emulate
from gluon_emulator.example import count_kernel, run_example

TESTS = Path(__file__).parents[1]
COMPILE = """
from ahead_of_time import compile_launches
from gluon_emulator.example import count_kernel, run_example
import torch

kernels = compile_launches(90)
run_example(num_steps=5)
run_example(num_steps=1)
assert all("wgmma" in kernel.asm["ptx"] for _name, kernel in kernels)
count_kernel[(1,)](torch.zeros(1, dtype=torch.int32), 5, 1, FAULT="")
print(len(kernels))
"""


def test_a_kernel_with_aggregates_compiles_for_hopper(tmp_path):
    environment = {k: v for k, v in os.environ.items() if k != "TRITON_INTERPRET"}
    environment |= {"PYTHONPATH": str(TESTS), "TRITON_CACHE_DIR": str(tmp_path)}
    command = [sys.executable, "-W", "ignore", "-c", COMPILE]
    run = subprocess.run(command, env=environment, capture_output=True, text=True, timeout=120, check=False)
    assert run.returncode == 0, run.stderr[-3000:]
    assert run.stdout.split() == ["3"]


@pytest.mark.parametrize("num_steps", [1, 2, 7])
@pytest.mark.parametrize("stages", [1, 2, 3])
def test_a_kernel_with_aggregates_is_right_under_every_schedule(num_steps, stages):
    for seed, eagerness, order in ((1, None, None), (0, 0.0, [0, 2, 1]), (0, 1.0, [0, 1, 2])):
        with emulate(seed, eagerness, order):
            torch.testing.assert_close(*run_example(num_steps, stages=stages), rtol=1e-3, atol=1e-3)


@pytest.mark.parametrize(
    ("fault", "message"),
    [
        ("no wait for room", "race: load_partition writes x_pipe.smem|more than 1 arrivals in a phase of x_pipe.full"),
        ("too few bytes", "4096 bytes more than x_pipe.full"),
        ("no wait for data", "nothing was written|race: product_partition reads x_pipe.smem"),
        ("released too early", "race: load_partition writes x_pipe.smem .* while product_partition reads"),
        ("not released", "deadlock: .*load_partition waits for x_pipe.empty"),
        ("two readers awaited", "deadlock: .*1 of 2 arrivals"),
        ("a field is set", "'STAGES' of Pipe is set after its making"),
    ],
)
def test_every_fault_is_found_under_every_schedule(fault, message):
    for seed in range(8):
        with emulate(seed), pytest.raises(EmulationError, match=message):
            run_example(fault=fault)


def test_an_aggregate_is_carried_through_a_loop():
    out = torch.zeros(1, dtype=torch.int32)
    with emulate():
        count_kernel[(1,)](out, 5, 1, FAULT="")
    assert out.item() == 11


@pytest.mark.parametrize(
    ("fault", "message"),
    [
        ("no constant", "'STEP' of Counter is declared as .*constexpr.*, not Scalar"),
        ("a barrier for a number", "'value' of Counter is declared as .*tensor.*, not BarrierArray"),
        ("an argument of 1 that is specialised", "'value' of Counter is declared as .*tensor.*, not Constant"),
        ("not set", "Counter is made without value"),
    ],
)
def test_fields_hold_what_they_are_declared_as(fault, message):
    with emulate(), pytest.raises(EmulationError, match=message):
        count_kernel[(1,)](torch.zeros(1, dtype=torch.int32), 5, 1, FAULT=fault)
