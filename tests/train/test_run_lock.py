"""One process at a time writes a run folder, and what a killed one left behind locks nothing."""

from __future__ import annotations

import signal
import subprocess
import sys
from pathlib import Path

import pytest

from nsa.train.run_lock import RunLock

HOLD = """
import sys, time
from pathlib import Path
from nsa.train.run_lock import RunLock
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
