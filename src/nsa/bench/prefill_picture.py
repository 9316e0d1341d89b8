"""The picture of a prefill benchmark: times over length and how many times faster NSA is, or bars for one length.

draw(rows, bench, Path("benchmarks/results/prefill_cpu.png"), device="AMD EPYC")
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from matplotlib.axes import Axes
from matplotlib.figure import Figure

from nsa.bench.settings import PrefillBench

if TYPE_CHECKING:
    from nsa.bench.prefill import PrefillRow

DPI = 150
PASSES = {"forward": "-", "backward": "--"}  # and their lines
COLORS = {"nsa": "tab:blue", "dense": "tab:gray"}
NAMES = {"nsa": "NSA", "dense": "dense"}


def draw(rows: Sequence[PrefillRow], bench: PrefillBench, path: Path, *, device: str) -> None:
    """Write the picture as PNG.

    Args:
        rows: what was measured, a row for each length.
        bench: how it was measured.
        device: name of the machine that did it.
    """
    values = [{name: float(value) for name, value in vars(row).items()} for row in rows]
    kinds = [kind for kind in COLORS if any(math.isfinite(row[f"{kind}_forward_ms"]) for row in values)]
    figure = Figure(figsize=(10, 4.2), layout="constrained")
    times, other = figure.subplots(1, 2)
    if len(values) == 1:
        _time_bars(times, values[0], kinds)
    else:
        _time_lines(times, values, kinds)
    if "dense" in kinds and len(values) > 1:
        _ratios(other, values)
    else:
        _memory_bars(other, values, kinds)
    heads = f"{bench.num_heads} query heads, {bench.num_kv_heads} KV heads, head sizes {bench.head_dim}"
    heads += f" and {bench.value_head_dim}" if bench.value_head_dim != bench.head_dim else ""
    dense = f", dense: {bench.dense_backend}" if "dense" in kinds else ""
    figure.suptitle(f"{heads}, {bench.dtype}{dense}, {device}")
    figure.savefig(path, dpi=DPI)


def _time_lines(axes: Axes, rows: Sequence[dict[str, float]], kinds: Sequence[str]) -> None:
    lengths = [row["length"] for row in rows]
    for kind in kinds:
        for name, line in PASSES.items():
            ms = [row[f"{kind}_{name}_ms"] for row in rows]
            axes.plot(lengths, ms, f"o{line}", color=COLORS[kind], label=f"{NAMES[kind]}, {name}")
    axes.set(xscale="log", yscale="log", ylabel="ms")
    axes.grid(alpha=0.3)
    axes.legend()
    _length_ticks(axes, lengths)


def _ratios(axes: Axes, rows: Sequence[dict[str, float]]) -> None:
    lengths = [row["length"] for row in rows]
    for name, line in PASSES.items():
        ratios = [row[f"dense_{name}_ms"] / row[f"nsa_{name}_ms"] for row in rows]
        axes.plot(lengths, ratios, f"o{line}", color=COLORS["nsa"], label=name)
    axes.axhline(1, color="tab:gray", linewidth=1)
    axes.set(xscale="log", ylabel="times faster than dense")
    axes.grid(alpha=0.3)
    axes.legend()
    _length_ticks(axes, lengths)


def _time_bars(axes: Axes, row: dict[str, float], kinds: Sequence[str]) -> None:
    for index, kind in enumerate(kinds):
        for place, name in enumerate(PASSES):
            bar: Any = axes.bar(index + 0.4 * place, row[f"{kind}_{name}_ms"], 0.36, color=COLORS[kind],
                                alpha=1.0 - 0.4 * place)  # fmt: skip
            axes.bar_label(bar, [f"{name}\n{row[f'{kind}_{name}_ms']:,.4g} ms"])
    axes.set_xticks([index + 0.2 for index in range(len(kinds))], [NAMES[kind] for kind in kinds])
    axes.set(ylabel="ms", xlabel=f"{short(row['length'])} tokens", xlim=(-0.6, len(kinds)))
    axes.margins(y=0.2)


def _memory_bars(axes: Axes, rows: Sequence[dict[str, float]], kinds: Sequence[str]) -> None:
    """Peak memory by length, or that it was not measured."""
    labels = [short(row["length"]) for row in rows]
    measured = [kind for kind in kinds if any(math.isfinite(row[f"{kind}_peak_gib"]) for row in rows)]
    if not measured:
        axes.set_axis_off()
        axes.text(0.5, 0.5, "memory was not measured", ha="center", transform=axes.transAxes)
        return
    for index, kind in enumerate(measured):
        places = [place + 0.4 * index for place in range(len(rows))]
        bar: Any = axes.bar(places, [row[f"{kind}_peak_gib"] for row in rows], 0.36, color=COLORS[kind],
                            label=NAMES[kind])  # fmt: skip
        axes.bar_label(bar, [f"{row[f'{kind}_peak_gib']:.3g}" for row in rows])
    axes.set_xticks([place + 0.2 * (len(measured) - 1) for place in range(len(rows))], labels)
    axes.set(
        ylabel="peak memory beyond the inputs, GiB", xlabel="tokens", xlim=(-0.6, len(rows) - 0.8 + 0.4 * len(measured))
    )
    axes.margins(y=0.2)
    axes.legend()


def _length_ticks(axes: Axes, lengths: Sequence[float]) -> None:
    axes.set_xticks(lengths, [short(length) for length in lengths])
    axes.minorticks_off()
    axes.set_xlabel("tokens")


def short(length: float) -> str:
    """A number of tokens as 512, 8k or 1M."""
    for size, unit in ((2**20, "M"), (2**10, "k")):
        if length >= size:
            return f"{length / size:.4g}{unit}"
    return f"{length:.0f}"
