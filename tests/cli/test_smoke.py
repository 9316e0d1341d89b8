"""`nsa smoke`: exit codes, and what it leaves; the check itself is in tests/preflight/test_smoke.py."""

from __future__ import annotations

import json
from collections.abc import Iterator
from dataclasses import asdict
from pathlib import Path

import pytest

from nsa.cli import main
from nsa.preflight.smoke import Figures, SmokeCheck, StepResult, read_baseline, write_baseline

FIGURES = Figures(val_loss=3.0, train_loss=2.0, tokens_per_s=1000.0, machine={"device": "a CPU"})


@pytest.fixture(autouse=True)
def quick(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    """A check that passes without running anything, in a folder without a baseline."""

    def run(self: SmokeCheck) -> Iterator[StepResult]:
        self.folder.mkdir(exist_ok=True)
        yield StepResult("a step", 0.1, None)

    monkeypatch.setattr(SmokeCheck, "run", run)
    monkeypatch.setattr(SmokeCheck, "figures", lambda self: FIGURES)
    monkeypatch.chdir(tmp_path)


def test_without_a_baseline_the_check_passes_and_says_so(capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["smoke", "--device", "cpu"]) == 0
    out = capsys.readouterr().out
    assert "ok     a step (0.1 s)" in out
    assert "there is no benchmarks/results/smoke_cpu.json" in out


def test_a_baseline_is_written_where_it_is_found_again(capsys: pytest.CaptureFixture[str], tmp_path: Path) -> None:
    assert main(["smoke", "--device", "cpu", "--update_baseline"]) == 0
    path = tmp_path / "benchmarks" / "results" / "smoke_cpu.json"
    assert read_baseline(path) == FIGURES
    assert main(["smoke", "--device", "cpu"]) == 0
    assert "+0.00%" in capsys.readouterr().out


def test_a_figure_that_is_worse_ends_with_code_1(capsys: pytest.CaptureFixture[str], tmp_path: Path) -> None:
    path = tmp_path / "better.json"
    write_baseline(path, Figures(2.8, 2.0, 1000.0, FIGURES.machine))
    assert main(["smoke", "--device", "cpu", "--baseline", str(path)]) == 1
    assert "worse than the baseline: val_loss" in capsys.readouterr().out
    assert main(["smoke", "--device", "cpu", "--baseline", str(path), "--tolerance_percent", "10"]) == 0


def test_a_step_that_fails_ends_with_code_1_and_keeps_the_folder(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str], tmp_path: Path
) -> None:
    def run(self: SmokeCheck) -> Iterator[StepResult]:
        self.folder.mkdir()
        yield StepResult("a step", 0.1, "it broke")

    monkeypatch.setattr(SmokeCheck, "run", run)
    monkeypatch.setattr(SmokeCheck, "figures", lambda self: pytest.fail("figures of a failed check"))
    assert main(["smoke", "--device", "cpu", "--folder", str(tmp_path / "check")]) == 1
    out = capsys.readouterr().out
    assert "FAILED a step" in out
    assert "it broke" in out
    assert (tmp_path / "check").is_dir()


@pytest.mark.parametrize(
    ("change", "words"),
    [
        ({"val_loss": None}, "val_loss is None, not a positive number"),
        ({"val_loss": "3.0"}, "val_loss is '3.0', not a positive number"),
        ({"train_loss": 0}, "train_loss is 0, not a positive number"),
        ({"tokens_per_s": float("nan")}, "tokens_per_s is nan, not a positive number"),
        ({"machine": []}, "machine is [], not an object"),
        ({"more": 1}, "unexpected keyword argument 'more'"),
    ],
)
def test_a_damaged_baseline_is_refused_before_anything_is_run(
    change: dict[str, object], words: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys
) -> None:
    monkeypatch.setattr(SmokeCheck, "run", lambda self: pytest.fail("ran with a damaged baseline"))
    path = tmp_path / "damaged.json"
    path.write_text(json.dumps(asdict(FIGURES) | change), encoding="utf-8")
    assert main(["smoke", "--device", "cpu", "--baseline", str(path)]) == 2
    assert f"{path} cannot be used: " in (error := capsys.readouterr().err)
    assert words in error


@pytest.mark.parametrize(
    ("arguments", "words"),
    [
        (["--baseline", "absent.json"], "absent.json cannot be used"),
        (["--tolerance_percent", "-1"], "at least 0"),
        (["--device", "tpu9"], "unknown"),
        (["--folder", "."], "exists already"),
    ],
)
def test_mistakes_end_with_code_2(arguments: list[str], words: str, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["smoke", *arguments]) == 2
    assert words in capsys.readouterr().err
