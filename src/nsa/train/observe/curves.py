"""Pictures of a run's losses, drawn from its tables alone.

draw_curves(RunFolder(Path("runs/showcase")), Path("curves.png"))
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from pathlib import Path

from matplotlib.figure import Figure

from nsa.train.observe.csv_log import TRAINING_COLUMNS, VALIDATION_COLUMNS, Row, read_csv
from nsa.train.run_folder import RunFolder

SMOOTHING = 0.9  # weight of the past in the drawn running mean of the training loss


def draw_curves(folder: RunFolder, path: Path) -> None:
    """Training and held-out loss over steps, learning rate and gradient norm below; writes a PNG."""
    training = read_csv(folder.training_csv, TRAINING_COLUMNS)
    validation = read_csv(folder.val_csv, VALIDATION_COLUMNS)
    figure = Figure(figsize=(9, 7), layout="constrained")
    losses, rates = figure.subplots(2, 1, sharex=True, height_ratios=[3, 1])
    steps, loss = column(training, "step"), column(training, "loss")
    losses.plot(steps, loss, color="tab:blue", alpha=0.25, linewidth=1)
    losses.plot(steps, running_mean(loss), color="tab:blue", label="training")
    losses.plot(*held_out(validation), color="tab:orange", marker="o", label="held-out documents")
    losses.set_ylabel("loss, nats per token")
    losses.set_title(folder.path.name)
    losses.grid(alpha=0.3)
    losses.legend()
    rates.plot(steps, column(training, "lr"), color="tab:green")
    rates.set_ylabel("learning rate", color="tab:green")
    rates.set_xlabel("optimizer step")
    norms = rates.twinx()
    norms.plot(steps, column(training, "grad_norm"), color="tab:gray", alpha=0.6, linewidth=1)
    norms.set_ylabel("gradient norm", color="tab:gray")
    figure.savefig(path, dpi=110)


def column(rows: Sequence[Row], name: str) -> list[float]:
    """One column of a table; an empty cell is NaN, which leaves a gap in a line."""
    return [math.nan if (value := row[name]) is None else value for row in rows]


def held_out(validation: Sequence[Row]) -> tuple[list[float], list[float]]:
    """Steps and held-out losses."""
    return column(validation, "step"), column(validation, "val_loss")


def running_mean(values: Sequence[float]) -> list[float]:
    """Exponential running mean with the start's bias taken out; values that are not finite are passed over."""
    total, weight, means = 0.0, 0.0, []
    for value in values:
        if math.isfinite(value):
            total, weight = SMOOTHING * total + (1 - SMOOTHING) * value, SMOOTHING * weight + 1 - SMOOTHING
        means.append(total / weight if weight else math.nan)
    return means
