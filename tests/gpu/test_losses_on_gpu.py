"""The convergence tier on a GPU: the Triton kernels follow the reference's losses."""

from __future__ import annotations

import pytest

from convergence.tiny_training import CASES, losses

STEPS = 20
NATS = {"fp32": 2e-3, "bf16": 6e-2}  # that a loss may be away


@pytest.mark.parametrize("precision", NATS)
@pytest.mark.parametrize("name", [name for name in CASES if name != "beside dense layers"])
def test_losses_follow_the_reference(name: str, precision: str) -> None:
    expected = losses(CASES[name], "reference", STEPS, device="cuda")
    found = losses(CASES[name], "triton", STEPS, device="cuda", bf16=precision == "bf16")
    assert max(abs(x - y) for x, y in zip(found, expected, strict=True)) < NATS[precision]
