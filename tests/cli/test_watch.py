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
from nsa.runs.folder import RunFolder
from nsa.runs.thresholds import Thresholds
from nsa.runs.watch import Watch
from nsa.runs.watch_view import as_table


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


HOSTILE = "\x1b[2J\x1b]0;title\x07[bold red]x[/] \u202egnp.exe"


@pytest.mark.parametrize("options", [[], ["--interval_s", "0.1"]])
def test_nothing_that_a_file_says_acts_in_the_terminal(
    run: Path, options: list[str], capsys: pytest.CaptureFixture
) -> None:
    write_beats(run, [now(host=HOSTILE, counters={HOSTILE: 1}, loss=math.nan, phase="ended")])
    RunFolder(run).write_status("failed", step=50, reason=HOSTILE)
    assert main(["watch", str(run), *options]) == 1
    out = capsys.readouterr().out
    assert not {"\x1b", "\x07", "\u202e"} & set(out)
    assert out.count(r"\x1b[2J") >= 3
    assert "[bold red]x[/]" in out


def test_a_running_line_and_what_the_watch_does_show_escapes_as_text(run: Path, capsys: pytest.CaptureFixture) -> None:
    write_beats(run, [now(host=HOSTILE, gate=COLLAPSED_GATE)])
    soon = ["--thresholds.stacks_after_s", "0", "--thresholds.halt_after_s", "0", "--thresholds.halt_wait_s", "0"]
    assert main(["watch", str(run), "--interval_s", "0.1", *soon]) == 1
    out = capsys.readouterr().out
    assert r"ask on \x1b[2J" in out
    assert "kill its processes" in out
    assert "\x1b" not in out


def all_values(rank: int, **changes):
    values = {
        "mfu": 0.314,
        "gpu_reserved_gib": 70.25,
        "step": 123_456,
        "num_steps": 200_000,
        "tokens_per_s": 1_234_567.0,
    }
    return of_rank(rank, [now(**values, **changes)], world_size=8)


@pytest.mark.parametrize("width", [200, 120, 80, 60, 40])
def test_the_table_is_as_wide_as_the_terminal_and_no_number_is_cut(run: Path, width: int) -> None:
    for rank in range(8):
        write_beats(run, all_values(rank))
    console = Console(width=width, record=True, file=(run / "screen").open("w"))
    console.print(as_table(Watch(run, Thresholds()).look(), width=width))
    text = console.export_text()
    assert "\u2026" not in text
    flat = " ".join(text.split())
    parts = [
        "123456/200000",
        "2.0000",
        "1,234,567",
        "31.4%",
        "70.25 GiB",
        "1.000",
        "0.400 s",
        "0.40 ms",
        "1.00 GiB",
        "1.090",
    ]
    assert all(flat.count(part) >= 8 for part in parts)
    assert max(map(len, text.splitlines())) <= width


def test_a_run_with_more_ranks_than_a_screen_has_lines_shows_the_first(run: Path) -> None:
    for rank in range(70):
        write_beats(run, of_rank(rank, [now()], world_size=70))
    console = Console(width=80, record=True, file=(run / "screen").open("w"))
    console.print(as_table(Watch(run, Thresholds()).look(), width=80))
    text = console.export_text()
    assert "the first 64 of 70 ranks" in text
    assert len(text.splitlines()) < 70
