"""The gate: equal start, kinds, temperature, forced branch."""

import pytest
import torch

from nsa.gate import BRANCHES, Gate


@pytest.mark.parametrize(("kind", "start"), [("softmax", 1 / 3), ("sigmoid", 1 / 2)])
def test_branches_start_equal(kind, start):
    gates = Gate(32, 4, kind)(torch.randn(2, 5, 32))
    torch.testing.assert_close(gates, torch.full((2, 5, 4, 3), start))


def test_softmax_gates_sum_to_one_and_temperature_flattens():
    gate = Gate(32, 4)
    torch.nn.init.normal_(gate.down.weight)
    x = torch.randn(2, 5, 32)
    sharp = gate(x)
    torch.testing.assert_close(sharp.sum(-1), torch.ones(2, 5, 4))
    gate.temperature = 10.0
    assert (gate(x).amax(-1) < sharp.amax(-1)).all()


@pytest.mark.parametrize("branch", BRANCHES)
def test_forced_branch_is_one_hot(branch):
    gates = Gate(32, 4)(torch.randn(1, 2, 32), branch)
    assert gates.sum() == 8
    assert (gates[..., BRANCHES.index(branch)] == 1).all()


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float64])
def test_dtype_is_kept(dtype):
    assert Gate(32, 4).to(dtype)(torch.randn(1, 2, 32, dtype=dtype)).dtype == dtype
