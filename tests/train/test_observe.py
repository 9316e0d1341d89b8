"""The log line, the curves' running mean, and the comparison of runs."""

from __future__ import annotations

import csv
import io
import json
import math
import struct
import time
from pathlib import Path

import pytest
from rich.console import Console
from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

from nsa.train.observe.compare import COMPARISON_COLUMNS, compare_runs
from nsa.train.observe.csv_log import HEALTH_COLUMNS, TRAINING_COLUMNS, VALIDATION_COLUMNS, CsvWriter, column, read_csv
from nsa.train.observe.curves import draw_curves, running_mean
from nsa.train.observe.progress import Progress, log_line, percentiles_ms
from nsa.train.observe.recorder import EvalRecord, Recorder, StepRecord
from nsa.train.run_folder import RunFolder

PNG = b"\x89PNG\r\n\x1a\n"


def test_the_log_line_says_everything_with_its_units() -> None:
    waits = [0.001 * k for k in range(21)]
    line = log_line(step=20, num_steps=400, loss=2.5, lr=3e-3, tokens_per_s=12345.6, mfu=None, fetch_s=waits, left_s=65)
    for part in ("20/400", "loss 2.5000", "lr 3.00e-03", "12,346 tokens/s", "mfu n/a", "p50 10.00 ms p95 19.00 ms"):
        assert part in line, line
    other = {"step": 1, "num_steps": 2, "loss": 2.5, "lr": 3e-3, "tokens_per_s": 1.0, "mfu": 0.315, "fetch_s": [0.001]}
    assert "mfu 31.5%" in log_line(**other, left_s=1)


def test_percentiles_of_a_single_wait_are_that_wait() -> None:
    assert percentiles_ms([0.25]) == (250.0, 250.0)


def test_without_a_terminal_progress_is_plain_lines() -> None:
    out = io.StringIO()
    with Progress(2, Console(file=out, soft_wrap=True)) as progress:
        progress.line("step 1/2 [bold] stays as it is")
        progress.advance(loss=1.0, tokens_per_s=2.0)
    assert out.getvalue() == "step 1/2 [bold] stays as it is\n"


def test_on_a_terminal_there_is_a_bar() -> None:
    out = io.StringIO()
    with Progress(2, Console(file=out, force_terminal=True, width=120)) as progress:
        progress.advance(loss=1.25, tokens_per_s=2000.0)
    assert "1/2" in out.getvalue()
    assert "loss 1.250  2,000 tokens/s" in out.getvalue()


def test_the_running_mean_has_no_bias_at_its_start() -> None:
    assert running_mean([3.0, 3.0, 3.0]) == pytest.approx([3.0, 3.0, 3.0])
    means = running_mean([1.0, math.nan, 2.0])
    assert means == pytest.approx([1.0, 1.0, (0.09 * 1 + 0.1 * 2) / 0.19])
    assert math.isnan(running_mean([math.nan])[0])


def write_run(path: Path, losses: list[float]) -> Path:
    """A run folder with one step and one evaluation for each loss after the first evaluation."""
    path.mkdir()
    folder = RunFolder(path)
    with (
        CsvWriter(folder.training_csv, TRAINING_COLUMNS) as training,
        CsvWriter(folder.val_csv, VALIDATION_COLUMNS) as validation,
    ):
        for step, loss in enumerate(losses):
            if step:
                rest = dict.fromkeys(("lr", "grad_norm", "tokens_per_s", "mfu", "step_s", "fetch_s"), 1.0)
                training.write(step=step, tokens=step * 100, loss=loss, **rest)
            validation.write(step=step, val_loss=loss, val_ppl=math.exp(loss), val_bits_per_byte=loss / math.log(2))
    metrics = {
        "val_loss": losses[-1],
        "val_bits_per_byte": losses[-1] / math.log(2),
        "num_parameters": 1000,
        "tokens": 100 * (len(losses) - 1),
    }
    folder.metrics_json.write_text(json.dumps(metrics))
    return path


def test_runs_are_compared_against_the_first(tmp_path: Path) -> None:
    runs = [write_run(tmp_path / "nsa", [5.0, 2.0]), write_run(tmp_path / "dense", [5.0, 2.03])]
    table = compare_runs(runs, tmp_path / "out" / "both")
    assert table.splitlines()[2:] == [
        "| nsa | 1,000 | 100 | 2.0000 | 2.8854 | +0.00% |",
        "| dense | 1,000 | 100 | 2.0300 | 2.9287 | +1.50% |",
    ]
    rows = list(csv.DictReader((tmp_path / "out" / "both.csv").open()))
    assert tuple(rows[0]) == COMPARISON_COLUMNS
    assert [(row["run"], row["step"], row["tokens"], row["val_loss"]) for row in rows] == [
        ("nsa", "0", "0", "5.00000"),
        ("nsa", "1", "100", "2.00000"),
        ("dense", "0", "0", "5.00000"),
        ("dense", "1", "100", "2.03000"),
    ]
    assert (tmp_path / "out" / "both.png").read_bytes().startswith(PNG)


def test_what_cannot_be_compared_is_refused_before_anything_is_written(tmp_path: Path) -> None:
    run = write_run(tmp_path / "nsa", [5.0, 2.0])
    with pytest.raises(ValueError, match="at least two run folders"):
        compare_runs([run], tmp_path / "both")
    with pytest.raises(ValueError, match=r"training\.csv is missing"):
        compare_runs([run, tmp_path / "absent"], tmp_path / "both")
    unfinished = write_run(tmp_path / "unfinished", [5.0, 3.0])
    (unfinished / "metrics.json").unlink()
    with pytest.raises(ValueError, match=r"metrics\.json is missing; only runs that have ended"):
        compare_runs([run, unfinished], tmp_path / "both")
    assert not list(tmp_path.glob("both*"))


def test_curves_are_drawn_from_the_tables_also_of_a_run_without_steps(tmp_path: Path) -> None:
    for name, losses in (("run", [5.0, 2.0, 1.5]), ("untrained", [5.0])):
        folder = RunFolder(write_run(tmp_path / name, losses))
        draw_curves(folder, folder.curves_png)
        assert folder.curves_png.read_bytes().startswith(PNG)


def test_a_recorder_that_resumes_continues_tables_and_tensorboard_after_the_step(tmp_path: Path) -> None:
    folder = RunFolder(tmp_path)
    values = {
        "tokens": 1,
        "lr": 1e-3,
        "grad_norm": 1.0,
        "tokens_per_s": 1.0,
        "mfu": None,
        "step_s": 1.0,
        "fetch_s": 0.0,
    }
    options = {"num_steps": 9, "log_every_steps": 100}
    with Recorder(folder, **options) as recorder:
        recorder.evaluation(EvalRecord(0, 5.0, 1.0, 1.0))
        for step in range(1, 6):
            recorder.step(StepRecord(step=step, loss=float(step), **values), [0.0])
        recorder.evaluation(EvalRecord(5, 4.0, 1.0, 1.0))
    time.sleep(1.0)  # TensorBoard orders event files by the second in their names
    with Recorder(folder, **options, resume_step=3) as recorder:
        recorder.step(StepRecord(step=4, loss=40.0, **values), [0.0])
    assert column(read_csv(folder.training_csv, TRAINING_COLUMNS), "loss") == [1.0, 2.0, 3.0, 40.0]
    assert [row["step"] for row in read_csv(folder.val_csv, VALIDATION_COLUMNS)] == [0]
    board = EventAccumulator(str(folder.tensorboard))
    board.Reload()
    assert [(event.step, event.value) for event in board.Scalars("train/loss")] == [(1, 1), (2, 2), (3, 3), (4, 40)]


def test_gates_are_drawn_below_the_losses_where_they_were_measured(tmp_path: Path) -> None:
    folder = RunFolder(write_run(tmp_path / "run", [5.0, 2.0, 1.5]))
    draw_curves(folder, folder.curves_png)
    without = png_size(folder.curves_png)
    with CsvWriter(folder.health_csv, HEALTH_COLUMNS) as writer:
        for step in (1, 2):
            for layer in (0, 3):
                writer.write(
                    **{**dict.fromkeys(HEALTH_COLUMNS, 0.5), "step": step, "layer": layer, "max_selected_tokens": 9}
                )
    draw_curves(folder, folder.curves_png)
    assert png_size(folder.curves_png)[1] > without[1]


def png_size(path: Path) -> tuple[int, int]:
    """Width and height of a PNG in pixels."""
    return struct.unpack(">II", path.read_bytes()[16:24])
