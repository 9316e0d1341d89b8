"""The tables of a run, `training.csv`, `val.csv` and `health.csv`: their columns, one writer, one reader.

with CsvWriter(folder / "training.csv", TRAINING_COLUMNS) as writer:
    writer.write(step=1, tokens=4096, loss=5.5, ...)
rows = read_csv(folder / "training.csv", TRAINING_COLUMNS)
losses = column(rows, "loss")
"""

from __future__ import annotations

import csv
import math
import os
import sys
from collections.abc import Sequence
from pathlib import Path
from types import TracebackType

from nsa.train.run_files import append, open_to_append
from nsa.train.run_folder import write_text

TRAINING_COLUMNS = ("step", "tokens", "loss", "lr", "grad_norm", "tokens_per_s", "mfu", "step_s", "fetch_s")
"""Optimizer step, tokens so far, mean loss in nats per token, learning rate, gradient norm before clipping, tokens per
second, model FLOP utilisation (empty where it is not known), seconds of the step and of waiting for data in it."""

VALIDATION_COLUMNS = ("step", "val_loss", "val_ppl", "val_bits_per_byte")
"""Optimizer step, held-out loss in nats per token, its exponential, and bits per byte of text."""

HEALTH_COLUMNS = (
    *("step", "layer", "gate_entropy_mean_nats", "gate_max_mean", "gate_share_cmp", "gate_share_slc", "gate_share_win"),
    *("gate_collapse_share", "mean_selected_tokens", "max_selected_tokens", "share_at_maximum", "mean_coverage"),
    *("blocks_chosen_share", "mean_distance_blocks"),
)
"""Optimizer step and decoder layer; the fields of `GateStatistics` and `SelectionStatistics` (`nsa.inspect`)."""

NEWLINE = b"\n"
INTEGER_COLUMNS = frozenset({"step", "tokens", "layer", "max_selected_tokens"})

Row = dict[str, float | int | None]


class CsvWriter:
    """Writes one table; each row is on disk when `write` returns, so that an interrupted run keeps its rows.

    Rows for which the disk has no room wait, and are written with a later one.

    Args:
        path: the file; replaced, unless `resume_step` is given.
        columns: names of the columns.
        resume_step: continue the table that is there: rows up to this step stay as they are, later ones go.

    Raises:
        ValueError: the table to continue cannot be read, or is a link; it is left as it is.
    """

    def __init__(self, path: Path, columns: Sequence[str], *, resume_step: int | None = None) -> None:
        self.columns = tuple(columns)
        continued = path.is_file() and resume_step is not None
        if path.is_file() and resume_step is not None:
            _cut(path, self.columns, resume_step)
        self.path, self._waiting = path, b""
        self._file = open_to_append(path, 0 if continued else os.O_TRUNC)
        if not continued:
            self._write_line(self.columns)

    def write(self, **values: float | None) -> None:
        """Append one row; None leaves a cell empty. Every column must be given and nothing else."""
        if set(values) != set(self.columns):
            raise ValueError(f"a row needs exactly the columns {', '.join(self.columns)}, not {', '.join(values)}")
        self._write_line(["" if values[name] is None else repr(values[name]) for name in self.columns])

    def close(self) -> None:
        """Close the file; rows for which there still is no room are lost, and this is said."""
        if self._waiting and (reason := append(self._file, self._waiting)):
            print(f"{self.path}: {self._waiting.count(NEWLINE)} rows are lost: {reason}", file=sys.stderr)
        os.close(self._file)

    def __enter__(self) -> CsvWriter:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.close()

    def _write_line(self, cells: Sequence[str]) -> None:
        first_to_wait = not self._waiting
        self._waiting += (",".join(map(str, cells)) + "\n").encode()
        reason = append(self._file, self._waiting)
        if reason is None:
            self._waiting = b""
        elif first_to_wait:
            print(f"{self.path}: a row cannot be written: {reason}; the next ones wait too", file=sys.stderr)


def read_csv(path: Path, columns: Sequence[str]) -> list[Row]:
    """The rows of a table that `CsvWriter` wrote; an empty cell is None.

    A last line without its newline is one that an interrupted writer left behind, and is not counted.

    Raises:
        ValueError: the file is missing, its header is not `columns`, or a cell is no number; file and line are named.
    """
    if not path.is_file():
        raise ValueError(f"{path} is missing; is this a run folder?")
    return [row for _, row in _read_lines(path, columns)]


def rows_until(path: Path, columns: Sequence[str], last_step: int) -> str:
    """The text of a table with the rows up to a step; raises `ValueError` as `read_csv` does."""
    kept = [line for line, row in _read_lines(path, columns) if (row["step"] or 0) <= last_step]
    return "".join(f"{line}\n" for line in [",".join(columns), *kept])


def column(rows: Sequence[Row], name: str) -> list[float]:
    """One column of a table; an empty cell is NaN."""
    return [math.nan if (value := row[name]) is None else value for row in rows]


def _read_lines(path: Path, columns: Sequence[str]) -> list[tuple[str, Row]]:
    """Each whole line after the header, as text and as a row."""
    try:
        text = path.read_text(encoding="utf-8")
    except UnicodeDecodeError as error:
        raise ValueError(f"{path} is no table: {error}") from None
    lines = text[: text.rfind("\n") + 1].splitlines()
    try:
        cells = list(csv.reader(lines))
    except csv.Error as error:
        raise ValueError(f"{path} is no table: {error}") from None
    if not cells or tuple(cells[0]) != tuple(columns):
        raise ValueError(f"{path} must begin with the header {','.join(columns)}")
    rows = [_parse(row, columns, f"{path}, line {number}") for number, row in enumerate(cells[1:], start=2)]
    return list(zip(lines[1:], rows, strict=True))


def _cut(path: Path, columns: Sequence[str], last_step: int) -> None:
    """Take the rows after `last_step` out of a table, and a last line without its newline."""
    write_text(path, rows_until(path, columns, last_step))


def _parse(cells: Sequence[str], columns: Sequence[str], where: str) -> Row:
    if len(cells) != len(columns):
        raise ValueError(f"{where} has {len(cells)} cells, not {len(columns)}")
    row: Row = {}
    for name, cell in zip(columns, cells, strict=True):
        kind = int if name in INTEGER_COLUMNS else float
        try:
            row[name] = kind(cell) if cell else None
        except ValueError:
            raise ValueError(f"{where}: {name} is {cell!r}, not a number") from None
    return row
