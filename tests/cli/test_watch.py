"""`nsa watch` as a user runs it: exit codes, table, JSON, and an end when the run ends."""

from __future__ import annotations

import json
import math
import threading
import time
from collections.abc import Iterator
from pathlib import Path

import pytest
from rich.console import Console

from made_up_beats import COLLAPSED_GATE, beat, holding, of_rank, write_beats
from nsa.cli import main
from nsa.train.observe.thresholds import Thresholds
from nsa.train.observe.watch import Watch
from nsa.train.observe.watch_view import as_table
from nsa.train.run_folder import RunFolder


@pytest.fixture
def run(tmp_path: Path) -> Iterator[Path]:
    RunFolder(tmp_path).write_status("running", step=50)
    with holding(tmp_path, 0, 1):
        yield tmp_path


def now(**changes):
    return beat(unix_time_s=time.time(), **changes)


def watch_once(run: Path, *options: str) -> int:
    return main(["watch", str(run), "--once", *options])


def test_exit_codes_tell_healthy_alarm_failed_stopped_and_bad_input(run: Path, capsys: pytest.CaptureFixture) -> None:
    write_beats(run, [now(counters={"skipped_steps": 1})])
    assert watch_once(run) == 0
    RunFolder(run).write_status("stopped", step=50, reason="SIGTERM")
    assert watch_once(run) == 3
    RunFolder(run).write_status("failed", step=50, reason="TrainingError: step 51 has loss nan", rank=0)
    assert watch_once(run) == 1
    assert "failed by rank 0: TrainingError: step 51 has loss nan" in capsys.readouterr().out
    RunFolder(run).begin_again(step=50, resumed_from={})
    write_beats(run, [now(gate=COLLAPSED_GATE)])
    assert watch_once(run, "--thresholds.halt_after_s", "0") == 1
    assert not (run / "HALT").exists()
    assert watch_once(run, "--thresholds.gate_max_mean", "1", "--thresholds.gate_entropy_mean_nats", "0",
                      "--thresholds.gate_collapse_share", "1") == 0  # fmt: skip
    assert main(["watch", str(run / "absent"), "--once"]) == 2
    assert main(["watch", str(run), "--interval_s", "0"]) == 2
    assert "absent; give the folder of a run" in capsys.readouterr().err


def test_the_table_has_a_row_for_each_rank_and_the_findings_with_remedies(
    run: Path, capsys: pytest.CaptureFixture
) -> None:
    write_beats(run, of_rank(0, [now(mfu=0.314, gpu_reserved_gib=70.25, num_steps=1000)]))
    write_beats(run, of_rank(1, [now(phase="fetch", progress_age_s=200.0, step=49)]))
    assert watch_once(run) == 1
    out = capsys.readouterr().out
    for part in ("50/1000", "31.4%", "70.25 GiB", "0.40 ms", "10,000", "1.090", "49/100", "200 s ago", "fetch"):
        assert part in out, part
    flat = " ".join(out.split())
    assert "stall: rank 1, step 49: no progress for 200 s (at most 180): the loader gives no batch. Look at" in flat


def test_a_narrow_terminal_still_shows_findings(run: Path) -> None:
    write_beats(run, [now(loss=math.nan)])
    console = Console(width=60, force_terminal=True, record=True, file=(run / "screen").open("w"))
    console.print(as_table(Watch(run, Thresholds()).look(), ["stacks: asked"], width=60))
    text = console.export_text()
    assert "nonfinite: rank 0, step 50: loss nan" in text
    assert "stacks: asked" in text


def test_json_is_one_plain_object_for_each_look(run: Path, capsys: pytest.CaptureFixture) -> None:
    write_beats(run, [now(loss=math.nan)])
    assert watch_once(run, "--json") == 1

    def refuse(constant: str) -> None:
        raise AssertionError(f"{constant} is no JSON")

    found = json.loads(capsys.readouterr().out, parse_constant=refuse)
    assert (found["healthy"], found["status"]["state"], found["beats"][0]["loss"]) == (False, "running", "NaN")
    assert (found["findings"][0]["name"], found["findings"][0]["rank"], found["findings"][0]["step"]) == (
        *("nonfinite", 0),
        50,
    )


def test_the_watch_ends_with_the_run(run: Path, capsys: pytest.CaptureFixture) -> None:
    write_beats(run, [now()])

    def finish() -> None:
        write_beats(run, [now(phase="ended", step=100)])
        RunFolder(run).write_status("finished", step=100)

    timer = threading.Timer(0.5, finish)
    timer.start()
    assert main(["watch", str(run), "--interval_s", "0.1"]) == 0
    timer.join()
    out = capsys.readouterr().out
    assert "running  step 50/100  step  loss 2.0000  10,000 tokens/s  healthy" in out
    assert "100/100" in out


def test_a_lasting_alarm_is_told_once_and_halts_the_run(run: Path, capsys: pytest.CaptureFixture) -> None:
    write_beats(run, [beat(unix_time_s=time.time(), gate=COLLAPSED_GATE, phase="ended")])

    def obey() -> None:
        while not (run / "HALT").exists():
            time.sleep(0.02)
        RunFolder(run).write_status("stopped", step=50, reason="HALT")

    thread = threading.Thread(target=obey)
    thread.start()
    rungs = ["--thresholds.stacks_after_s", "0.1", "--thresholds.halt_after_s", "0.3"]
    assert main(["watch", str(run), "--interval_s", "0.1", *rungs]) == 3
    thread.join()
    out = capsys.readouterr().out
    assert out.count("alarm: gates") == 1
    assert "halt: wrote" in out
