"""A request to stop is noted once, agreed on by all ranks, and a HALT file from before a start stops nothing."""

from __future__ import annotations

import os
import signal
from pathlib import Path

import pytest

from nsa.train.stop import SIGNALS, Stop, StopRequest, ask_to_halt, clear_stale_halt
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
            assert (stop.agreed(), seen) == (Stop(number.name, 0), [number])
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


def test_a_stale_halt_file_is_put_aside_and_said(tmp_path: Path) -> None:
    halt = tmp_path / "HALT"
    assert clear_stale_halt(halt) is None
    ask_to_halt(halt)
    note = clear_stale_halt(halt)
    assert note is not None
    assert "HALT.old" in note
    assert StopRequest(halt, ONE_PROCESS).agreed() is None


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
