"""The one benchmark protocol: warm up, take turns, report medians, and write what was measured with where it was.

    rows = [...]                                  # frozen dataclasses, their fields are the columns
    write_results(rows, Path("prefill_cpu.csv"), settings, command, device)
    print_table(rows, "Prefill")

Candidates that are compared run in alternation, so that a busy machine slows all alike. Beside each CSV stands a JSON
file of the same name with the command, the settings, the device and the versions.
"""

from __future__ import annotations

import csv
import dataclasses
import json
import statistics
import time
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

import torch
from rich.console import Console
from rich.table import Table

from nsa.machine import environment

Steps = Mapping[str, Callable[[], object]]


def timed_s(run: Callable[[], object], device: torch.device, ahead: bool = False) -> float:
    """Seconds that `run` takes on its device: CUDA events there, the wall clock elsewhere.

    Args:
        ahead: give a CUDA device some 2 ms of other work first, which also empties its cache. Meanwhile the host issues
            `run`, as it does in a training step, so that the kernels count and not their launches.
    """
    if device.type == "cuda":
        start, end = torch.cuda.Event(enable_timing=True), torch.cuda.Event(enable_timing=True)
        stream = torch.cuda.current_stream(device)
        torch.cuda.synchronize(device)
        if ahead:
            filler = torch.empty(2**28, dtype=torch.uint8, device=device)
            for _ in range(32):
                filler.zero_()
            del filler
        start.record(stream)
        run()
        end.record(stream)
        end.synchronize()
        return start.elapsed_time(end) / 1000
    begin = time.perf_counter()
    run()
    return time.perf_counter() - begin


def median_ms(
    candidates: Mapping[str, Steps], device: torch.device, warmup: int, repeats: int, ahead: bool = False
) -> dict[str, float]:
    """Median milliseconds of every step, and of each candidate's steps together.

    Args:
        candidates: name -> steps that belong together and run in order, for example a forward and its backward. In
            each round every candidate runs once.
        warmup, repeats: rounds that do not count, and rounds that do.
        ahead: as in `timed_s`; there each candidate also runs once before it is timed, in every round. A GPU at its
            power limit lowers its clocks for a while after heavy work: so it does for the candidate's own only.

    Returns:
        `{"candidate_step": ms, ..., "candidate_total": ms}`.

    Raises:
        ValueError: fewer than one repeat, or a negative warm-up.
    """
    if repeats < 1 or warmup < 0:
        raise ValueError(f"repeats must be at least 1 and warmup at least 0, not {repeats} and {warmup}")
    seconds: dict[str, list[float]] = {}
    for _ in range(warmup + repeats):
        for name, steps in candidates.items():
            if ahead and device.type == "cuda":
                for run in steps.values():
                    run()
            taken = {step: timed_s(run, device, ahead) for step, run in steps.items()}
            for step, value in (*taken.items(), ("total", sum(taken.values()))):
                seconds.setdefault(f"{name}_{step}", []).append(value)
    return {name: 1000 * statistics.median(values[warmup:]) for name, values in seconds.items()}


def write_results(rows: Sequence[Any], path: Path, settings: Any, command: str, device: torch.device) -> None:
    """Write `rows` as CSV to `path` and the command, settings and environment as JSON beside it.

    Args:
        rows: instances of one dataclass; floats are written with four digits.
        settings: the benchmark's settings, a dataclass.
        command: what produced the rows, as typed.
    """
    path.parent.mkdir(parents=True, exist_ok=True)
    records = [dataclasses.asdict(row) for row in rows]
    with path.open("w", newline="", encoding="utf-8") as file:
        writer = csv.writer(file, lineterminator="\n")
        writer.writerow(records[0])
        writer.writerows([_cell(value) for value in record.values()] for record in records)
    facts = {"command": command, "settings": dataclasses.asdict(settings), "environment": environment(device)}
    path.with_suffix(".json").write_text(json.dumps(facts, indent=2) + "\n", encoding="utf-8")


def print_table(rows: Sequence[Any], title: str, console: Console | None = None) -> None:
    """Print `rows`, instances of one dataclass, as a table with the fields as columns or, if many, as lines."""
    records = [dataclasses.asdict(row) for row in rows]
    names = list(records[0])
    # More columns than fit a terminal: one line a field and one column a row.
    lines = [[name, *(_cell(record[name]) for record in records)] for name in names]
    if len(names) <= 9:
        lines = [list(column) for column in zip(*lines, strict=True)]
    table = Table(title=title)
    for heading in lines[0]:
        table.add_column(heading, justify="right", overflow="fold")
    for line in lines[1:]:
        table.add_row(*line)
    (console or Console()).print(table)


def _cell(value: Any) -> str:
    return f"{value:.4g}" if isinstance(value, float) else str(value)
