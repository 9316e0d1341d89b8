"""The log line, and what a recorder continues."""

from __future__ import annotations

import io
import time
from dataclasses import replace
from pathlib import Path

from rich.console import Console
from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

from nsa.runs.folder import RunFolder
from nsa.runs.tables import TRAINING_COLUMNS, VALIDATION_COLUMNS, EvalRecord, StepRecord, column, read_csv
from nsa.train.telemetry.progress import Progress, log_line, percentiles_ms
from nsa.train.telemetry.recorder import Recorder


def test_the_log_line_says_everything_with_its_units() -> None:
    waits = [0.001 * k for k in range(21)]
    record = StepRecord(20, 1, 2.5, lr=3e-3, grad_norm=1.0, tokens_per_s=12345.6, mfu=None, step_s=1.0, fetch_s=0.0)
    line = log_line(record, num_steps=400, waits_s=waits, left_s=65)
    for part in ("20/400", "loss 2.5000", "lr 3.00e-03", "12,346 tokens/s", "mfu n/a", "p50 10.00 ms p95 19.00 ms"):
        assert part in line, line
    assert "mfu 31.5%" in log_line(replace(record, mfu=0.315), num_steps=400, waits_s=[0.001], left_s=1)


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
        "waits_s": (0.0,),
    }
    options = {"num_steps": 9, "log_every_steps": 100}
    with Recorder(folder, **options) as recorder:
        recorder.evaluation(EvalRecord(0, 5.0, 1.0, 1.0))
        for step in range(1, 6):
            recorder.step(StepRecord(step=step, loss=float(step), **values))
        recorder.evaluation(EvalRecord(5, 4.0, 1.0, 1.0))
    time.sleep(1.0)  # TensorBoard orders event files by the second in their names
    with Recorder(folder, **options, start_step=3) as recorder:
        recorder.step(StepRecord(step=4, loss=40.0, **values))
    assert column(read_csv(folder.training_csv, TRAINING_COLUMNS), "loss") == [1.0, 2.0, 3.0, 40.0]
    assert [row["step"] for row in read_csv(folder.val_csv, VALIDATION_COLUMNS)] == [0]
    board = EventAccumulator(str(folder.tensorboard))
    board.Reload()
    assert [(event.step, event.value) for event in board.Scalars("train/loss")] == [(1, 1), (2, 2), (3, 3), (4, 40)]
