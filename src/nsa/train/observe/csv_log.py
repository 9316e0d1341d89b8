"""The two tables of a run, `training.csv` and `val.csv`: their columns, one writer, one reader.

with CsvWriter(folder / "training.csv", TRAINING_COLUMNS) as writer:
    writer.write(step=1, tokens=4096, loss=5.5, ...)
rows = read_csv(folder / "training.csv", TRAINING_COLUMNS)
losses = [row["loss"] for row in rows]
"""

from __future__ import annotations

import csv
from collections.abc import Sequence
from pathlib import Path
from types import TracebackType

TRAINING_COLUMNS = ("step", "tokens", "loss", "lr", "grad_norm", "tokens_per_s", "mfu", "step_s", "fetch_s")
"""Optimizer step, tokens so far, mean loss in nats per token, learning rate, gradient norm before clipping, tokens per
second, model FLOP utilisation (empty where it is not known), seconds of the step and of waiting for data in it."""

VALIDATION_COLUMNS = ("step", "val_loss", "val_ppl", "val_bits_per_byte")
"""Optimizer step, held-out loss in nats per token, its exponential, and bits per byte of text."""

INTEGER_COLUMNS = frozenset({"step", "tokens"})

Row = dict[str, float | int | None]


class CsvWriter:
    """Writes one table; each row is on disk when `write` returns, so that an interrupted run keeps its rows."""

    def __init__(self, path: Path, columns: Sequence[str]) -> None:
        self.columns = tuple(columns)
        self._file = path.open("w", newline="", encoding="utf-8")
        self._writer = csv.writer(self._file, lineterminator="\n")
        self._write_line(self.columns)

    def write(self, **values: float | None) -> None:
        """Append one row; None leaves a cell empty. Every column must be given and nothing else."""
        if set(values) != set(self.columns):
            raise ValueError(f"a row needs exactly the columns {', '.join(self.columns)}, not {', '.join(values)}")
        self._write_line(["" if values[name] is None else repr(values[name]) for name in self.columns])

    def close(self) -> None:
        """Close the file."""
        self._file.close()

    def __enter__(self) -> CsvWriter:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.close()

    def _write_line(self, cells: Sequence[str]) -> None:
        self._writer.writerow(cells)
        self._file.flush()


def read_csv(path: Path, columns: Sequence[str]) -> list[Row]:
    """The rows of a table that `CsvWriter` wrote; an empty cell is None.

    A last line without its newline is one that an interrupted writer left behind, and is not counted.

    Raises:
        ValueError: the file is missing, its header is not `columns`, or a cell is no number; file and line are named.
    """
    if not path.is_file():
        raise ValueError(f"{path} is missing; is this a run folder?")
    text = path.read_text(encoding="utf-8")
    lines = list(csv.reader(text[: text.rfind("\n") + 1].splitlines()))
    if not lines or tuple(lines[0]) != tuple(columns):
        raise ValueError(f"{path} must begin with the header {','.join(columns)}")
    return [_parse(cells, columns, f"{path}, line {number}") for number, cells in enumerate(lines[1:], start=2)]


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
