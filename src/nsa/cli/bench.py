"""`nsa bench KIND ...`: measure, print a table, write a CSV with a JSON file of the circumstances beside it.

A kind is one line in `KINDS` and one module in `nsa.bench` with a settings dataclass, a function from settings to rows
and, where there is a picture of them, `draw(rows, settings, path)`. `nsa bench KIND --help` lists the settings.
"""

from __future__ import annotations

import dataclasses
import importlib
import shlex
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import torch
import tyro

from nsa.bench.protocol import print_table, write_results
from nsa.cli import EXIT_DONE, EXIT_USAGE, fail, unknown

# Kind -> (module, settings, function, one line of help).
KINDS = {
    "prefill": ("nsa.bench.prefill", "PrefillBench", "measure_prefill", "the operator against dense attention"),
    "decode": ("nsa.bench.decode", "DecodeBench", "measure_decode", "time for one token at growing context"),
    "telemetry": ("nsa.bench.telemetry", "TelemetryBench", "measure_telemetry", "what a run's reports and guards cost"),
    "train": ("nsa.bench.train", "TrainBench", "measure_train", "whole training steps in tokens per second"),
}


def main(arguments: Sequence[str]) -> int:
    """Run the command and return its exit code."""
    if not arguments or arguments[0] in ("-h", "--help"):
        print(usage())
        return EXIT_DONE if arguments else EXIT_USAGE
    kind, *rest = arguments
    if kind not in KINDS:
        return unknown("nsa bench", "benchmark", kind, KINDS)
    settings_type, measure = load(kind)
    given: Any = tyro.cli(arguments_of(settings_type), prog=f"nsa bench {kind}", args=rest, use_underscores=True)
    try:
        device = torch.device(given.settings.device)
        rows = measure(given.settings)
        if not rows:  # not rank 0
            return EXIT_DONE
        out = given.out or Path(f"benchmarks/results/{kind}_{device.type}.csv")
        write_results(rows, out, given.settings, shlex.join(["nsa", "bench", *arguments]), device)
        draw = getattr(importlib.import_module(KINDS[kind][0]), "draw", None)
        if draw is not None:
            draw(rows, given.settings, out.with_suffix(".png"))
    except (ValueError, OSError) as error:
        return fail("bench", error)
    print_table(rows, f"{kind} on {device.type}")
    print(f"written to {out} and {out.with_suffix('.json').name}")
    return EXIT_DONE


def load(kind: str) -> tuple[type, Callable[[Any], list[Any]]]:
    """The settings dataclass of a kind, and the function that measures with them."""
    module_name, settings, function, _ = KINDS[kind]
    module = importlib.import_module(module_name)
    return getattr(module, settings), getattr(module, function)


def arguments_of(settings_type: type) -> type:
    """A dataclass of the settings' fields and `--out`."""
    fields = [
        ("settings", tyro.conf.OmitArgPrefixes[settings_type], dataclasses.field(default_factory=settings_type)),
        ("out", Path | None, dataclasses.field(default=None)),
    ]
    arguments = dataclasses.make_dataclass("BenchArguments", fields, frozen=True)
    arguments.__doc__ = (
        f"{settings_type.__doc__}\n\nArgs:\n    out: CSV to write; benchmarks/results/KIND_DEVICE.csv unless given."
    )
    return arguments


def usage() -> str:
    """The text of `nsa bench --help`."""
    lines = [f"  {kind:<10} {summary}" for kind, (*_, summary) in KINDS.items()]
    head = "usage: nsa bench KIND ...\n\nMeasure on this machine, print a table, write a CSV.\n\nkinds:\n"
    return head + "\n".join(lines) + "\n\n`nsa bench KIND --help` lists the settings."
