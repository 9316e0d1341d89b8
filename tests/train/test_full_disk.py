"""A disk that is full for a while, or a file that the run does not need, never ends a healthy run."""

from __future__ import annotations

import errno
import os
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from nsa.config.run import RunConfig
from nsa.launch.resume import prepare_resume
from nsa.launch.resume_config import resumed_config
from nsa.launch.start import prepare
from nsa.runs import files
from nsa.runs.folder import RunFolder
from nsa.runs.tables import TRAINING_COLUMNS, VALIDATION_COLUMNS, CsvWriter, read_csv
from nsa.train import loop as run_module
from nsa.train.loop import ReportError, train
from nsa.train.telemetry import recorder

ROW = {"val_loss": 1.0, "val_ppl": 2.0, "val_bits_per_byte": 3.0}


def full(*args: Any, **options: Any) -> Any:
    raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))


def half_full(descriptor: int, data: bytes) -> int:
    """Only half of what is written finds room."""
    return HONEST_WRITE(descriptor, data[: len(data) // 2])


HONEST_WRITE = os.write


@pytest.mark.parametrize("write", [full, half_full])
def test_rows_wait_for_room_and_come_in_order(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str], write: Callable[..., Any]
) -> None:
    path = tmp_path / "val.csv"
    with CsvWriter(path, VALIDATION_COLUMNS) as writer:
        writer.write(step=0, **ROW)
        with monkeypatch.context() as patch:
            patch.setattr(files.os, "write", write)
            writer.write(step=3, **ROW)
            writer.write(step=6, **ROW)
        assert [row["step"] for row in read_csv(path, VALIDATION_COLUMNS)] == [0]
        assert path.read_text().endswith("\n")
        writer.write(step=9, **ROW)
    assert [row["step"] for row in read_csv(path, VALIDATION_COLUMNS)] == [0, 3, 6, 9]
    assert capsys.readouterr().err.count("val.csv: a row cannot be written") == 1


def test_rows_for_which_no_room_came_are_counted(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    with CsvWriter(tmp_path / "val.csv", VALIDATION_COLUMNS) as writer:
        monkeypatch.setattr(files.os, "write", full)
        writer.write(step=3, **ROW)
        writer.write(step=6, **ROW)
    assert "val.csv: 2 rows are lost: No space left on device" in capsys.readouterr().err


def test_a_run_ends_in_order_without_board_samples_and_status(
    tiny: Callable[..., RunConfig], monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    trainer, folder = prepare(tiny(train={"steps": 4, "log_every_steps": 1}))
    honest = RunFolder.write_status
    monkeypatch.setattr(recorder.SummaryWriter, "add_scalar", full)
    monkeypatch.setattr(recorder.SummaryWriter, "close", full)

    def write_status(self: RunFolder, state: Any, **rest: Any) -> None:
        full() if state == "running" else honest(self, state, **rest)

    monkeypatch.setattr(RunFolder, "write_status", write_status)
    honest_samples = trainer.write_samples
    trainer.write_samples = lambda folder, moment: full() if moment == "before" else honest_samples(folder, moment)
    assert train(trainer, folder).metrics["step"] == 4
    said = capsys.readouterr().out
    assert said.count(f"{folder.tensorboard} cannot be written: [Errno 28]") == 1
    assert f"{folder.samples}/before.txt cannot be written: [Errno 28]" in said
    assert f"{folder.status_json} cannot be written" in said
    assert folder.read_status()["state"] == "finished"
    assert [row["step"] for row in read_csv(folder.training_csv, TRAINING_COLUMNS)] == [1, 2, 3, 4]


@pytest.mark.parametrize("error", [OSError(errno.ENOSPC, "No space left on device"), ValueError("val.csv, line 2")])
def test_a_training_that_is_complete_is_finished_though_its_report_fails(
    tiny: Callable[..., RunConfig], monkeypatch: pytest.MonkeyPatch, error: Exception
) -> None:
    def fail(*args: object) -> None:
        raise error

    trainer, folder = prepare(tiny(train={"steps": 2}))
    with monkeypatch.context() as patch:
        patch.setattr(run_module, "write_report", fail)
        with pytest.raises((OSError, ReportError)) as caught:
            train(trainer, folder)
    assert f"nsa resume {folder.path} writes it" in caught.value.__notes__[-1]
    status = folder.read_status()
    assert (status["state"], status["step"], status["reason"]) == ("finished", 2, None)
    assert str(error) in status["report_failure"]
    train(*prepare_resume(resumed_config(folder.path)))
    assert folder.report_md.is_file()
    assert "report_failure" not in folder.read_status()
    with pytest.raises(ValueError, match="has finished its 2 steps"):
        prepare_resume(resumed_config(folder.path))


@pytest.mark.parametrize("place", ["write_json", "write_text"])
def test_a_run_folder_is_made_whole_or_not_at_all(
    tiny: Callable[..., RunConfig], tmp_path: Path, monkeypatch: pytest.MonkeyPatch, place: str
) -> None:
    with monkeypatch.context() as patch:
        patch.setattr(f"nsa.runs.folder.{place}", full)
        with pytest.raises(OSError, match="No space left"):
            prepare(tiny())
    assert list((tmp_path / "runs").iterdir()) == []
    _, folder = prepare(tiny())
    with pytest.raises(ValueError, match="is in use by process"):
        RunFolder(folder.path).lock.acquire()
    folder.lock.close()
