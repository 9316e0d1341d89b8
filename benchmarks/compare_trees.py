"""Prefill and training of the operator in two source trees, in turns on one GPU: did a change cost time?

    git worktree add ../before COMMIT
    python benchmarks/compare_trees.py ../before/src src --out benchmarks/results/compare_trees_h200.csv

Each tree runs `nsa bench prefill` in a process of its own, so many times in turns; each figure is the median of its
runs. CSV columns: `shape`, `length`, the stage, milliseconds before and after, and after / before.
"""

from __future__ import annotations

import argparse
import csv
import os
import statistics
import subprocess
import sys
import tempfile
from dataclasses import dataclass
from pathlib import Path

import torch

from nsa.bench.protocol import print_table, write_results

HEADS = {"g16": (64, 4, 128, 128), "g4": (32, 8, 128, 128), "paper": (64, 4, 192, 128), "g4_d64": (12, 3, 64, 64)}
LENGTHS = (8192, 65536)


@dataclass(frozen=True)
class Settings:
    """How often each tree has its turn, and of each turn the untimed and the timed repeats."""

    turns: int = 3
    warmup: int = 2
    repeats: int = 7


@dataclass(frozen=True)
class Row:
    """One stage of one shape; see the CSV columns above."""

    shape: str
    length: int
    stage: str
    before_ms: float
    after_ms: float
    ratio: float


def run(source: Path, shape: str, settings: Settings) -> list[dict[str, str]]:
    """The rows of `nsa bench prefill` in one tree."""
    heads, groups, keys, values = map(str, HEADS[shape])
    with tempfile.TemporaryDirectory() as folder:
        out = Path(folder) / "rows.csv"
        command = [sys.executable, "-m", "nsa.cli", "bench", "prefill", "--no_pool", "--no_dense", "--no_memory"]
        command += ["--device", "cuda", "--dtype", "bfloat16", "--num_heads", heads, "--num_kv_heads", groups]
        command += ["--head_dim", keys, "--value_head_dim", values, "--lengths", *map(str, LENGTHS)]
        command += ["--warmup", str(settings.warmup), "--repeats", str(settings.repeats), "--out", str(out)]
        paths = os.pathsep.join([str(source), *filter(None, [os.environ.get("PYTHONPATH")])])
        subprocess.run(command, check=True, env=os.environ | {"PYTHONPATH": paths}, stdout=subprocess.DEVNULL)
        with out.open(newline="", encoding="utf-8") as file:
            return list(csv.DictReader(file))


def compare(shape: str, trees: tuple[Path, Path], settings: Settings) -> list[Row]:
    """Medians of both trees over their turns."""
    found: dict[tuple[str, str], tuple[list[float], list[float]]] = {}
    for turn in range(settings.turns):
        for which, tree in enumerate(trees):
            print(f"{shape}: turn {turn + 1} of {settings.turns}, {tree}", flush=True)
            for row in run(tree, shape, settings):
                for name, value in row.items():
                    if name.endswith("_ms") and value:
                        times = found.setdefault((row["length"], name.removesuffix("_ms")), ([], []))
                        times[which].append(float(value))
    rows = []
    for (length, stage), times in found.items():
        before, after = map(statistics.median, times)
        rows.append(Row(shape, int(length), stage, before, after, after / before))
    return rows


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("before", type=Path, help="source folder of the one tree")
    parser.add_argument("after", type=Path, help="source folder of the other")
    parser.add_argument("--shapes", nargs="+", choices=HEADS, default=list(HEADS))
    parser.add_argument("--turns", type=int, default=Settings.turns)
    parser.add_argument("--out", type=Path, help="CSV file, written anew after each shape; nothing unless given")
    given = parser.parse_args()
    settings, results = Settings(turns=given.turns), []
    for shape in given.shapes:
        results += compare(shape, (given.before, given.after), settings)
        if given.out is not None:
            write_results(results, given.out, settings, " ".join(["python", *sys.argv]), torch.device("cuda"))
    print_table(results, "Before and after")


if __name__ == "__main__":
    main()
