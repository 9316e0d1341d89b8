"""Heartbeats: what is written is what is read; they go on while the main thread hangs; a half line harms nothing."""

from __future__ import annotations

import json
import math
import os
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path

import psutil
import pytest

import nsa
from nsa.inspect.statistics import GateStatistics, SelectionStatistics
from nsa.runs.heartbeat import HeartbeatReader, heartbeat_files, heartbeat_path, read_heartbeats
from nsa.train.telemetry.heartbeat_writer import Heartbeat

GATE = GateStatistics(10, 1.0, 0.4, 0.3, 0.3, 0.4, 0.0)
SELECTION = SelectionStatistics(10, 30.0, 48, 0.5, 0.9, 1.0, 1.5, {"0": 5, "1": 5})


def heartbeat(path: Path, **changes) -> Heartbeat:
    return Heartbeat(path, **{"rank": 0, "world_size": 2, "num_steps": 9, "every_s": 60.0, **changes})


def wait_for(condition: Callable[[], object], what: str) -> None:
    deadline = time.monotonic() + 60
    while not condition():
        assert time.monotonic() < deadline, what
        time.sleep(0.05)


def test_a_beat_comes_back_as_it_was_reported(tmp_path: Path) -> None:
    path = heartbeat_path(tmp_path, 1)
    with heartbeat(path, rank=1) as beating:
        beating.update(step=3, loss=2.5, grad_norm=1.0, lr=1e-3, tokens_per_s=1e5, mfu=0.3, step_s=0.5)
        beating.update(phase="evaluate", waits_s=[0.001 * k for k in range(21)])
        beating.update(gate=GATE, selection=SELECTION, worst_gate_layer=2, worst_gate=GATE)
        beating.count("skipped_steps", 2)
    first, last = read_heartbeats(path)
    assert (first.phase, first.step, first.loss, first.counters) == ("startup", 0, None, {})
    assert (last.phase, last.rank, last.world_size, last.step, last.num_steps) == ("ended", 1, 2, 3, 9)
    assert (last.loss, last.grad_norm, last.lr, last.tokens_per_s, last.mfu, last.step_s) == (
        *(2.5, 1.0, 1e-3, 1e5),
        *(0.3, 0.5),
    )
    assert (last.fetch_p50_ms, last.fetch_p95_ms) == pytest.approx((10.0, 19.0))
    assert (last.gate, last.selection, last.worst_gate_layer, last.worst_gate) == (GATE, SELECTION, 2, GATE)
    assert last.counters == {"skipped_steps": 2}
    assert (last.pid, last.process_start_s) == (os.getpid(), psutil.Process().create_time())
    assert abs(last.unix_time_s - time.time()) < 60
    assert last.host_rss_gib == pytest.approx(psutil.Process().memory_info().rss / 2**30, rel=0.5)
    assert heartbeat_files(tmp_path) == {1: path}


def test_every_line_is_plain_json_also_when_values_are_not_finite(tmp_path: Path) -> None:
    path = tmp_path / "beats.jsonl"
    with heartbeat(path) as beating:
        beating.update(loss=math.nan, grad_norm=-math.inf)

    def refuse(constant: str) -> None:
        raise AssertionError(f"{constant} is no JSON")

    for line in path.read_text().splitlines():
        json.loads(line, parse_constant=refuse)
    last = read_heartbeats(path)[-1]
    assert last.loss is not None
    assert math.isnan(last.loss)
    assert last.grad_norm == -math.inf


def test_beats_go_on_by_themselves_and_tell_how_long_ago_progress_was(tmp_path: Path) -> None:
    path = tmp_path / "beats.jsonl"
    with heartbeat(path, every_s=0.05) as beating:
        beating.update(phase="step", step=4)
        wait_for(lambda: read_heartbeats(path)[-1].progress_age_s > 0.3, "beats go on")
        assert read_heartbeats(path)[-1].phase == "step"
        beating.count("loader_restarts", 1)
        wait_for(lambda: read_heartbeats(path)[-1].counters, "counters come with the next beat")
        assert read_heartbeats(path)[-1].progress_age_s > 0.3
        beating.update(step=5)
        wait_for(lambda: read_heartbeats(path)[-1].step == 5, "the next step comes")
        ages = [beat.progress_age_s for beat in read_heartbeats(path) if beat.step == 5]
        assert ages[0] < 0.3


def test_what_a_beat_does_not_know_is_refused(tmp_path: Path) -> None:
    with heartbeat(tmp_path / "beats.jsonl") as beating, pytest.raises(TypeError, match="no lossy to report"):
        beating.update(lossy=1.0)


def test_a_half_line_is_not_read_and_the_next_process_removes_it(tmp_path: Path) -> None:
    path = tmp_path / "beats.jsonl"
    with heartbeat(path):
        pass
    with path.open("a") as file:
        file.write('{"unix_time_s": 17')
    assert len(read_heartbeats(path)) == 2
    with heartbeat(path):
        pass
    assert len(read_heartbeats(path)) == 4


def test_a_reader_goes_on_where_it_was_and_names_a_line_that_is_no_beat(tmp_path: Path) -> None:
    path = tmp_path / "beats.jsonl"
    reader = HeartbeatReader(path)
    assert reader.read() == []
    with heartbeat(path):
        assert [beat.phase for beat in reader.read()] == ["startup"]
    assert [beat.phase for beat in reader.read()] == ["ended"]
    assert reader.read() == []
    with path.open("a") as file:
        file.write('{"rank": "one"}\n')
    with pytest.raises(ValueError, match=r"beats\.jsonl, line 3: unix_time_s: Field required"):
        reader.read()
    with pytest.raises(ValueError, match=r"nothing\.jsonl is missing"):
        read_heartbeats(tmp_path / "nothing.jsonl")


def test_a_full_disk_costs_beats_and_not_the_run(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capfd: pytest.CaptureFixture[str]
) -> None:
    path, write = tmp_path / "beats.jsonl", os.write
    with heartbeat(path) as beating:
        with monkeypatch.context() as patched:
            patched.setattr(os, "write", lambda file, line: write(file, line[:10]))
            beating.beat()
            beating.beat()
        beating.update(step=7)
    assert [beat.step for beat in read_heartbeats(path)] == [0, 7]
    assert read_heartbeats(path)[-1].counters == {"lost_beats": 2}
    assert capfd.readouterr().err.count("a beat could not be written: the disk is full") == 1


HANGING = """
import ctypes, sys
from pathlib import Path
from nsa.train.telemetry.heartbeat_writer import Heartbeat
from nsa.train.telemetry.stacks import stacks_on_signal

def hang_in_c(library):
    mutex = ctypes.create_string_buffer(64)  # zeros: an open lock; the second call waits for ever, signal or not
    library.pthread_mutex_lock(mutex)
    library.pthread_mutex_lock(mutex)

run = Path(sys.argv[1])
with stacks_on_signal(run / "stacks.txt"):
    with Heartbeat(run / "beats.jsonl", rank=0, world_size=1, num_steps=9, every_s=0.05) as heartbeat:
        heartbeat.update(phase="step", step=2)
        hang_in_c(getattr(ctypes, sys.argv[2])(None))
"""


@contextmanager
def hanging(folder: Path, library: str) -> Iterator[subprocess.Popen[bytes]]:
    """A process that hangs in C; `ctypes.CDLL` lets go of the interpreter's lock, `ctypes.PyDLL` holds it."""
    source = str(Path(nsa.__file__).parents[1])
    command = [sys.executable, "-c", HANGING, str(folder), library]
    with subprocess.Popen(command, env={"PYTHONPATH": source, "OMP_NUM_THREADS": "1"}) as process:
        try:
            wait_for(lambda: (folder / "beats.jsonl").is_file() and read_heartbeats(folder / "beats.jsonl"), "a beat")
            yield process
        finally:
            process.kill()


def stacks(folder: Path) -> str:
    path = folder / "stacks.txt"
    return path.read_text() if path.is_file() else ""


def test_a_process_that_hangs_in_c_beats_and_dumps_the_stacks_of_all_threads_again_and_again(tmp_path: Path) -> None:
    with hanging(tmp_path, "CDLL") as process:
        wait_for(lambda: read_heartbeats(tmp_path / "beats.jsonl")[-1].progress_age_s > 0.5, "beats of a hung process")
        assert read_heartbeats(tmp_path / "beats.jsonl")[-1].step == 2
        for times in (1, 2):
            process.send_signal(signal.SIGUSR1)
            wait_for(lambda times=times: stacks(tmp_path).count("in hang_in_c") == times, "stacks")
        assert "in _beat_on" in stacks(tmp_path)
        assert process.poll() is None


def test_a_process_that_hangs_in_c_with_the_interpreter_locked_falls_silent_but_dumps_its_stacks(
    tmp_path: Path,
) -> None:
    with hanging(tmp_path, "PyDLL") as process:
        wait_for(lambda: "in hang_in_c" in stacks(tmp_path) or process.send_signal(signal.SIGUSR1), "stacks")
        count = len(read_heartbeats(tmp_path / "beats.jsonl"))
        time.sleep(0.5)
        assert len(read_heartbeats(tmp_path / "beats.jsonl")) == count
        assert process.poll() is None
