"""The pace of a run: of its newest steps together, steady where single steps are not."""

from __future__ import annotations

import pytest

from nsa.train.telemetry.pace import Pace


def test_a_pace_is_of_the_newest_steps_together_and_forgets_the_first() -> None:
    pace = Pace(num_steps=3)
    seconds = [100.0, 1.0, 3.0, 2.0, 4.0]
    rates = [pace.add(step_s=step_s, tokens=60, flops=600) for step_s in seconds]
    assert [rate for rate, _ in rates] == pytest.approx([0.6, 60.0, 30.0, 30.0, 20.0])
    assert [flops for _, flops in rates] == pytest.approx([6.0, 600.0, 300.0, 300.0, 200.0])


def test_a_pace_of_one_step_is_that_step() -> None:
    pace = Pace(num_steps=1)
    assert [pace.add(step_s=step_s, tokens=8, flops=0)[0] for step_s in (1.0, 2.0, 4.0)] == [8.0, 4.0, 2.0]
