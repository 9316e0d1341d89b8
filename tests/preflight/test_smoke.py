"""The smoke check: what it compares, how it fails, and that all of it works together."""

from __future__ import annotations

import json
import subprocess
import sys
from dataclasses import replace
from pathlib import Path

import pytest
import torch

from nsa.calibration import Calibration, calibrate
from nsa.config.run import RunConfig
from nsa.machine import environment
from nsa.preflight import smoke
from nsa.preflight.smoke import (
    Figures,
    SmokeCheck,
    another_machine,
    compare,
    read_baseline,
    smoke_config,
    write_baseline,
)
from nsa.runs.tables import TRAINING_COLUMNS, CsvWriter

HERE = {"device": "a CPU", "num_cpus": 2, "num_threads": 1, "torch": "2.13", "python": "3.11"}
FAST = Calibration(gflops=50.0, gib_per_s=10.0)
BEFORE = Figures(val_loss=3.0, train_loss=2.0, tokens_per_s=1000.0, machine=HERE, calibration=FAST)


def verdicts(now: Figures, tolerance_percent: float = 5.0) -> dict[str, str]:
    return {row.figure: row.verdict for row in compare(now, BEFORE, tolerance_percent)}


def write_rows(check: SmokeCheck, rows: list[dict[str, float]]) -> None:
    with CsvWriter(check.run_path / "training.csv", TRAINING_COLUMNS) as table:
        for row in rows:
            table.write(**(dict.fromkeys(TRAINING_COLUMNS) | row))


def test_only_what_is_worse_beyond_the_tolerance_is_worse() -> None:
    same = {"val_loss": "ok", "train_loss": "ok", "tokens_per_s": "ok"}
    assert verdicts(BEFORE) == same
    assert verdicts(replace(BEFORE, val_loss=3.14, train_loss=1.0, tokens_per_s=951.0)) == same
    assert verdicts(replace(BEFORE, tokens_per_s=9000.0)) == same
    assert verdicts(replace(BEFORE, val_loss=3.16)) == same | {"val_loss": "worse"}
    assert verdicts(replace(BEFORE, train_loss=2.11)) == same | {"train_loss": "worse"}
    assert verdicts(replace(BEFORE, tokens_per_s=949.0)) == same | {"tokens_per_s": "worse"}
    assert verdicts(replace(BEFORE, tokens_per_s=949.0), tolerance_percent=6.0) == same
    assert verdicts(replace(BEFORE, val_loss=float("nan")))["val_loss"] == "worse"


@pytest.mark.parametrize("change", [{"device": "another CPU"}, {"num_cpus": 4}, {"num_threads": 2}, {"torch": "2.12"}])
def test_speed_is_compared_on_the_same_machine_only(change: dict[str, object]) -> None:
    elsewhere = replace(BEFORE, tokens_per_s=10.0, machine=HERE | change)
    assert verdicts(elsewhere)["tokens_per_s"] == "not compared"
    assert verdicts(replace(elsewhere, val_loss=9.0))["val_loss"] == "worse"
    assert verdicts(replace(BEFORE, tokens_per_s=10.0, machine=HERE | {"python": "3.12"}))["tokens_per_s"] == "worse"


@pytest.mark.parametrize(
    "calibration", [None, Calibration(40.0, 10.0), Calibration(50.0, 8.0), Calibration(80.0, 16.0)]
)
def test_a_machine_of_the_same_name_that_is_not_as_fast_is_another_one(calibration: Calibration | None) -> None:
    elsewhere = replace(BEFORE, tokens_per_s=500.0, calibration=calibration)
    assert verdicts(elsewhere)["tokens_per_s"] == "not compared"
    assert verdicts(replace(elsewhere, train_loss=9.0))["train_loss"] == "worse"
    assert another_machine(elsewhere, BEFORE)


def test_what_the_machine_itself_has_lost_is_no_fault_of_the_run() -> None:
    slower = Calibration(gflops=46.0, gib_per_s=10.0)  # by 8%
    assert verdicts(replace(BEFORE, tokens_per_s=880.0, calibration=slower))["tokens_per_s"] == "ok"
    assert verdicts(replace(BEFORE, tokens_per_s=860.0, calibration=slower))["tokens_per_s"] == "worse"
    faster = Calibration(gflops=54.0, gib_per_s=10.0)
    assert verdicts(replace(BEFORE, tokens_per_s=940.0, calibration=faster))["tokens_per_s"] == "worse"


def test_a_calibration_is_a_measure_of_this_machine() -> None:
    before = torch.get_num_threads()
    measured = calibrate(torch.device("cpu"), num_threads=1)
    assert 0 < measured.gflops < 1e5
    assert 0 < measured.gib_per_s < 1e4
    assert torch.get_num_threads() == before
    assert measured.differs_percent(measured) == measured.slower_percent(measured) == 0


def test_without_a_baseline_nothing_is_compared() -> None:
    assert {row.verdict for row in compare(BEFORE, None, 5.0)} == {"not compared"}


def test_a_baseline_is_read_as_it_was_written(tmp_path: Path) -> None:
    path = tmp_path / "results" / "smoke.json"
    write_baseline(path, BEFORE)
    assert read_baseline(path) == BEFORE
    path.write_text(json.dumps({"val_loss": 1.0}), encoding="utf-8")
    with pytest.raises(ValueError, match="cannot be used"):
        read_baseline(path)
    path.write_text("{", encoding="utf-8")
    with pytest.raises(ValueError, match="--update_baseline writes a new one"):
        read_baseline(path)


def test_the_config_is_one_that_preflight_passes_on_either_device(tmp_path: Path) -> None:
    for device, precision in (("cpu", "fp32"), ("cuda", "bf16")):
        config = RunConfig.model_validate(smoke_config(tmp_path, device))
        assert config.train.precision == precision
        assert config.train.checkpoint_every_steps < smoke.HALT_AFTER_STEPS < config.train.steps


def test_the_check_ends_with_the_first_step_that_fails(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    bad = smoke_config(tmp_path, "cpu")
    bad["train"]["checkpoint_every_steps"], bad["train"]["steps"] = 0, 9000
    monkeypatch.setattr(smoke, "smoke_config", lambda folder, device: bad)
    monkeypatch.setattr(smoke, "check_kernels", list)
    steps = list(SmokeCheck(tmp_path / "check", "cpu").run())
    assert [step.name for step in steps] == ["kernels against the reference", "preflight"]
    assert steps[0].problem is None
    assert steps[1].problem is not None
    assert "`nsa preflight` ended with 2, not 0" in steps[1].problem
    assert "REFUSED" in steps[1].problem


def test_lost_and_repeated_steps_are_found(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(smoke, "STEPS", 4)
    check = SmokeCheck(tmp_path, "cpu")
    check.run_path.mkdir()
    for steps, whole in (([1, 2, 3, 4], True), ([1, 2, 4], False), ([1, 2, 3, 3, 4], False), ([1, 2, 3], False)):
        write_rows(check, [{"step": step} for step in steps])
        assert (check._rows_are_whole() is None) == whole
    (check.run_path / "training.csv").unlink()
    assert "training.csv is missing" in (check._rows_are_whole() or "")


def test_the_figures_leave_out_the_slow_first_steps(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    for name, value in (("STEPS", 10), ("HALT_AFTER_STEPS", 5), ("SLOW_STEPS", 2), ("LAST_STEPS", 2)):
        monkeypatch.setattr(smoke, name, value)
    check = SmokeCheck(tmp_path, "cpu")
    check.run_path.mkdir()
    speeds = [1, 1, 100, 101, 102, 1, 1, 103, 104, 105]
    rows = [{"step": i, "loss": i / 10, "step_s": smoke.BATCH_TOKENS / s} for i, s in enumerate(speeds, start=1)]
    write_rows(check, rows)
    (check.run_path / "metrics.json").write_text('{"val_loss": 2.5}', encoding="utf-8")
    env = environment(torch.device("cpu")) | {"num_threads": 1}
    (check.run_path / "env.json").write_text(json.dumps(env), encoding="utf-8")
    figures = check.figures()
    assert figures.val_loss == 2.5
    assert 102 < figures.tokens_per_s < 103
    assert figures.calibration is not None
    assert figures.train_loss == pytest.approx(0.95)


def test_the_command_checks_a_whole_run_and_then_against_its_own_figures(tmp_path: Path) -> None:
    """With fewer steps, as a user would run it: first the baseline, then a comparison with one that was better."""
    code = (
        "import sys; from nsa.preflight import smoke; from nsa.cli import main; "
        "smoke.STEPS, smoke.HALT_AFTER_STEPS = 60, 12; sys.exit(main())"
    )
    baseline = tmp_path / "smoke.json"
    run = [sys.executable, "-c", code, "smoke", "--device", "cpu", "--baseline", str(baseline)]
    done = subprocess.run(
        [*run, "--update_baseline", "--folder", str(tmp_path / "check")], capture_output=True, text=True, timeout=250
    )
    assert done.returncode == 0, done.stdout + done.stderr
    assert "the smoke check passed" in done.stdout
    status = json.loads((tmp_path / "check" / "smoke" / "status.json").read_text(encoding="utf-8"))
    assert (status["state"], status["step"]) == ("finished", 60)
    assert status["resumed_from"]["step"] >= 12
    assert 0 < read_baseline(baseline).val_loss < 5.5
