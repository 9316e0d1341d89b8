"""Runs side by side, finished, in progress or killed: one picture, their held-out losses as CSV, and a table.

compare_runs([Path("runs/showcase"), Path("runs/showcase_dense")], Path("benchmarks/results/nsa_vs_dense"))
"""

from __future__ import annotations

import csv
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

import numpy as np
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.ticker import EngFormatter

from nsa.runs.curves import Curves, Points, draw_curves, save, thinned, zoom
from nsa.runs.facts import RunFacts, differences, run_facts
from nsa.runs.folder import RunFolder
from nsa.runs.markdown import cell
from nsa.runs.places import check_place, open_run_folder

COMPARISON_COLUMNS = ("run", "step", "tokens", "train_loss", "val_loss", "val_bits_per_byte")
"""Run folder, optimizer step, training tokens so far, smoothed training loss, held-out loss (nats per token) and bits
per byte, at each step that has an evaluation."""

MAX_RUNS = 20
MARKERS = "osD^vPX*<>"
STYLES = ("-", "--", "-.", ":")


def compare_runs(runs: Sequence[Path], out: Path) -> str:
    """Write `out`.csv and `out`.png and return a Markdown table.

    Args:
        runs: run folders, one or more; differences are against the first.
        out: path of the results without an ending.

    Raises:
        ValueError: no run, too many of them, or a folder without a run's tables; nothing is written.
    """
    if not 0 < len(runs) <= MAX_RUNS:
        raise ValueError(f"a comparison needs from 1 to {MAX_RUNS} run folders, not {len(runs)}")
    if len({Path(run).resolve() for run in runs}) < len(runs):
        raise ValueError("a run folder is given twice; give each once")
    facts = [run_facts(open_run_folder(Path(run))) for run in runs]
    csv_path, png_path = (out.with_name(f"{out.name}.{ending}") for ending in ("csv", "png"))
    for path in (csv_path, png_path):
        check_place(path, "--out")
    out.parent.mkdir(parents=True, exist_ok=True)
    with csv_path.open("w", newline="", encoding="utf-8") as file:
        writer = csv.writer(file, lineterminator="\n")
        writer.writerow(COMPARISON_COLUMNS)
        for run in facts:
            writer.writerows(_rows(run))
    if len(facts) == 1:
        draw_curves(RunFolder(Path(runs[0])), png_path)
    else:
        draw_comparison([run.curves for run in facts], png_path)
    return comparison_table(facts)


def comparison_table(facts: Sequence[RunFacts]) -> str:
    """A row for each thing to compare and a column for each run; then the keys in which their configs differ."""
    against = ["the first" if run is facts[0] else _against(run.val_loss, facts[0].val_loss) for run in facts]
    rows = {name: [run.values[name] for run in facts] for name in facts[0].values}
    rows["held-out loss against the first"] = against
    lines = [("", *(run.name.strip() for run in facts)), *((name, *values) for name, values in rows.items())]
    if len(facts) == 1:
        del lines[-1]
    lines += [(f"`{key}`", *values) for key, values in differences(list(facts)).items()]
    texts = [f"| {' | '.join(map(cell, line))} |" for line in lines]
    return "\n".join([texts[0], "|---" * (len(facts) + 1) + "|", *texts[1:]])


def draw_comparison(runs: Sequence[Curves], path: Path) -> None:
    """Losses of runs over training tokens, their differences to the first, and the last part enlarged; writes a PNG."""
    figure = Figure(figsize=(12, 10), layout="constrained")
    axes = figure.subplot_mosaic([["losses", "losses"], ["differences", "last"]])
    devices = dict.fromkeys(run.device for run in runs if run.device)
    figure.suptitle("; ".join(devices))
    for index, run in enumerate(runs):
        for name in ("losses", "last"):
            _draw_run(axes[name], run, index)
        if index:
            _draw_difference(axes["differences"], run, runs[0], index)
    axes["losses"].legend()
    axes["losses"].set_ylabel("loss, nats per token\n(points: held-out, lines: training, smoothed)")
    zoom(axes["last"], [curve for run in runs for curve in _both(run)])
    axes["last"].set(title="the last part, enlarged", ylabel="loss, nats per token")
    axes["differences"].axhline(0, color="C0", linewidth=1)
    axes["differences"].set(ylabel="nats per token", title=f"loss less that of {runs[0].name}")
    _limit(axes["differences"], runs)
    for one in axes.values():
        one.grid(alpha=0.3)
        one.set_xlabel("training tokens")
        one.xaxis.set_major_formatter(EngFormatter(sep=""))
    save(figure, path)


def _both(run: Curves) -> Iterator[tuple[Points, Points]]:
    yield run.training["tokens"], run.smooth
    yield run.val_tokens, run.val_loss


def _look(index: int) -> dict[str, Any]:
    """The colour, marker and line of a run, by its place in the comparison."""
    colors = 10
    return {
        "color": f"C{index % colors}",
        "marker": MARKERS[index % len(MARKERS)],
        "linestyle": STYLES[index // colors % len(STYLES)],
    }


def _draw_run(axes: Axes, run: Curves, index: int) -> None:
    look = _look(index)
    last = f", held-out {run.val_loss[-1]:.4f}" if len(run.val_loss) else ""
    axes.plot(*thinned(run.training["tokens"], run.smooth), **{**look, "marker": ""}, alpha=0.6, linewidth=1)
    line = "" if len(run.smooth) else look["linestyle"]
    axes.plot(run.val_tokens, run.val_loss, **{**look, "linestyle": line}, markersize=6, label=f"{run.name}{last}")


def _draw_difference(axes: Axes, run: Curves, first: Curves, index: int) -> None:
    """Held-out and smoothed training loss of a run less those of the first, where both have them."""
    look = _look(index)
    axes.plot(*thinned(*_less(run.training["tokens"], run.smooth, first.training["tokens"], first.smooth)),
              **{**look, "marker": ""}, alpha=0.35, linewidth=1)  # fmt: skip
    axes.plot(*_less(run.val_tokens, run.val_loss, first.val_tokens, first.val_loss), **look, markersize=6)


def _less(x: Points, y: Points, first_x: Points, first_y: Points) -> tuple[Points, Points]:
    """A curve less another, at the places of the first one that lie within the other."""
    if not len(x) or not len(first_x):
        return x[:0], y[:0]
    within = (x >= first_x[0]) & (x <= first_x[-1])
    return x[within], y[within] - np.interp(x[within], first_x, first_y)


def _limit(axes: Axes, runs: Sequence[Curves]) -> None:
    """As high as the differences are once training has calmed down, not as in its first steps."""
    end = max(run.last_token for run in runs)
    shown = [
        y[(x > end / 4) & np.isfinite(y)]
        for run in runs[1:]
        for (x, y) in (_less(*one, *other) for one, other in zip(_both(run), _both(runs[0]), strict=True))
    ]
    values = np.concatenate([np.zeros(1), *shown])
    margin = 0.2 * float(np.ptp(values)) or 0.01
    axes.set_ylim(float(values.min()) - margin, float(values.max()) + margin)


def _rows(run: RunFacts) -> Iterator[tuple[str, ...]]:
    curves = run.curves
    smooth = dict(zip(curves.training["step"].tolist(), curves.smooth.tolist(), strict=True))
    for index, step in enumerate(curves.val_steps.tolist()):
        training = f"{smooth[step]:.5f}" if step in smooth else ""
        losses = (f"{curves.val_loss[index]:.5f}", f"{curves.val_bits_per_byte[index]:.5f}")
        yield run.name.strip(), f"{step:.0f}", f"{curves.val_tokens[index]:.0f}", training, *losses


def _against(loss: float, first: float) -> str:
    return "-" if not loss / first > 0 else f"{loss / first - 1:+.2%}"
