"""Pictures of a run's losses and gates, drawn from its tables alone.

draw_curves(RunFolder(Path("runs/showcase")), Path("curves.png"))
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from pathlib import Path
from statistics import fmean

from matplotlib.axes import Axes
from matplotlib.figure import Figure

from nsa.train.observe.csv_log import HEALTH_COLUMNS, TRAINING_COLUMNS, VALIDATION_COLUMNS, Row, column, read_csv
from nsa.train.observe.thresholds import Thresholds
from nsa.train.run_folder import RunFolder

SHARES = {
    "gate_share_cmp": "gate, compressed",
    "gate_share_slc": "gate, selected",
    "gate_share_win": "gate, window",
    "mean_coverage": "context covered by the selected blocks",
}
SMOOTHING = 0.9  # weight of the past in the drawn running mean of the training loss


def draw_curves(folder: RunFolder, path: Path) -> None:
    """Training and held-out loss over steps, learning rate and gradient norm below, then the gates; writes a PNG."""
    training = read_csv(folder.training_csv, TRAINING_COLUMNS)
    validation = read_csv(folder.val_csv, VALIDATION_COLUMNS)
    health = read_csv(folder.health_csv, HEALTH_COLUMNS) if folder.health_csv.is_file() else []
    heights = [3, 1, 1.5] if health else [3, 1]
    figure = Figure(figsize=(9, 7 + 3 * bool(health)), layout="constrained")
    losses, rates, *below = figure.subplots(len(heights), 1, sharex=True, height_ratios=heights)
    for axes in below:
        _draw_gates(axes, health)
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
    (below or [rates])[-1].set_xlabel("optimizer step")
    norms = rates.twinx()
    norms.plot(steps, column(training, "grad_norm"), color="tab:gray", alpha=0.6, linewidth=1)
    norms.set_ylabel("gradient norm", color="tab:gray")
    figure.savefig(path, dpi=110)


def _draw_gates(axes: Axes, health: Sequence[Row]) -> None:
    """Mean weight of each branch and coverage of the selection over all layers, and the entropy of each layer."""
    steps = sorted({row["step"] or 0 for row in health})
    layers = sorted({row["layer"] or 0 for row in health})
    for name, label in SHARES.items():
        means = [fmean(column([row for row in health if row["step"] == step], name)) for step in steps]
        axes.plot(steps, means, marker=".", label=label)
    axes.set_ylim(0, 1)
    axes.set_ylabel("mean over layers")
    axes.grid(alpha=0.3)
    axes.legend(loc="upper left", fontsize="small")
    entropies = axes.twinx()
    for layer in layers:
        rows = [row for row in health if row["layer"] == layer]
        label = "entropy of each layer's gates" if layer == layers[0] else None
        values = column(rows, "step"), column(rows, "gate_entropy_mean_nats")
        entropies.plot(*values, color="tab:gray", alpha=0.5, label=label)
    entropies.axhline(
        Thresholds().gate_entropy_mean_nats, color="tab:red", linestyle=":", label="least healthy entropy"
    )
    entropies.set_ylim(0, 1.15)  # ln 3 = 1.099 when all branches weigh the same
    entropies.set_ylabel("nats", color="tab:gray")
    entropies.legend(loc="lower left", fontsize="small")


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
