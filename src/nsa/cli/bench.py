"""`nsa bench KIND ...`: measure, print a table, write a CSV with a JSON file of the circumstances beside it.

A kind is one line in `KINDS`, settings in `nsa.bench.settings`, and one module in `nsa.bench` with a function from
settings to rows and, where there is a picture of them, `draw(rows, settings, path)`.
"""

from __future__ import annotations

import dataclasses
import importlib
import shlex
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import tyro

from nsa.bench import settings
from nsa.cli import EXIT_DONE, EXIT_USAGE, fail, unknown
from nsa.cli.arguments import asks_for_help, parse, parse_with_overrides
from nsa.config.device_name import check_device_name
from nsa.config.options import OptionError


@dataclass(frozen=True)
class Kind:
    """One benchmark: its settings, the function in `nsa.bench.MODULE`, and a line of help."""

    settings: type
    module: str
    function: str
    summary: str


@dataclass(frozen=True)
class Output:
    """Where the results go."""

    out: Path | None = None
    """CSV to write, with a JSON file of the same name beside it; bench_KIND.csv in this folder unless given."""
    overwrite: tyro.conf.FlagCreatePairsOff[bool] = False
    """Replace results that lie there already."""


KINDS = {
    "prefill": Kind(settings.PrefillBench, "prefill", "measure_prefill", "the operator against dense attention"),
    "decode": Kind(settings.DecodeBench, "decode", "measure_decode", "time for one token at growing context"),
    "telemetry": Kind(
        settings.TelemetryBench, "telemetry", "measure_telemetry", "what a run's reports and guards cost"
    ),
    "train": Kind(settings.TrainBench, "train", "measure_train", "whole training steps in tokens per second"),
}


def main(arguments: Sequence[str]) -> int:
    """Run the command and return its exit code."""
    if not arguments or arguments[0] in ("-h", "--help"):
        print(usage())
        return EXIT_DONE if arguments else EXIT_USAGE
    name, *rest = arguments
    if name not in KINDS:
        return unknown("nsa bench", "benchmark", name, KINDS)
    kind = KINDS[name]
    output, bench = _read(name, kind, rest)
    try:
        check_device_name(bench.device)
    except ValueError as error:
        return fail("bench", error)
    out = output.out or Path(f"bench_{name}.csv")
    _check(out, overwrite=output.overwrite)

    if getattr(bench, "config", None) is not None:
        _check_config(bench)

    from nsa.bench.protocol import print_table, write_results
    from nsa.device import choose_device

    try:
        device = choose_device(bench.device)
        module = importlib.import_module(f"nsa.bench.{kind.module}")
        rows = getattr(module, kind.function)(bench)
        if not rows:  # not rank 0
            return EXIT_DONE
        write_results(rows, out, bench, shlex.join(["nsa", "bench", *arguments]), device)
        if hasattr(module, "draw"):
            module.draw(rows, bench, out.with_suffix(".png"))
    except (ValueError, OSError) as error:
        return fail("bench", error)
    print_table(rows, f"{name} on {device.type}")
    print(f"written to {out} and {out.with_suffix('.json').name}")
    return EXIT_DONE


def _read(name: str, kind: Kind, arguments: Sequence[str]) -> tuple[Output, Any]:
    """Where the results go, and the settings, with the keys of a config where a kind takes one."""
    both: Any = type(f"{kind.settings.__name__}Arguments", (kind.settings, Output), {"__doc__": kind.settings.__doc__})
    both = dataclass(frozen=True)(both)
    names = [field.name for field in dataclasses.fields(kind.settings)]
    if "overrides" in names and not asks_for_help(arguments):
        given, overrides = parse_with_overrides(both, f"bench {name}", arguments)
        given = dataclasses.replace(given, overrides=tuple(overrides))
    else:
        given = parse(both, f"bench {name}", arguments)
    return Output(given.out, given.overwrite), kind.settings(**{name: getattr(given, name) for name in names})


def _check(out: Path, *, overwrite: bool) -> None:
    """Refuse a place that cannot be written, or that holds results, before anything is measured."""
    if out.suffix != ".csv":
        raise OptionError(f"--out {out} must end in .csv; a .json file of the same name goes beside it")
    if not out.parent.is_dir():
        raise OptionError(f"--out {out}: there is no folder {out.parent}; make it first")
    there = [path for path in (out, out.with_suffix(".json")) if path.exists()]
    if there and not (overwrite and all(path.is_file() for path in there)):
        raise OptionError(f"{there[0]} is there already; give another --out, or --overwrite to replace it")


def _check_config(bench: Any) -> None:
    from nsa.config.load import load_config

    try:
        load_config(bench.config, bench.overrides)
    except ValueError as error:
        raise OptionError(str(error)) from None


def usage() -> str:
    """The text of `nsa bench --help`."""
    lines = [f"  {name:<10} {kind.summary}" for name, kind in KINDS.items()]
    head = "usage: nsa bench KIND [--options]\n\nMeasure on this machine, print a table, write a CSV.\n\nkinds:\n"
    return head + "\n".join(lines) + "\n\n`nsa bench KIND --help` lists the settings."
