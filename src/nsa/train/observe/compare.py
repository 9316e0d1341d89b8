"""Several runs side by side: one picture, one table, and the differences of their final held-out losses.

compare_runs([Path("runs/showcase"), Path("runs/showcase_dense")], Path("benchmarks/results/nsa_vs_dense"))
"""

from __future__ import annotations

import csv
import json
from collections.abc import Sequence
from pathlib import Path

from matplotlib.figure import Figure

from nsa.train.observe.csv_log import TRAINING_COLUMNS, VALIDATION_COLUMNS, column, read_csv
from nsa.train.observe.curves import held_out, running_mean
from nsa.train.run_folder import RunFolder

COMPARISON_COLUMNS = ("run", "step", "tokens", "train_loss", "val_loss", "val_bits_per_byte")
"""Run folder, optimizer step, training tokens so far, running mean of the training loss, held-out loss (nats per
token) and bits per byte, at each step that has an evaluation."""


def compare_runs(runs: Sequence[Path], out: Path) -> str:
    """Write `out`.csv and `out`.png and return a Markdown table of the final results.

    Args:
        runs: run folders; differences are against the first.
        out: path of the results without an ending.

    Raises:
        ValueError: fewer than two runs, or a folder without a finished run's tables.
    """
    if len(runs) < 2:
        raise ValueError(f"a comparison needs at least two run folders, not {len(runs)}")
    folders = [RunFolder(Path(run)) for run in runs]
    rows = [row for folder in folders for row in _rows(folder)]
    table = _table(folders)
    out.parent.mkdir(parents=True, exist_ok=True)
    with out.with_suffix(".csv").open("w", newline="", encoding="utf-8") as file:
        writer = csv.writer(file, lineterminator="\n")
        writer.writerow(COMPARISON_COLUMNS)
        writer.writerows(rows)
    _draw(folders, out.with_suffix(".png"))
    return table


def _rows(folder: RunFolder) -> list[tuple[str | float | None, ...]]:
    training = read_csv(folder.training_csv, TRAINING_COLUMNS)
    means = running_mean(column(training, "loss"))
    by_step = {row["step"]: (row["tokens"], f"{mean:.5f}") for row, mean in zip(training, means, strict=True)}
    return [
        (
            folder.path.name,
            row["step"],
            *by_step.get(row["step"], (0, "")),
            f"{row['val_loss']:.5f}",
            f"{row['val_bits_per_byte']:.5f}",
        )
        for row in read_csv(folder.val_csv, VALIDATION_COLUMNS)
    ]


def _table(folders: Sequence[RunFolder]) -> str:
    lines = [
        "| run | parameters | tokens | held-out loss | bits per byte | against the first |",
        "|---|---|---|---|---|---|",
    ]
    first: float | None = None
    for folder in folders:
        if not folder.metrics_json.is_file():
            raise ValueError(f"{folder.metrics_json} is missing; only runs that have ended can be compared")
        metrics = json.loads(folder.metrics_json.read_text(encoding="utf-8"))
        loss = metrics["val_loss"]
        first = loss if first is None else first
        lines.append(
            f"| {folder.path.name} | {metrics['num_parameters']:,} | {metrics['tokens']:,} | {loss:.4f} "
            f"| {metrics['val_bits_per_byte']:.4f} | {loss / first - 1:+.2%} |"
        )
    return "\n".join(lines)


def _draw(folders: Sequence[RunFolder], path: Path) -> None:
    figure = Figure(figsize=(9, 5.5), layout="constrained")
    axes = figure.subplots()
    for index, folder in enumerate(folders):
        training = read_csv(folder.training_csv, TRAINING_COLUMNS)
        smooth = running_mean(column(training, "loss"))
        color = f"C{index}"
        axes.plot(column(training, "step"), smooth, color=color, alpha=0.4, linewidth=1)
        points = held_out(read_csv(folder.val_csv, VALIDATION_COLUMNS))
        axes.plot(*points, color=color, marker="o", label=f"{folder.path.name}, held-out")
    axes.set_xlabel("optimizer step")
    axes.set_ylabel("loss, nats per token (thin: training)")
    axes.grid(alpha=0.3)
    axes.legend()
    figure.savefig(path, dpi=110)
