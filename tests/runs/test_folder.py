"""The status of a run: a failure stays until the run is begun again, and says all that is known."""

from __future__ import annotations

import json
import os
from pathlib import Path

import pytest

from nsa.runs import folder as module
from nsa.runs.folder import FailureStatus, RunFolder


@pytest.fixture
def folder(tmp_path: Path) -> RunFolder:
    return RunFolder.create(tmp_path / "run", config_yaml="", env={}, data_index={"description": "words"})


def fail(folder: RunFolder, error: Exception, *, rank: int = 0, step: int = 7) -> None:
    with FailureStatus(folder, rank, lambda: step):
        raise error


def test_the_first_failure_stays_whatever_other_ranks_write_after_it(folder: RunFolder) -> None:
    with pytest.raises(ValueError, match="torn cable"):
        fail(folder, ValueError("torn cable"), rank=1)
    with pytest.raises(RuntimeError):
        fail(folder, RuntimeError("connection closed by peer"), rank=0)
    folder.write_status("running", step=8)
    status = folder.read_status()
    assert (status["state"], status["step"], status["rank"]) == ("failed", 7, 1)
    assert status["reason"] == "ValueError: torn cable"


def test_a_run_that_begins_again_forgets_the_failure_and_keeps_where_it_came_from(folder: RunFolder) -> None:
    with pytest.raises(ValueError, match="torn cable"):
        fail(folder, ValueError("torn cable"))
    folder.begin_again(step=4, resumed_from={"step": 4, "count": 1})
    assert folder.read_status()["state"] == "running"
    folder.write_status("finished", step=9)
    assert folder.read_status()["resumed_from"] == {"step": 4, "count": 1}
    assert folder.read_status()["rank"] is None


def test_a_failure_names_what_was_noted_on_the_way_and_the_command_that_goes_on(folder: RunFolder) -> None:
    error = OSError(28, "No space left on device")
    error.add_note("the checkpoint of step 5 could not be written")
    with pytest.raises(OSError, match="No space left") as caught:
        fail(folder, error)
    reason = "OSError: [Errno 28] No space left on device; the checkpoint of step 5 could not be written"
    assert folder.read_status()["reason"] == reason
    assert f"rank 0, after step 7; once mended: nsa resume {folder.path}" in caught.value.__notes__


def test_a_failure_goes_on_though_its_status_cannot_be_written(
    folder: RunFolder, monkeypatch: pytest.MonkeyPatch
) -> None:
    def full(*args: object, **options: object) -> None:
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(module, "write_json", full)
    with pytest.raises(ValueError, match="torn cable") as caught:
        fail(folder, ValueError("torn cable"))
    assert "status.json could not be written" in caught.value.__notes__[-1]
    monkeypatch.undo()
    assert json.loads(folder.status_json.read_text())["state"] == "running"


def test_a_new_run_folder_is_locked(folder: RunFolder) -> None:
    with pytest.raises(ValueError, match="is in use by process"):
        RunFolder(folder.path).lock.acquire()


def test_nothing_is_written_through_a_planted_link(folder: RunFolder, tmp_path: Path) -> None:
    outside = tmp_path / "outside.txt"
    outside.write_text("mine")
    for name in (f".config.yaml.{os.getpid()}.part", "report.md"):
        (folder.path / name).symlink_to(outside)
    module.write_text(folder.config_yaml, "run: {}")
    module.write_text(folder.report_md, "# Run")
    assert folder.config_yaml.read_text() == "run: {}"
    assert not folder.report_md.is_symlink()
    assert outside.read_text() == "mine"


def test_small_files_reach_the_disk_and_a_failed_write_leaves_nothing(
    folder: RunFolder, monkeypatch: pytest.MonkeyPatch
) -> None:
    synced: list[int] = []
    monkeypatch.setattr(os, "fsync", synced.append)
    module.write_text(folder.config_yaml, "run: {}")
    assert len(synced) == 2  # the file and its folder
    folder.write_status("running", step=3)
    assert len(synced) == 2

    def full(*args: object) -> None:
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(os, "replace", full)
    before = sorted(folder.path.iterdir())
    with pytest.raises(OSError, match="No space left"):
        module.write_text(folder.config_yaml, "other")
    assert sorted(folder.path.iterdir()) == before
    assert folder.config_yaml.read_text() == "run: {}"
