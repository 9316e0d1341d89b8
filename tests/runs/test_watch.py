"""The watch: what it finds in a run folder, how far it escalates it, and whom it signals."""

from __future__ import annotations

import math
import os
import signal
import subprocess
import sys
import time
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

import psutil
import pytest

from made_up_beats import COLLAPSED_GATE, NOW_S, beat, beats, holding, of_rank, write_beats
from nsa.runs import watch as watch_module
from nsa.runs.folder import RunFolder, write_json
from nsa.runs.heartbeat import SCHEMA
from nsa.runs.thresholds import Thresholds
from nsa.runs.watch import Look, Watch, ask_for_stacks, process_of

NO_PROCESS = 2**30  # beyond the numbers that a system gives


class Clock:
    def __init__(self) -> None:
        self.now_s = NOW_S

    def __call__(self) -> float:
        return self.now_s

    @property
    def both(self) -> dict[str, Any]:
        """This clock as the one that can be set and the one that cannot."""
        return {"clock": self, "monotonic": self}


@pytest.fixture
def run(tmp_path: Path) -> Iterator[Path]:
    set_status(tmp_path, "running")
    with holding(tmp_path, 0, 1):
        yield tmp_path


@pytest.fixture
def clock() -> Clock:
    return Clock()


@pytest.fixture
def signals(monkeypatch: pytest.MonkeyPatch) -> list[tuple[int, int]]:
    """What would have been sent: process and signal."""
    sent: list[tuple[int, int]] = []
    monkeypatch.setattr(os, "kill", lambda pid, number: sent.append((pid, number)))
    return sent


def set_status(run: Path, state: str, **changes) -> None:
    values = {"state": state, "step": 50, "reason": None, "unix_time_s": NOW_S, **changes}
    write_json(RunFolder(run).status_json, values)


def names(look: Look) -> list[tuple[str, int]]:
    return [(finding.name, finding.rank) for finding in look.findings]


def test_a_healthy_run_is_left_alone(run: Path, clock: Clock, signals: list) -> None:
    write_beats(run, of_rank(0, beats(50)))
    write_beats(run, of_rank(1, beats(50)))
    watch = Watch(run, Thresholds(), **clock.both)
    look = watch.look()
    assert look.running
    assert sorted(look.beats) == [0, 1]
    assert look.findings == []
    assert watch.act(look) == []
    assert watch.gave_up(look) is None
    assert signals == []
    assert not (run / "HALT").exists()


def test_what_lasts_is_escalated_a_step_at_a_time(run: Path, clock: Clock, signals: list) -> None:
    watch = Watch(run, Thresholds(stacks_after_s=30, halt_after_s=120, halt_wait_s=300), **clock.both)
    did: dict[int, list[str]] = {}
    for second in range(0, 520, 10):
        clock.now_s = NOW_S + second
        write_beats(run, [beat(unix_time_s=clock.now_s, phase="fetch", progress_age_s=175.0 + second)])
        look = watch.look()
        if done := watch.act(look):
            did[second] = done
        if watch.gave_up(look):
            break
    assert list(did) == [10, 40, 130]
    assert did[10][0].startswith("alarm: stall: rank 0, step 50: no progress for 185 s")
    assert f"writes its stacks to {run / 'stacks_rank0.txt'}" in did[40][0]
    assert signals == [(os.getpid(), signal.SIGUSR1)]
    assert "halt: wrote" in did[130][0]
    assert "stall: rank 0, step 50" in (run / "HALT").read_text()
    assert second == 440
    assert str(os.getpid()) in (watch.gave_up(look) or "")


def test_what_passes_is_forgotten_and_escalates_anew_when_it_comes_back(run: Path, clock: Clock, signals: list) -> None:
    watch = Watch(run, Thresholds(stacks_after_s=0, halt_after_s=60), **clock.both)
    for second, age_s in ((0, 200.0), (50, 1.0), (100, 200.0), (150, 250.0)):
        clock.now_s = NOW_S + second
        write_beats(run, [beat(unix_time_s=clock.now_s, progress_age_s=age_s)])
        watch.act(watch.look())
    assert len(signals) == 2
    assert not (run / "HALT").exists()


def test_remarks_are_only_said_and_slow_steps_are_not_halted(run: Path, clock: Clock, signals: list) -> None:
    watch = Watch(run, Thresholds(stacks_after_s=0, halt_after_s=0), **clock.both)
    write_beats(run, beats(50, counters={"skipped_steps": 1}))
    look = watch.look()
    assert watch.act(look) == [
        "warning: counters: rank 0, step 59: skipped steps 1. All of these are 0 in a healthy run; see its log"
    ]
    assert (look.alarms, signals) == ([], [])
    watch = Watch(run, Thresholds(stacks_after_s=0, halt_after_s=0), **clock.both)
    write_beats(run, beats(124, tokens_per_s=[100.0] * 100 + [50.0] * 24, pid=NO_PROCESS))
    assert ("throughput", 0) in names(watch.look())
    assert watch.act(watch.look())[-1] == f"stacks: rank 0: process {NO_PROCESS} is gone"
    assert not (run / "HALT").exists()


def test_a_watch_that_may_not_halt_does_not(run: Path, clock: Clock, signals: list) -> None:
    watch = Watch(run, Thresholds(stacks_after_s=0, halt_after_s=0), halt=False, **clock.both)
    write_beats(run, [beat(loss=math.nan)])
    assert watch.act(watch.look())
    assert len(signals) == 1
    assert not (run / "HALT").exists()


def test_looking_alone_changes_nothing(run: Path, clock: Clock, signals: list) -> None:
    write_beats(run, [beat(gate=COLLAPSED_GATE)])
    before = sorted(run.iterdir())
    for _ in range(2):
        assert names(Watch(run, Thresholds(stacks_after_s=0, halt_after_s=0), **clock.both).look()) == [("gates", 0)]
    assert sorted(run.iterdir()) == before
    assert signals == []


def test_a_run_that_has_ended_is_judged_and_not_acted_upon(run: Path, clock: Clock, signals: list) -> None:
    write_beats(run, [beat(phase="ended", unix_time_s=NOW_S - 9999, loss=math.nan)])
    set_status(run, "finished")
    watch = Watch(run, Thresholds(stacks_after_s=0, halt_after_s=0), **clock.both)
    look = watch.look()
    assert names(look) == [("nonfinite", 0)]
    assert watch.act(look) == []
    assert watch.gave_up(look) is None


def test_a_rank_that_never_beats_and_a_run_that_never_beats_are_found_after_a_while(run: Path, clock: Clock) -> None:
    watch = Watch(run, Thresholds(), **clock.both)
    assert watch.look().findings == []
    clock.now_s = NOW_S + 61
    assert names(watch.look()) == [("silent", 0)]
    write_beats(run, of_rank(1, [beat(process_start_s=NOW_S, unix_time_s=NOW_S + 62)]))
    (finding,) = [f for f in Watch(run, Thresholds(), **clock.both).look().findings if f.rank == 0]
    assert "no beat 62 s after the start" in finding.message


def test_of_many_missing_ranks_some_are_named(run: Path, clock: Clock) -> None:
    write_beats(run, of_rank(0, [beat(process_start_s=NOW_S, unix_time_s=NOW_S + 62)], world_size=100_000))
    found = Watch(run, Thresholds(), **clock.both).look().findings
    assert [(finding.name, finding.rank) for finding in found] == [("silent", rank) for rank in range(1, 9)]
    assert "nor of 99991 ranks more" in found[0].message


def test_what_an_earlier_process_left_is_not_taken_for_a_silent_rank(run: Path, clock: Clock) -> None:
    write_beats(run, of_rank(1, [beat(unix_time_s=NOW_S - 5000, process_start_s=NOW_S - 6000)]))
    write_beats(run, of_rank(0, [beat(process_start_s=NOW_S - 10)], world_size=1))
    look = Watch(run, Thresholds(), **clock.both).look()
    assert sorted(look.beats) == [0]
    assert look.findings == []


def test_processes_that_ended_without_a_word_are_found(run: Path, clock: Clock) -> None:
    write_beats(run, [beat(phase="ended")])
    watch = Watch(run, Thresholds(), **clock.both)
    assert watch.look().findings == []
    clock.now_s = NOW_S + 100
    assert names(watch.look()) == [("run", 0)]


def test_a_killed_process_is_told_as_gone_and_ends_the_watch(run: Path, clock: Clock, signals: list) -> None:
    process = subprocess.Popen([sys.executable, "-c", "pass"])
    start_s = psutil.Process(process.pid).create_time()
    process.wait()
    write_beats(run, [beat(pid=process.pid, process_start_s=start_s)])
    clock.now_s = NOW_S + 100
    watch = Watch(run, Thresholds(stacks_after_s=0), **clock.both)
    look = watch.look()
    assert f"Process {process.pid} on" in look.findings[0].remedy
    assert "is gone: killed" in look.findings[0].remedy
    assert watch.act(look)[-1].endswith(f"process {process.pid} is gone")
    assert signals == []
    assert "all processes of the run are gone" in (watch.gave_up(look) or "")


def test_only_the_process_that_holds_the_heartbeat_is_signalled(run: Path, signals: list, tmp_path_factory) -> None:
    mine = beat()
    write_beats(run, [mine])
    assert process_of(run, mine) == "alive"
    elsewhere = tmp_path_factory.mktemp("elsewhere")
    write_beats(elsewhere, [mine])  # a stranger's run that names this process
    with (elsewhere / "heartbeat_rank0.jsonl").open():  # whoever only reads it is not the run either
        assert process_of(elsewhere, mine) == "gone"
        assert ask_for_stacks(elsewhere, mine).endswith("is gone")
    assert process_of(run, replace(mine, pid=os.getppid())) == "gone"
    for changes in ({"host": "another-machine"}, {"machine": "another boot"}):
        there = replace(mine, **changes)
        assert process_of(run, there) == "unknown"
        assert f"ask on {there.host} with `kill -USR1 {os.getpid()}`" in ask_for_stacks(run, there)
    ask_for_stacks(run, replace(mine, phase="ended"))
    assert signals == []
    ask_for_stacks(run, mine)
    assert signals == [(os.getpid(), signal.SIGUSR1)]


@pytest.mark.parametrize("ahead_s", [90.0, -90.0])
def test_a_watch_whose_clock_is_wrong_leaves_a_healthy_run_alone(
    run: Path, clock: Clock, signals: list, ahead_s: float
) -> None:
    watch = Watch(
        run,
        Thresholds(stacks_after_s=2, halt_after_s=4),
        clock=lambda: clock.now_s + ahead_s,
        monotonic=clock,
    )
    did = []
    for second in range(0, 200, 5):
        clock.now_s = NOW_S + second
        write_beats(run, [beat(unix_time_s=clock.now_s)])
        did += watch.act(watch.look())
    side = "behind" if ahead_s > 0 else "ahead of"
    assert did == [f"note: the clock of {beat().host} is 90 s {side} this machine's; that is no harm"]
    assert signals == []
    clock.now_s += 61
    assert names(watch.look()) == [("silent", 0)]


def look_once(run: Path, clock: Clock, ahead_s: float, *, beats_go_on: bool) -> Look:
    """A single look by a clock that is ahead, at a run that beats every 5 s or not at all."""
    watch = Watch(run, Thresholds(), clock=lambda: clock.now_s + ahead_s, monotonic=clock)

    def sleep(seconds: float) -> None:
        clock.now_s += seconds
        if beats_go_on and clock.now_s % 5 == 0:
            write_beats(run, [beat(unix_time_s=clock.now_s)])

    return watch.look_once(sleep)


def test_a_single_look_waits_for_a_beat_before_it_calls_a_run_silent(run: Path, clock: Clock) -> None:
    write_beats(run, [beat(every_s=5.0)])
    os.utime(run / "heartbeat_rank0.jsonl", (NOW_S, NOW_S))
    assert look_once(run, clock, 0, beats_go_on=False).monotonic_s == NOW_S  # no doubt, no wait
    for ahead_s in (90.0, -90.0):
        assert look_once(run, clock, ahead_s, beats_go_on=True).findings == []
    began_s = clock.now_s
    look = look_once(run, clock, 300.0, beats_go_on=False)
    assert names(look) == [("silent", 0)]
    assert "no beat for 3" in look.findings[0].message
    assert look.monotonic_s - began_s == 16.0  # three beats have not come


def test_a_single_look_at_a_run_without_a_beat_waits_before_it_calls_it_silent(run: Path, clock: Clock) -> None:
    assert names(look_once(run, clock, 100.0, beats_go_on=False)) == [("silent", 0)]
    set_status(run, "finished")
    assert names(look_once(run, clock, 100.0, beats_go_on=False)) == []


def test_an_endless_heartbeat_is_read_from_its_end(run: Path, clock: Clock, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(watch_module, "MAX_BEATS", 300)
    write_beats(run, beats(2000))
    parsed = []
    validate = SCHEMA.validate_json
    monkeypatch.setattr(SCHEMA, "validate_json", lambda line: parsed.append(line) or validate(line))
    look = Watch(run, Thresholds(), **clock.both).look()
    assert look.beats[0].step == 2009
    assert len(parsed) == 200  # two files share what is kept, each with no less than its least


def test_a_process_that_ends_before_it_is_asked_does_not_end_the_watch(
    run: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def gone(pid: int, number: int) -> None:
        raise ProcessLookupError(3, "No such process")

    monkeypatch.setattr(os, "kill", gone)
    write_beats(run, [beat()])
    assert ask_for_stacks(run, beat()).endswith("cannot be asked: No such process")


def test_a_halt_that_cannot_be_written_is_told_and_the_watch_goes_on(
    run: Path, clock: Clock, signals: list, monkeypatch: pytest.MonkeyPatch
) -> None:
    def refuse(path: Path, reason: str) -> None:
        raise PermissionError(13, "Permission denied", str(path))

    monkeypatch.setattr(watch_module, "ask_to_halt", refuse)
    write_beats(run, [beat(loss=math.nan)])
    watch = Watch(run, Thresholds(stacks_after_s=0, halt_after_s=0), **clock.both)
    for _ in range(2):
        assert "HALT cannot be written (Permission denied)" in watch.act(watch.look())[-1]


def test_what_is_no_run_folder_is_refused(tmp_path: Path) -> None:
    for path, words in ((tmp_path, "is no run folder: it holds no status"), (tmp_path / "absent", "there is no")):
        with pytest.raises(ValueError, match=words):
            Watch(path, Thresholds()).look()
    set_status(tmp_path, "running", unix_time_s=time.time())
    (tmp_path / "heartbeat_rank0.jsonl").write_text("{}\n")
    with pytest.raises(ValueError, match=r"heartbeat_rank0\.jsonl, line 1: unix_time_s: Field required"):
        Watch(tmp_path, Thresholds()).look()
