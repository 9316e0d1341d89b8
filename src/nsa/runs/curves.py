"""Pictures of a run's losses, speed and gates, drawn from its tables alone; also of one that is still in progress.

draw_curves(RunFolder(Path("runs/showcase")), Path("curves.png"))
"""

from __future__ import annotations

import math
import os
from array import array
from collections.abc import Sequence
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Any

import numpy as np
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.ticker import EngFormatter
from numpy.typing import ArrayLike, NDArray

from nsa.runs.folder import RunFolder, read_json
from nsa.runs.tables import HEALTH_COLUMNS, TRAINING_COLUMNS, VALIDATION_COLUMNS, Row, column, iter_csv, read_csv
from nsa.runs.thresholds import Thresholds
from nsa.terminal import printable

SHARES = {
    "gate_share_cmp": "gate, compressed",
    "gate_share_slc": "gate, selected",
    "gate_share_win": "gate, window",
    "mean_coverage": "context covered by the selected blocks",
}
DPI = 150
SMOOTHED_SHARE = 0.04  # of a run's steps whose mean is one point of the smooth line
MAX_POINTS = 4000  # of one curve in a picture
LAST_PART = 0.5  # of a run that is shown enlarged
MAX_NAME = 40  # characters of a name in a picture

Points = NDArray[np.float64]


@dataclass(frozen=True)
class Curves:
    """A run's tables as curves.

    Attributes:
        name: what the run is called in a picture.
        device: what it ran on, "" where that is not known.
        training: the columns of `training.csv`.
        val_steps, val_tokens, val_loss, val_bits_per_byte: of each evaluation.
    """

    name: str
    device: str
    training: dict[str, Points]
    val_steps: Points
    val_tokens: Points
    val_loss: Points
    val_bits_per_byte: Points

    @cached_property
    def smooth(self) -> Points:
        """The training loss without its noise, at each step."""
        return np.array(running_mean(self.training["loss"]))

    @property
    def last_bits_per_byte(self) -> float:
        """Of the newest evaluation, NaN before the first."""
        return float(self.val_bits_per_byte[-1]) if len(self.val_bits_per_byte) else math.nan

    @property
    def last_token(self) -> float:
        """Training tokens of the newest row of either table."""
        return max([0.0, *self.training["tokens"][-1:], *self.val_tokens[-1:]])


def read_curves(folder: RunFolder) -> Curves:
    """The curves of a run that has begun.

    Raises:
        ValueError: a table is missing or damaged.
    """
    training = read_columns(folder.training_csv, TRAINING_COLUMNS)
    validation = read_csv(folder.val_csv, VALIDATION_COLUMNS)
    steps, losses = (np.array(points) for points in held_out(validation))
    # An evaluation lies at the tokens of its step; there is one before the first.
    tokens = np.interp(steps, [0, *training["step"]], [0, *training["tokens"]])
    bits = np.array(column(validation, "val_bits_per_byte"))
    return Curves(plain(folder.path.resolve().name), device_of(folder), training, steps, tokens, losses, bits)


def read_columns(path: Path, columns: Sequence[str]) -> dict[str, Points]:
    """The columns of a table as arrays, for one with a row for each of many steps; an empty cell is NaN."""
    found = {name: array("d") for name in columns}
    for row in iter_csv(path, columns):
        for name, value in row.items():
            found[name].append(math.nan if value is None else value)
    return {name: np.array(values, dtype=np.float64) for name, values in found.items()}


def draw_curves(folder: RunFolder, path: Path) -> None:
    """Loss over steps and tokens, its last part enlarged, learning rate, gradient norm and speed, then the gates.

    Raises:
        ValueError: a table is missing or damaged; nothing is written.
    """
    curves = read_curves(folder)
    health = read_csv(folder.health_csv, HEALTH_COLUMNS) if folder.health_csv.is_file() else []
    rows: list[Any] = [["losses", "last"], ["rates", "speed"], *([["gates", "entropy"]] if health else [])]
    heights = [2, 1, 1.3][: len(rows)]
    figure = Figure(figsize=(12, 2.2 * sum(heights)), layout="constrained")
    axes = figure.subplot_mosaic(rows, height_ratios=heights)
    figure.suptitle("   ".join(filter(None, (curves.name, curves.device))))
    for name in ("losses", "last"):
        _draw_loss(axes[name], curves)
    _tokens_on_top(axes["losses"], curves)
    axes["losses"].legend()
    zoom(axes["last"], [(curves.training["step"], curves.training["loss"]), (curves.val_steps, curves.val_loss)])
    axes["last"].set_title("the last part, enlarged", fontsize="medium")
    _draw_rates(axes["rates"], curves.training)
    axes["speed"].plot(*thinned(curves.training["step"], curves.training["tokens_per_s"]), color="tab:blue")
    axes["speed"].set(ylabel="tokens per second", ylim=(0, None))
    if health:
        _draw_shares(axes["gates"], health)
        _draw_entropies(axes["entropy"], health)
    for one in axes.values():
        one.grid(alpha=0.3)
        one.set_xlabel("optimizer step")
    save(figure, path)


def _draw_loss(axes: Axes, curves: Curves) -> None:
    steps = curves.training["step"]
    axes.plot(*thinned(steps, curves.training["loss"]), ".", color="tab:blue", alpha=0.25, markersize=2)
    axes.plot(*thinned(steps, curves.smooth), color="tab:blue", label="training: each step, and smoothed")
    last = f", {curves.val_loss[-1]:.4f} after step {curves.val_steps[-1]:.0f}" if len(curves.val_loss) else ""
    axes.plot(curves.val_steps, curves.val_loss, color="tab:orange", marker="o", markersize=4, label=f"held-out{last}")
    axes.set_ylabel("loss, nats per token")


def _tokens_on_top(axes: Axes, curves: Curves) -> None:
    """A second scale, in tokens, of an axis in steps."""
    if not len(curves.training["step"]):
        return
    tokens_per_step = curves.training["tokens"][-1] / curves.training["step"][-1]
    top = axes.secondary_xaxis("top", functions=(lambda x: x * tokens_per_step, lambda x: x / tokens_per_step))
    top.xaxis.set_major_formatter(EngFormatter(sep=""))
    top.set_xlabel("training tokens")


def _draw_rates(axes: Axes, training: dict[str, Points]) -> None:
    axes.plot(*thinned(training["step"], training["lr"]), color="tab:green")
    axes.set_ylabel("learning rate", color="tab:green")
    norms = axes.twinx()
    norms.plot(*thinned(training["step"], training["grad_norm"]), color="tab:gray", alpha=0.6, linewidth=1)
    norms.set_ylabel("gradient norm", color="tab:gray")


def _draw_shares(axes: Axes, health: Sequence[Row]) -> None:
    """Mean weight of each branch and coverage of the selection over all layers."""
    steps = sorted({row["step"] or 0 for row in health})
    for name, label in SHARES.items():
        values = {step: column([row for row in health if row["step"] == step], name) for step in steps}
        axes.plot(steps, [float(np.mean(values[step])) for step in steps], marker=".", label=label)
    axes.set(ylim=(0, 1), ylabel="mean over layers")
    axes.legend(fontsize="small", ncols=2, loc="lower center", bbox_to_anchor=(0.5, 1))


def _draw_entropies(axes: Axes, health: Sequence[Row]) -> None:
    """The entropy of each layer's gates against the least healthy one."""
    layers = sorted({row["layer"] or 0 for row in health})
    for layer in layers:
        rows = [row for row in health if row["layer"] == layer]
        label = f"layer {layer:.0f}" if len(layers) <= 8 else None
        axes.plot(column(rows, "step"), column(rows, "gate_entropy_mean_nats"), marker=".", alpha=0.7, label=label)
    axes.axhline(Thresholds().gate_entropy_mean_nats, color="tab:red", linestyle=":", label="least healthy")
    axes.set(ylim=(0, 1.15), ylabel="entropy of the gates, nats")  # ln 3 = 1.099 when all branches weigh the same
    axes.legend(fontsize="small", ncols=5, loc="lower center", bbox_to_anchor=(0.5, 1))


def held_out(validation: Sequence[Row]) -> tuple[list[float], list[float]]:
    """Steps and held-out losses."""
    return column(validation, "step"), column(validation, "val_loss")


def running_mean(values: ArrayLike) -> list[float]:
    """A straight line fitted to each value and its neighbours on either side, at that value's place.

    In the middle of a curve that is their mean. Towards its ends, where one side has fewer, the line lags behind the
    values nowhere: a mean of earlier values would lie above a falling loss. Values that are not finite are skipped.
    """
    points = np.asarray(values, dtype=np.float64)
    count = len(points)
    reach = max(1, round(count * SMOOTHED_SHARE / 2))
    index = np.arange(count)
    finite = np.isfinite(points)
    x, y = index / max(1, count - 1), np.where(finite, points, 0.0)
    first, behind = np.maximum(index - reach, 0), np.minimum(index + reach + 1, count)
    # Sums over each window: of 1, x, y, x^2 and x y, over the values that count.
    sums = [np.concatenate([[0.0], np.cumsum(np.where(finite, part, 0.0))]) for part in (x**0, x, y, x * x, x * y)]
    n, sum_x, sum_y, sum_xx, sum_xy = (part[behind] - part[first] for part in sums)
    some = np.maximum(n, 1)
    variance, covariance = sum_xx - sum_x * sum_x / some, sum_xy - sum_x * sum_y / some
    slope = np.divide(covariance, variance, out=np.zeros(count), where=(n > 1) & (variance > 0))
    return np.where(n > 0, sum_y / some + slope * (x - sum_x / some), np.nan).tolist()


def thinned(x: Points, y: Points) -> tuple[Points, Points]:
    """At most `MAX_POINTS` of a curve's points, the last among them."""
    if len(x) <= MAX_POINTS:
        return x, y
    kept = np.linspace(0, len(x) - 1, MAX_POINTS).round().astype(int)
    return x[kept], y[kept]


def zoom(axes: Axes, curves: Sequence[tuple[Points, Points]]) -> None:
    """Show the last part of curves only, as high as they are there but for what sticks out."""
    end = max((x[-1] for x, _ in curves if len(x)), default=0.0)
    begin = end * (1 - LAST_PART)
    shown = np.concatenate([y[(x >= begin) & np.isfinite(y)] for x, y in curves])
    if not len(shown) or end <= 0:
        return
    low, high = np.quantile(shown, [0.01, 0.99])
    margin = 0.1 * (high - low) or 0.01
    axes.set(xlim=(begin, end + 0.02 * (end - begin)), ylim=(low - margin, high + margin))


def save(figure: Figure, path: Path) -> None:
    """Write a picture as PNG so that a viewer finds the old or the new one; a link in its place is replaced."""
    temporary = path.with_name(f".{path.name}.{os.getpid()}.part")
    temporary.unlink(missing_ok=True)
    figure.savefig(temporary, format="png", dpi=DPI)
    os.replace(temporary, path)


def device_of(folder: RunFolder) -> str:
    """What a run ran on, "" where its `env.json` does not say."""
    env = read_json(folder.env_json) or {}
    name, threads = env.get("device_name"), env.get("num_threads")
    if not isinstance(name, str):
        return ""
    on_cpu = str(env.get("device")).startswith("cpu") and isinstance(threads, int)
    return plain(name) + (f", {threads} thread{'s' * (threads != 1)}" if on_cpu else "")


def plain(text: str) -> str:
    """A name as a picture can show it: no formulas, nothing that acts, not too long."""
    text = printable(text.replace("\n", " "))[:MAX_NAME].replace("$", r"\$")
    return f" {text}" if text.startswith("_") else text  # a legend leaves out what begins with a line
