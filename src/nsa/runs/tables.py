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
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, fields
from pathlib import Path
from types import TracebackType
from typing import IO

from nsa.inspect.statistics import GateStatistics, SelectionStatistics
from nsa.runs.files import append, open_to_append
from nsa.runs.folder import write_text
from nsa.terminal import printable

FINAL_LOSSES = 20  # training losses whose mean stands for the end of training
ESSENTIAL_COLUMNS = frozenset({"step", "tokens", "layer", "loss", "val_loss"})
"""Without these a table says nothing; others may be missing from one that another version wrote."""

NEWLINE = b"\n"
INTEGER_COLUMNS = frozenset({"step", "tokens", "layer", "max_selected_tokens"})

MAX_LINE, MAX_CELL = 10_000, 40  # characters; no line and no number of a table comes near
MEND_TABLE = "take the damaged lines out, or move the table away"

Row = dict[str, float | int | None]


@dataclass(frozen=True)
class StepRecord:
    """One optimizer step; all fields but the last are the columns of `training.csv`.

    Attributes:
        step: 1 for the first.
        tokens: input tokens of all steps so far.
        loss: mean nats per predicted token of the step.
        lr: learning rate.
        grad_norm: global norm before clipping.
        tokens_per_s: input tokens of the newest `train.log_every_steps` steps / seconds of those steps.
        mfu: model FLOP utilisation of the same steps in 0..1; None where it is not known.
        step_s: seconds of the whole step.
        fetch_s: those of them spent waiting for data.
        waits_s: the single waits that `fetch_s` is the sum of, one for each micro-batch.
    """

    step: int
    tokens: int
    loss: float
    lr: float
    grad_norm: float
    tokens_per_s: float
    mfu: float | None
    step_s: float
    fetch_s: float
    waits_s: tuple[float, ...] = ()


@dataclass(frozen=True)
class EvalRecord:
    """One evaluation on held-out documents; the fields are the columns of `val.csv`.

    Attributes:
        step: optimizer steps done.
        val_loss: nats per token.
        val_ppl: its exponential.
        val_bits_per_byte: of the text.
    """

    step: int
    val_loss: float
    val_ppl: float
    val_bits_per_byte: float


def _names(record: type, *without: str) -> tuple[str, ...]:
    """The fields of a dataclass in order, but for some."""
    return tuple(field.name for field in fields(record) if field.name not in without)


GATE_NUMBERS = _names(GateStatistics, "num_rows")
SELECTION_NUMBERS = _names(SelectionStatistics, "num_rows", "distance_histogram")
TRAINING_COLUMNS = _names(StepRecord, "waits_s")
VALIDATION_COLUMNS = _names(EvalRecord)
HEALTH_COLUMNS = ("step", "layer", *(f"gate_{name}" for name in GATE_NUMBERS), *SELECTION_NUMBERS)
"""Optimizer step and decoder layer; what `GateStatistics` and `SelectionStatistics` say of it."""


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
    """All rows of a table, as `iter_csv` gives them."""
    return list(iter_csv(path, columns))


def iter_csv(path: Path, columns: Sequence[str]) -> Iterator[Row]:
    """The rows of a table that `CsvWriter` wrote, one at a time; an empty cell is None.

    A last line without its newline is one that a writer has only begun, and is not counted. Columns that another
    version of the table lacks are None, those that it has more are left out.

    Raises:
        ValueError: the file is missing, its header lacks an essential column, or a cell is no number; file and line are
            named.
    """
    if not path.is_file():
        raise ValueError(f"{path} is missing; is this a run folder?")
    with path.open(encoding="utf-8", errors="replace", newline="\n") as file:
        whole = _whole_lines(file)
        header = next(whole, "").strip().split(",")
        if missing := [name for name in columns if name in ESSENTIAL_COLUMNS and name not in header]:
            raise ValueError(
                f"{path} begins with {','.join(header)[:100]!r}, which lacks {', '.join(missing)}; this table "
                f"begins with {','.join(columns)}"
            )
        for number, line in enumerate(whole, start=2):
            where = f"{path}, line {number}"
            cells = line.rstrip("\r\n").split(",")
            if len(cells) != len(header):
                raise ValueError(f"{where} has {len(cells)} cells, not {len(header)} as the first line; {MEND_TABLE}")
            found = dict(zip(header, cells, strict=True))
            yield {name: parse_cell(name, found.get(name, ""), where) for name in columns}


def _whole_lines(file: IO[str]) -> Iterator[str]:
    while (line := file.readline(MAX_LINE)).endswith("\n"):
        yield line


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
    return {name: parse_cell(name, cell, where) for name, cell in zip(columns, cells, strict=True)}


def parse_cell(name: str, cell: str, where: str) -> float | int | None:
    """A cell as a number, None if it is empty; `where` names it in the `ValueError` for one that is no number."""
    kind = int if name in INTEGER_COLUMNS else float
    try:
        if len(cell) > MAX_CELL:
            raise ValueError
        return kind(cell) if cell else None
    except ValueError:
        what = "a whole number" if kind is int else "a number"
        raise ValueError(f"{where}: {name} is {printable(cell[:40])!r}, not {what}; {MEND_TABLE}") from None
