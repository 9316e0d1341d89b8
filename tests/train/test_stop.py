"""A request to stop is noted once, agreed on by all ranks, and a HALT file from before a start stops nothing."""

from __future__ import annotations

import os
import signal
import time
from pathlib import Path

import pytest

from nsa.runs.halt import ask_to_halt, clear_stale_halt
from nsa.runs.lock import RunLock
from nsa.train.stop import SIGNALS, Stop, StopRequest
from ranks import run_ranks
from saved_runs import ONE_PROCESS


@pytest.mark.parametrize("number", SIGNALS)
def test_the_first_signal_is_noted_and_a_second_acts_as_before(number: signal.Signals, tmp_path: Path) -> None:
    seen: list[int] = []
    before = signal.signal(number, lambda received, _: seen.append(received))
    try:
        with StopRequest(tmp_path / "HALT", ONE_PROCESS) as stop:
            assert stop.agreed() is None
            os.kill(os.getpid(), number)
            assert (stop.agreed(), seen) == (Stop(number.name, 0), [])
            os.kill(os.getpid(), number)
            # A lost terminal sends SIGHUP twice.
            again = [] if number == signal.SIGHUP else [number]
            assert (stop.agreed(), seen) == (Stop(number.name, 0), again)
    finally:
        signal.signal(number, before)


def test_without_a_signal_the_handlers_are_put_back(tmp_path: Path) -> None:
    before = [signal.getsignal(number) for number in SIGNALS]
    with StopRequest(tmp_path / "HALT", ONE_PROCESS) as stop:
        assert [signal.getsignal(number) for number in SIGNALS] != before
    assert stop.signal_name is None
    assert [signal.getsignal(number) for number in SIGNALS] == before


@pytest.mark.parametrize(
    ("contents", "reason"), [("", "HALT"), ("the disk is\nneeded \n", "HALT: the disk is\nneeded")]
)
def test_a_halt_file_is_obeyed_once_with_its_reason(tmp_path: Path, contents: str, reason: str) -> None:
    stop = StopRequest(tmp_path / "HALT", ONE_PROCESS)
    ask_to_halt(stop.halt, contents)
    assert stop.agreed() == Stop(reason, 0)
    assert [path.name for path in tmp_path.iterdir()] == ["HALT.old"]
    assert stop.agreed() is None


def test_a_failure_in_the_background_stops_the_loop(tmp_path: Path) -> None:
    assert StopRequest(tmp_path / "HALT", ONE_PROCESS).agreed(failed=True) == Stop("a failure in the background", 0)


def test_what_is_ignored_at_the_start_stays_ignored_as_under_nohup(tmp_path: Path) -> None:
    before = signal.signal(signal.SIGHUP, signal.SIG_IGN)
    try:
        with StopRequest(tmp_path / "HALT", ONE_PROCESS) as stop:
            os.kill(os.getpid(), signal.SIGHUP)
            assert stop.agreed() is None
        assert signal.getsignal(signal.SIGHUP) is signal.SIG_IGN
    finally:
        signal.signal(signal.SIGHUP, before)


def test_a_stale_halt_file_is_put_aside_and_said_and_a_newer_one_is_obeyed(tmp_path: Path) -> None:
    halt, lock = tmp_path / "HALT", RunLock(tmp_path / "run.lock")
    ask_to_halt(halt)
    os.utime(halt, ns=(0, time.time_ns() - 10**9))
    lock.acquire()
    note = clear_stale_halt(halt, lock.since_ns())
    assert note is not None
    assert "is from 1 s before now" in note
    assert "HALT.old" in note
    ask_to_halt(halt, "while it starts")
    assert clear_stale_halt(halt, lock.since_ns()) is None
    assert StopRequest(halt, ONE_PROCESS).agreed() == Stop("HALT: while it starts", 0)
    assert clear_stale_halt(halt, lock.since_ns()) is None
    lock.close()


@pytest.mark.parametrize("before", ["nothing", "file", "folder"])
@pytest.mark.parametrize("kind", ["pipe", "folder", "link", "dangling link", "large"])
def test_halt_may_be_anything_and_only_a_file_gives_a_reason(tmp_path: Path, kind: str, before: str) -> None:
    halt, old, secret = tmp_path / "HALT", tmp_path / "HALT.old", tmp_path / "secret"
    secret.write_text("not this")
    {"nothing": lambda: None, "file": old.touch, "folder": lambda: (old / "inside").mkdir(parents=True)}[before]()
    if kind == "pipe":
        os.mkfifo(halt)
    elif kind == "folder":
        (halt / "inside").mkdir(parents=True)
    elif kind == "large":
        halt.write_text("\x1b[2Jx" * 10**6)
    else:
        halt.symlink_to(secret if kind == "link" else tmp_path / "absent")
    stop = StopRequest(halt, ONE_PROCESS).agreed()
    assert stop is not None
    if kind == "large":
        assert stop.reason.startswith(r"HALT: \x1b[2Jx\x1b")
        assert len(stop.reason) < 2000
    else:
        assert stop.reason == "HALT"
    assert not os.path.lexists(halt)
    assert os.path.lexists(old)
    assert secret.read_text() == "not this"


AGREE = """
import os, signal
from pathlib import Path
from nsa.train.stop import StopRequest

with setup_parallel("cpu", timeout_s=60) as parallel, StopRequest(Path(given), parallel) as stop:
    seen = [stop.agreed()]
    seen.append(stop.agreed(failed=parallel.rank == 1))
    if parallel.rank == 1:
        Path(given).write_text("from rank 1")
    parallel.barrier()
    seen.append(stop.agreed())
    if parallel.rank == 1:
        os.kill(os.getpid(), signal.SIGTERM)
    seen.append(stop.agreed())
    report([value and (value.reason, value.rank) for value in seen])
"""


def test_two_ranks_stop_together_whoever_was_asked(tmp_path: Path) -> None:
    expected = [None, ("a failure in the background", 1), ("HALT: from rank 1", 0), ("SIGTERM", 1)]
    assert run_ranks(AGREE, str(tmp_path / "HALT")) == [expected, expected]
