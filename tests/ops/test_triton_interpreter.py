"""Every Triton kernel gives the reference's results in Triton's interpreter, on the CPU."""

from __future__ import annotations

import pytest
import torch

pytest.importorskip("triton")

from ops.triton_interpreter_cases import CASES, CHOICES, choose_given, compare


@pytest.mark.parametrize("name", CASES)
def test_every_stage_equals_the_reference_forward_and_backward(name: str, in_interpreter):
    errors = in_interpreter(compare, CASES[name])
    # fp32 is exact to a few roundings; fp16 rounds p and the results to 11 bits. A wrong column is of order 1.
    limit = 3e-3 if CASES[name].dtype == torch.float16 else 2e-6
    assert errors
    assert not {what: error for what, error in errors.items() if not error < limit}


@pytest.mark.parametrize("name", CHOICES)
def test_the_best_blocks_are_chosen_among_given_scores(name: str, in_interpreter):
    errors = in_interpreter(choose_given, CHOICES[name])
    assert not {what: error for what, error in errors.items() if error}
