"""`nsa resume` and `nsa halt` as a user runs them, and how a run that fails on the way ends."""

from __future__ import annotations

import errno
import json
import os
from pathlib import Path
from typing import Any

import pytest
from torch.distributed.checkpoint.filesystem import FileSystemWriter

from nsa.cli import main
from nsa.data.errors import DataError
from nsa.runs.checkpoints import complete_checkpoints, newest_checkpoint
from nsa.runs.folder import RunFolder
from nsa.runs.tables import TRAINING_COLUMNS, read_csv
from nsa.train.trainer import Trainer

EVERY_2 = ("--train.checkpoint_every_steps", "2", "--train.keep_checkpoints", "9")


def status(folder: Path) -> dict[str, Any]:
    return json.loads((folder / "status.json").read_text())


@pytest.fixture
def run(tiny_config: Path) -> Path:
    """Where the run of `tiny_config` lies once it has begun."""
    return tiny_config.parent / "runs" / "tiny"


def fail_once(monkeypatch: pytest.MonkeyPatch, step: int, error: Exception) -> None:
    """Let `error` come once, in the middle of the step after `step`."""
    honest, left = Trainer.train_step, [error]

    def failing(self: Trainer) -> Any:
        if self.step == step and left:
            raise left.pop()
        return honest(self)

    monkeypatch.setattr(Trainer, "train_step", failing)


def test_a_run_that_failed_is_resumed_and_finishes(
    tiny_config: Path, run: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    fail_once(monkeypatch, 5, DataError("words.txt vanished; put it back"))
    assert main(["train", str(tiny_config), *EVERY_2]) == 1
    assert "nsa train: failed: words.txt vanished" in capsys.readouterr().err
    failed = status(run)
    assert (failed["state"], failed["step"], failed["rank"]) == ("failed", 5, 0)
    assert failed["reason"] == "DataError: words.txt vanished; put it back"
    assert newest_checkpoint(run).name == "step_000004"
    assert main(["resume", str(run), "--train.log_every_steps", "1"]) == 0
    out = capsys.readouterr().out
    for part in (f"resuming {run} from step_000004", "train.log_every_steps: 2 -> 1", "step 5/6  loss", "finished"):
        assert part in out, part
    assert [row["step"] for row in read_csv(run / "training.csv", TRAINING_COLUMNS)] == [1, 2, 3, 4, 5, 6]
    assert status(run)["state"] == "finished"
    assert main(["resume", str(run)]) == 2
    assert "has finished its 6 steps" in capsys.readouterr().err


def test_a_full_disk_ends_a_run_with_code_1_and_the_older_checkpoints(
    tiny_config: Path, run: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    honest = FileSystemWriter.write_data

    def full(self: FileSystemWriter, *args: Any) -> Any:
        written = honest(self, *args)
        if "step_000004" in str(self.path):
            raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))
        return written

    with monkeypatch.context() as patch:
        patch.setattr(FileSystemWriter, "write_data", full)
        assert main(["train", str(tiny_config), *EVERY_2]) == 1
    said = capsys.readouterr().err
    for part in (f"{run}/checkpoints/step_000004 could not be written", "rank 0: OSError", "No space left on device"):
        assert part in said, part
    assert f"continue with: nsa resume {run}" in said
    assert status(run)["state"] == "failed"
    assert status(run)["step"] in (4, 5, 6)
    assert "No space left on device" in status(run)["reason"]
    assert sorted(path.name for path in (run / "checkpoints").iterdir()) == ["latest", "step_000002"]
    assert main(["resume", str(run)]) == 0
    assert [path.name for path in complete_checkpoints(run / "checkpoints")][-1] == "step_000006"


def test_mistakes_end_with_code_2_and_change_nothing(
    tiny_config: Path, run: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    for arguments, words in (
        (["resume"], "usage: nsa resume RUN"),
        (["resume", str(run)], "is no run folder"),
        (["halt"], "usage: nsa halt RUN"),
        (["halt", str(run)], "is no run folder"),
    ):
        assert main(arguments) == 2
        assert words in capsys.readouterr().err
    assert main(["train", str(tiny_config)]) == 0
    before = {path: path.read_bytes() for path in run.rglob("*") if path.is_file()}
    capsys.readouterr()
    assert main(["resume", str(run), "--optim.lr", "1"]) == 2
    assert "  optim.lr" in capsys.readouterr().err
    assert main(["halt", str(run)]) == 2
    assert "is finished at step 6; nothing to halt" in capsys.readouterr().err
    folder = RunFolder(run)
    folder.lock.acquire()
    assert main(["resume", str(run), "--train.steps", "9"]) == 2
    folder.lock.close()
    assert "is in use by process" in capsys.readouterr().err
    assert {path: path.read_bytes() for path in run.rglob("*") if path.is_file()} == before


def test_halt_names_a_damaged_status_and_the_way_around_it(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    (tmp_path / "status.json").write_text('{"sta')
    assert main(["halt", str(tmp_path)]) == 2
    said = capsys.readouterr().err
    assert f"{tmp_path}/status.json is missing or damaged" in said
    assert f"touch {tmp_path}/HALT" in said


def test_help_names_what_may_be_changed(capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["resume", "--help"]) == 0
    assert "--train.steps" in capsys.readouterr().out
    assert main(["halt", "--help"]) == 0
    assert "usage: nsa halt" in capsys.readouterr().out


def test_halt_stops_a_run_with_code_3_and_resume_goes_on(
    tiny_config: Path, run: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    honest = Trainer.train_step

    def halted(self: Trainer) -> Any:
        if self.step == 3 and not (run / "HALT.old").exists():
            assert main(["halt", str(run), "needed", "elsewhere"]) == 0
        return honest(self)

    monkeypatch.setattr(Trainer, "train_step", halted)
    assert main(["train", str(tiny_config)]) == 3
    assert "stopped by HALT: needed elsewhere" in capsys.readouterr().out
    assert (status(run)["state"], status(run)["step"]) == ("stopped", 4)
    assert main(["resume", str(run)]) == 0
    assert status(run)["resumed_from"]["checkpoint"] == "step_000004"


def test_halt_stops_a_run_that_is_just_being_resumed(
    tiny_config: Path, run: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    fail_once(monkeypatch, 3, DataError("away"))
    assert main(["train", str(tiny_config), *EVERY_2]) == 1
    assert main(["halt", str(run)]) == 2
    assert "is failed at step 3; nothing to halt" in capsys.readouterr().err
    honest = Trainer.__init__

    def halted(self: Trainer, *arguments: Any, **options: Any) -> None:
        assert main(["halt", str(run), "wait"]) == 0
        honest(self, *arguments, **options)

    monkeypatch.setattr(Trainer, "__init__", halted)
    assert main(["resume", str(run)]) == 3
    out = capsys.readouterr().out
    assert "the run stops after its current step" in out
    assert (status(run)["state"], status(run)["reason"]) == ("stopped", "HALT: wait")


def test_halt_says_when_nothing_here_reads_it(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    here = RunFolder.create(tmp_path / "run", config_yaml="", env={}, data_index={})
    assert main(["halt", str(here.path)]) == 0
    assert "the run stops after its current step" in capsys.readouterr().out
    gone = RunFolder.create(tmp_path / "gone", config_yaml="", env={}, data_index={})
    gone.lock.close()
    assert main(["halt", str(gone.path)]) == 0
    assert f"but no process on this machine trains in {gone.path}" in capsys.readouterr().out
