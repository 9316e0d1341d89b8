"""One process at a time writes a run folder, and what a killed one left behind locks nothing."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
from pathlib import Path

import pytest

from nsa.runs.lock import RunLock

HOLD = """
import sys, time
from pathlib import Path
from nsa.runs.lock import RunLock
lock = RunLock(Path(sys.argv[1]))
lock.acquire()
print("held", flush=True)
time.sleep(120)
"""


def test_a_second_process_is_refused_until_the_first_is_killed(tmp_path: Path) -> None:
    path = tmp_path / "run.lock"
    source = str(Path(__file__).parents[2] / "src")
    command = [sys.executable, "-c", HOLD, str(path)]
    with subprocess.Popen(command, env={"PYTHONPATH": source}, stdout=subprocess.PIPE, text=True) as process:
        assert process.stdout is not None
        assert process.stdout.readline() == "held\n"
        with pytest.raises(ValueError, match=rf"is in use by process {process.pid} on .*nsa halt {tmp_path}"):
            RunLock(path).acquire()
        process.send_signal(signal.SIGKILL)
        process.wait()
    lock = RunLock(path)
    note = lock.acquire()
    assert note is not None
    assert f"was left by process {process.pid} on" in note
    lock.close()
    assert RunLock(path).acquire() is None


def test_a_lock_is_given_back(tmp_path: Path) -> None:
    first, second = RunLock(tmp_path / "run.lock"), RunLock(tmp_path / "run.lock")
    first.close()
    assert first.acquire() is None
    with pytest.raises(ValueError, match="is in use by process"):
        second.acquire()
    first.close()
    assert second.acquire() is None


def test_the_lock_holds_though_its_file_is_removed(tmp_path: Path) -> None:
    first, second = RunLock(tmp_path / "run.lock"), RunLock(tmp_path / "run.lock")
    first.acquire()
    assert second.is_held()
    first.path.unlink()
    with pytest.raises(ValueError, match="is in use by another process"):
        second.acquire()
    first.close()
    assert not second.is_held()
    second.acquire()
    second.close()


@pytest.mark.parametrize("kind", ["link", "dangling link", "folder", "pipe"])
def test_nothing_is_written_through_what_is_no_file(tmp_path: Path, kind: str) -> None:
    path, other = tmp_path / "run.lock", tmp_path / "other.txt"
    other.write_text("mine")
    if kind == "folder":
        path.mkdir()
    elif kind == "pipe":
        os.mkfifo(path)
    else:
        path.symlink_to(other if kind == "link" else tmp_path / "absent")
    with pytest.raises(ValueError, match=r"run\.lock is a"):
        RunLock(path).acquire()
    assert other.read_text() == "mine"
    assert not (tmp_path / "absent").exists()
