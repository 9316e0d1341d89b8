"""Recordings of some steps: they hold those steps and no others, and are written also when the run ends early."""

from __future__ import annotations

import gzip
import json
from pathlib import Path

import pytest
import torch
from pydantic import ValidationError

from nsa.config.run import ObserveSection
from nsa.train.telemetry.profiler import StepWindows, check_windows
from nsa.train.trainer import Trainer

CPU = torch.device("cpu")


def run_steps(run: Path, window: tuple[int, int] | None, last: int) -> None:
    """Step k multiplies matrices of k rows."""
    with StepWindows(run, rank=1, device=CPU, profile_steps=window) as windows:
        for step in range(1, last + 1):
            with windows.at(step):
                torch.ones(step, 7) @ torch.ones(7, 5)


def rows_multiplied(trace: Path) -> list[int]:
    events = json.loads(gzip.decompress(trace.read_bytes()))["traceEvents"]
    return [event["args"]["Input Dims"][0][0] for event in events if event.get("name") == "aten::mm"]


def test_a_trace_holds_the_steps_of_its_window(tmp_path: Path) -> None:
    run_steps(tmp_path, (2, 4), last=6)
    assert rows_multiplied(tmp_path / "profile" / "trace_rank1_steps_2_4.json.gz") == [2, 3, 4]
    assert "aten::mm" in (tmp_path / "profile" / "operators_rank1_steps_2_4.txt").read_text()


def test_a_window_that_the_run_does_not_finish_is_written_at_its_end(tmp_path: Path) -> None:
    run_steps(tmp_path, (2, 40), last=3)
    assert rows_multiplied(tmp_path / "profile" / "trace_rank1_steps_2_40.json.gz") == [2, 3]


def test_without_windows_nothing_is_recorded(tmp_path: Path) -> None:
    run_steps(tmp_path, None, last=3)
    run_steps(tmp_path, (9, 10), last=3)
    assert list(tmp_path.iterdir()) == []


def test_windows_that_cannot_be_are_refused(tiny) -> None:
    with pytest.raises(ValidationError, match="first step 5 is after last step 4"):
        ObserveSection(profile_steps=(5, 4))
    with pytest.raises(ValueError, match="records CUDA memory, and the run is on cpu; leave it out"):
        Trainer(tiny(observe={"memory_snapshot_steps": (1, 2)}))
    check_windows((1, 2), torch.device("cuda"))
