"""A run with `train.max_minutes`: as many steps as fit, and exactly the run of the config that comes out."""

from __future__ import annotations

from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch

from nsa.cli.train import closing
from nsa.config.load import load_config
from nsa.config.run import RunConfig
from nsa.launch import budget
from nsa.launch.budget import measure, usable_cores
from nsa.launch.resume import prepare_resume
from nsa.launch.resume_config import resumed_config
from nsa.launch.start import prepare
from nsa.preflight import budget as fitting
from nsa.preflight.budget import MIN_STEPS, RESERVED_S, RESERVED_SHARE, Costs, fit_steps
from nsa.runs.halt import ask_to_halt
from nsa.runs.tables import TRAINING_COLUMNS, VALIDATION_COLUMNS, read_csv
from nsa.train.loop import train
from nsa.train.parallel import Parallel
from nsa.train.telemetry import eta
from nsa.train.telemetry.eta import Deadline, Eta
from nsa.units import duration
from ranks import run_ranks

COSTS = Costs(step_s=0.5, evaluation_s=2.0, health_s=1.0, samples_s=4.0, build_s=3.0, num_threads=1)
LONG = {
    "train": {
        "steps": 1000,
        "max_minutes": 2.0,
        "log_every_steps": 50,
        "checkpoint_every_steps": 100,
        "keep_every_steps": 300,
    },
    "optim": {"warmup_steps": 100},
    "eval": {"every_steps": 250},
    "observe": {"health_every_steps": 500},
}
FITTED = {"train": {"steps": 1000, "max_minutes": 1.0}, "run": {"name": "fitted"}}


def never(*_: object) -> Costs:
    raise AssertionError("a run that is fitted already must not be timed")


def losses(run: Path) -> list[float | None]:
    training = [row["loss"] for row in read_csv(run / "training.csv", TRAINING_COLUMNS)]
    return training + [row["val_loss"] for row in read_csv(run / "val.csv", VALIDATION_COLUMNS)]


def named(config: RunConfig, name: str) -> RunConfig:
    return config.model_copy(update={"run": config.run.model_copy(update={"name": name})})


@pytest.fixture
def eight_steps(monkeypatch: pytest.MonkeyPatch) -> None:
    """All is timed as ever, but counts as a machine on which eight steps fit into a minute."""
    left_s = 60 * (1 - RESERVED_SHARE) - RESERVED_S

    def as_if(config: RunConfig, parallel: Parallel) -> Costs:
        assert measure(config, parallel).step_s > 0
        return Costs(left_s / 8.9, evaluation_s=0.0, health_s=0.0, samples_s=0.0, build_s=0.0, num_threads=1)

    monkeypatch.setattr(budget, "measure", as_if)
    monkeypatch.setattr(fitting, "MIN_STEPS", 2)


def test_the_steps_fill_the_minutes_and_what_counts_in_steps_keeps_its_share(tiny) -> None:
    config = tiny(**LONG)
    fitted = fit_steps(config, COSTS, spent_s=5.0)
    # Five evaluations, two measurements, samples before and after, building once more, and what is over already.
    left_s = 120 * (1 - RESERVED_SHARE) - RESERVED_S - (5 * 2 + 2 * 1 + 2 * 4 + 3 + 5)
    assert fitted.train.steps == int(left_s / 0.5) == 158
    assert fitted.optim.warmup_steps == 16
    assert (fitted.eval.every_steps, fitted.observe.health_every_steps) == (40, 79)
    assert (fitted.train.log_every_steps, fitted.train.checkpoint_every_steps) == (8, 16)
    assert fitted.train.keep_every_steps == 48
    assert (fitted.train.max_minutes, fitted.run.num_threads) == (None, 1)
    assert fitted.train.fitted is not None
    for part in ("158 of 1000 steps", "2 minutes", "0.5 s a step"):
        assert part in fitted.train.fitted


def test_a_fast_machine_does_all_steps_and_no_more(tiny) -> None:
    config = tiny(train={**LONG["train"], "max_minutes": 1000.0})
    fitted = fit_steps(config, COSTS, spent_s=5.0)
    assert fitted.train.steps == 1000
    assert fitted.eval == config.eval
    assert fitted.optim == config.optim


def test_too_few_minutes_are_refused_with_the_number_that_suffices(tiny) -> None:
    def config(minutes: float) -> RunConfig:
        train = {"steps": 1000, "max_minutes": minutes}
        return tiny(train=train, eval={"every_steps": 500}, observe={"health_every_steps": 0})

    with pytest.raises(ValueError, match=r"train.max_minutes 0.3 .* give --train.max_minutes 0\.6 or more") as caught:
        fit_steps(config(0.3), COSTS, spent_s=5.0)
    assert f"{MIN_STEPS} steps" in str(caught.value)
    assert fit_steps(config(0.6), COSTS, spent_s=5.0).train.steps >= MIN_STEPS


def test_a_fitted_run_is_bit_for_bit_the_run_of_its_config(
    tiny, eight_steps: None, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    """Also when it is stopped and resumed; neither is timed again."""
    fitted = train(*prepare(tiny(**FITTED))).folder.path
    assert "8 of 1000 steps fit into 1 minutes" in capsys.readouterr().out
    config = load_config(fitted / "config.yaml")
    assert (config.train.steps, config.train.max_minutes, config.run.num_threads) == (8, None, 1)
    monkeypatch.setattr(budget, "measure", never)
    assert losses(train(*prepare(named(config, "again"))).folder.path) == losses(fitted)

    trainer, folder = prepare(named(config, "stopped"))
    honest_step = trainer.train_step

    def halted() -> Any:
        if trainer.step == 2:
            ask_to_halt(folder.halt)
        return honest_step()

    trainer.train_step = halted
    outcome = train(trainer, folder)
    assert (outcome.stopped_by, trainer.step) == ("HALT", 3)
    assert "step 3" in (folder.samples / "after.txt").read_text(encoding="utf-8")
    assert f"nsa resume {folder.path}" in closing(outcome)
    trainer, folder = prepare_resume(resumed_config(folder.path))
    assert train(trainer, folder).stopped_by is None
    assert losses(folder.path) == losses(fitted)


def test_more_threads_are_tried_as_long_as_cores_are_idle_and_they_help(monkeypatch: pytest.MonkeyPatch) -> None:
    tried: list[int] = []
    trainer = SimpleNamespace(train_step=lambda: None)

    def choose(idle_cores: float, seconds: dict[int, float]) -> tuple[float, int]:
        now, idle = iter([0.0, 10.0]), iter([0.0, 10 * idle_cores])

        def step_s(_: object) -> float:
            tried.append(torch.get_num_threads())
            return seconds[tried[-1]]

        monkeypatch.setattr(budget, "_step_s", step_s)
        monkeypatch.setattr(budget, "usable_cores", lambda: 7)
        monkeypatch.setattr(budget, "_idle_s", lambda: next(idle))
        monkeypatch.setattr(budget, "clock", lambda: next(now))
        tried.clear()
        torch.set_num_threads(1)
        return budget._choose_threads(trainer), torch.get_num_threads()

    before, usable = torch.get_num_threads(), usable_cores()
    try:
        assert choose(7.0, {1: 1.0, 2: 0.5, 4: 0.25, 6: 0.2}) == (0.2, 6)
        assert tried == [1, 2, 4, 6]
        assert choose(2.1, {1: 1.0, 2: 0.5, 3: 0.4}) == (0.4, 3)
        assert choose(7.0, {1: 1.0, 2: 0.5, 4: 0.49}) == (0.5, 2)
        assert choose(0.2, {1: 1.0}) == (1.0, 1)
    finally:
        torch.set_num_threads(before)
    assert usable >= 1


def test_all_ranks_do_as_many_steps(tiny) -> None:
    """Each rank times another rate; all take the first one's."""
    steps = run_ranks(
        """
        import time
        from nsa.launch import budget
        with setup_parallel("cpu") as parallel:
            budget.measure = lambda *_: budget.Costs(0.1 * (1 + parallel.rank), 0.0, 0.0, 0.0, 0.0, 1)
            report(budget.fit_to_budget(given, parallel, time.perf_counter() - parallel.rank)[0].train.steps)
        """,
        tiny(train={"steps": 1000, "max_minutes": 1.0}),
    )
    assert steps[0] == steps[1] > 400


def test_the_time_that_is_left_counts_what_lies_between_the_steps(monkeypatch: pytest.MonkeyPatch) -> None:
    now = iter([10.0, 12.0, 20.0])
    monkeypatch.setattr(eta, "clock", lambda: next(now))
    left = Eta(num_steps=10)
    left.step(1, step_s=1.0)
    left.step(2, step_s=1.0)
    # Two steps of one second in the three since the first began: half a second a step goes to other things.
    assert left.left_s == pytest.approx(8 * 1.5)
    assert duration(245) == "4:05"
    assert duration(3845) == "1:04:05"


def test_a_run_that_will_be_late_says_so_once(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(eta, "clock", lambda: 100.0)
    left = Eta(num_steps=100, deadline=Deadline(start_s=95.0, budget_s=60.0, closing_s=2.0, step_s=0.5))
    left.step(1, step_s=0.5)
    assert left.late() is None  # 5 + 99 * 0.5 + 2 s
    left.step(2, step_s=1.5)
    note = left.late()
    assert note is not None
    for part in ("instead of 1:00", "0.5 s", "1 s now", "100 steps"):
        assert part in note, note
    assert left.late() is None
