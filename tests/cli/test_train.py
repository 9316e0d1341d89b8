"""`nsa train` as a user runs it: exit codes, messages, and a run that is told to stop."""

from __future__ import annotations

import json
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest
import yaml

import nsa
from nsa.cli import main
from nsa.runs.checkpoints import newest_checkpoint


def test_a_run_prints_config_progress_samples_and_where_it_lies(
    tiny_config: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert main(["train", str(tiny_config), "--train.steps", "4"]) == 0
    out = capsys.readouterr().out
    folder = tiny_config.parent / "runs" / "tiny"
    for part in (
        "sequence_length: 64",
        "4 of 512 tokens (2 x 4 rows of 64), 2,048 in all",
        "step 4/4  loss",
        "held-out documents after step 4",
        "before training, step 0",
        "after training, step 4",
        "held-out bits per byte",
        f"everything lies in {folder}",
    ):
        assert part in out, part
    assert yaml.safe_load((folder / "config.yaml").read_text())["train"]["steps"] == 4
    assert json.loads((folder / "env.json").read_text())["command"][:2] == ["nsa", "train"]


def test_mistakes_end_with_code_2_and_leave_nothing_behind(
    tiny_config: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    runs = tiny_config.parent / "runs"
    assert main(["train", str(tiny_config.parent / "absent.yaml")]) == 2
    assert "there is no config file" in capsys.readouterr().err
    assert main(["train"]) == 2
    assert "usage: nsa train CONFIG" in capsys.readouterr().err
    assert main(["train", str(tiny_config), "--train.stepz", "3"]) == 2
    assert "--train.steps" in capsys.readouterr().err
    assert main(["train", str(tiny_config), "--data.paths", str(runs / "absent.txt")]) == 2
    assert "absent.txt" in capsys.readouterr().err
    blocked = tiny_config.parent / "file"
    blocked.write_text("")
    assert main(["train", str(tiny_config), "--run.folder", str(blocked)]) == 2
    assert not runs.exists()


def test_an_existing_run_is_refused_with_the_remedy(tiny_config: Path, capsys: pytest.CaptureFixture[str]) -> None:
    folder = tiny_config.parent / "runs" / "tiny"
    folder.mkdir(parents=True)
    assert main(["train", str(tiny_config)]) == 2
    assert "--run.name tiny-2" in capsys.readouterr().err
    assert list(folder.iterdir()) == []


def test_preflight_refuses_with_all_reasons_and_how_to_override_them(
    tiny_config: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    wrong = ["--train.steps", "6000", "--train.checkpoint_every_steps", "0", "--optim.lr", "1"]
    assert main(["train", str(tiny_config), *wrong]) == 2
    message = capsys.readouterr().err
    assert "error   no-checkpoints: 6,000 steps" in message
    assert "--preflight.allow no-checkpoints learning-rate" in message
    assert not (tiny_config.parent / "runs").exists()


def test_an_override_of_preflight_is_written_into_every_artifact(
    tiny_config: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert main(["train", str(tiny_config), "--optim.lr", "0.5", "--preflight.allow", "learning-rate"]) == 0
    folder = tiny_config.parent / "runs" / "tiny"
    assert "allowed learning-rate: optim.lr 0.5" in capsys.readouterr().out
    assert yaml.safe_load((folder / "config.yaml").read_text())["preflight"] == {"allow": ["learning-rate"]}
    assert json.loads((folder / "status.json").read_text())["preflight_overridden"] == ["learning-rate"]
    found = json.loads((folder / "preflight.json").read_text())["findings"]
    assert [(f["code"], f["level"], f["allowed"]) for f in found] == [("learning-rate", "error", True)]
    assert "**Preflight was overridden: learning-rate**" in (folder / "report.md").read_text()


def test_a_failed_guard_ends_with_code_1(tiny_config: Path, capsys: pytest.CaptureFixture[str]) -> None:
    floor = ["--guards.entropy_floor_nats", "100", "--preflight.allow", "entropy-floor"]
    assert main(["train", str(tiny_config), *floor]) == 1
    assert "below the data's floor of 100" in capsys.readouterr().err
    status = json.loads((tiny_config.parent / "runs" / "tiny" / "status.json").read_text())
    assert status["state"] == "failed"


def test_sigterm_ends_a_run_with_code_3_and_a_checkpoint(tiny_config: Path) -> None:
    folder = tiny_config.parent / "runs" / "tiny"
    code = "import sys; from nsa.cli import main; sys.exit(main())"
    command = [sys.executable, "-c", code, "train", str(tiny_config), "--train.steps", "100000"]
    source = str(Path(nsa.__file__).parents[1])
    with subprocess.Popen(command, env={"PYTHONPATH": source}, stdout=subprocess.DEVNULL) as process:
        table, deadline = folder / "training.csv", time.monotonic() + 120
        while not (table.is_file() and table.read_text().count("\n") > 3):
            assert process.poll() is None
            assert time.monotonic() < deadline
            time.sleep(0.05)
        process.send_signal(signal.SIGTERM)
        assert process.wait(timeout=120) == 3
    status = json.loads((folder / "status.json").read_text())
    assert (status["state"], status["reason"]) == ("stopped", "SIGTERM")
    assert newest_checkpoint(folder).name == f"step_{status['step']:06d}"
    assert (folder / "curves.png").is_file()
