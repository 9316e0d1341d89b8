"""What a guard lets pass, skips and ends."""

from __future__ import annotations

import math

import pytest

from nsa.config.run import GuardSection
from nsa.runs.errors import TrainingError
from nsa.train.guards import SPIKE_HISTORY, StepGuard


@pytest.mark.parametrize(("loss", "grad_norm"), [(math.nan, 1.0), (math.inf, 1.0), (2.0, math.nan), (2.0, math.inf)])
def test_a_loss_or_gradient_that_is_not_finite_ends_the_run(loss: float, grad_norm: float) -> None:
    with pytest.raises(TrainingError, match=r"step 7 .*weights are still those of step 6"):
        StepGuard(GuardSection()).allows(7, loss, grad_norm)


def test_bad_steps_can_be_skipped_but_not_without_end() -> None:
    guard = StepGuard(GuardSection(on_nonfinite="skip", max_skipped_steps=2))
    assert guard.allows(1, 2.0, 1.0)
    assert not guard.allows(2, math.nan, 1.0)
    assert not guard.allows(3, math.nan, 1.0)
    assert guard.allows(4, 2.0, 1.0)
    assert not guard.allows(5, math.nan, 1.0)
    assert not guard.allows(6, 2.0, math.inf)
    assert guard.num_skipped == 4
    with pytest.raises(TrainingError, match=r"max_skipped_steps 2"):
        guard.allows(7, math.nan, 1.0)


def test_a_spike_is_judged_by_the_median_of_the_losses_before_it() -> None:
    guard = StepGuard(GuardSection(spike_factor=1.5))
    assert guard.allows(1, 40.0, 1.0)
    for step in range(2, SPIKE_HISTORY + 1):
        assert guard.allows(step, 2.0, 1.0)
    assert not guard.allows(51, 3.01, 1.0)
    assert guard.allows(52, 2.99, 1.0)


def test_without_a_spike_factor_nothing_finite_is_skipped() -> None:
    guard = StepGuard(GuardSection())
    assert all(guard.allows(step, 2.0, 1.0) for step in range(1, 60))
    assert guard.allows(60, 1e9, 1e9)


def test_a_loss_below_the_floor_is_an_error() -> None:
    floor = math.log(256)
    guard = StepGuard(GuardSection(entropy_floor_nats=floor))
    assert guard.allows(1, floor, 1.0)
    assert guard.allows(2, floor - 0.02, 1.0)
    with pytest.raises(TrainingError, match=r"step 3 is 5\.4000 .*floor of 5\.5452"):
        guard.allows(3, 5.4, 1.0)
    with pytest.raises(TrainingError, match="held-out loss after step 3 is 5"):
        guard.check_evaluation(3, 5.0)


def test_without_a_floor_every_loss_is_possible() -> None:
    assert StepGuard(GuardSection()).allows(1, 1e-9, 1.0)


@pytest.mark.parametrize("loss", [math.nan, math.inf])
def test_a_held_out_loss_that_is_not_finite_ends_the_run(loss: float) -> None:
    with pytest.raises(TrainingError, match=r"held-out loss after step 9 is (nan|inf)"):
        StepGuard(GuardSection()).check_evaluation(9, loss)
