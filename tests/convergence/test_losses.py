"""A tiny model follows the reference's losses on every backend, over whole steps of training."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from functools import cache
from importlib.util import find_spec
from pathlib import Path

import pytest

from convergence.tiny_training import CASES, INTERPRETED, Case, losses
from nsa.ops import torch_native

STEPS, INTERPRETED_STEPS = 20, 3
FP32, BF16 = 1e-4, 6e-2  # nats that a loss may be away; seen are 5e-6 and 3e-2
ROOT = Path(__file__).parents[2]


@cache
def reference_losses(name: str) -> list[float]:
    return losses(CASES[name], "reference", STEPS)


def largest_difference(found: list[float], expected: list[float]) -> float:
    return max(abs(x - y) for x, y in zip(found, expected, strict=True))


@pytest.mark.parametrize("name", CASES)
def test_losses_follow_the_reference(name: str) -> None:
    expected = reference_losses(name)
    assert largest_difference(losses(CASES[name], "torch", STEPS), expected) < FP32
    assert sum(expected[-5:]) < sum(expected[:5]) - 1  # it learns


@pytest.mark.parametrize("name", ["grouped heads", "packed documents"])
def test_losses_in_bf16_follow_the_reference_in_fp32(name: str) -> None:
    assert largest_difference(losses(CASES[name], "torch", STEPS, bf16=True), reference_losses(name)) < BF16


@pytest.mark.parametrize("stage", ["compressed_attention", "selected_attention", "window_attention"])
@pytest.mark.parametrize("which", [0, 1, 2])
def test_losses_tell_a_wrong_gradient(stage: str, which: int, monkeypatch: pytest.MonkeyPatch) -> None:
    right = getattr(torch_native, f"{stage}_backward")

    def wrong(*arguments):
        return tuple(0.9 * x if i == which else x for i, x in enumerate(right(*arguments)))

    monkeypatch.setattr(torch_native, f"{stage}_backward", wrong)
    case = Case(rows=1, length=40)
    assert largest_difference(losses(case, "torch", 4), losses(case, "reference", 4)) > FP32


@pytest.mark.skipif(find_spec("triton") is None, reason="triton is not installed")
def test_losses_of_the_triton_kernels_in_the_interpreter_follow_the_reference() -> None:
    environment = {**os.environ, "TRITON_INTERPRET": "1", "PYTHONPATH": os.pathsep.join([str(ROOT / "src"), "tests"])}
    command = [sys.executable, "-W", "ignore", "tests/convergence/tiny_training.py", str(INTERPRETED_STEPS)]
    run = subprocess.run(command, cwd=ROOT, env=environment, capture_output=True, text=True, timeout=250, check=False)
    assert run.returncode == 0, run.stderr[-3000:]
    lines = [json.loads(line) for line in run.stdout.splitlines()]
    assert [line["case"] for line in lines] == list(INTERPRETED)
    for line in lines:
        expected = losses(INTERPRETED[line["case"]], "reference", INTERPRETED_STEPS)
        assert largest_difference(line["losses"], expected) < FP32, line["case"]
