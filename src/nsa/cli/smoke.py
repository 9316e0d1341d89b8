"""`nsa smoke`: a check of everything from kernels to a resumed run in about a minute, against a saved baseline."""

from __future__ import annotations

import math
import shutil
import tempfile
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING

import tyro
from rich.console import Console
from rich.table import Table
from rich.text import Text

from nsa.cli import EXIT_DONE, EXIT_FAILED, fail
from nsa.cli.arguments import parse
from nsa.config.device_name import check_device_name
from nsa.runs.places import check_place
from nsa.terminal import printable

# What needs torch is imported when the arguments are read.
if TYPE_CHECKING:
    from nsa.preflight.smoke import ComparedRow, Figures, SmokeCheck


@dataclass(frozen=True)
class SmokeArguments:
    """Kernels, preflight, a small training that is halted and resumed, generation and health, in about a minute.

    Exit code 0: all is well; 1: a step failed, or a figure is worse than the baseline's; 2: bad input.
    """

    baseline: Path | None = None
    """Figures to compare with; benchmarks/results/smoke_DEVICE.json unless given, where that exists."""
    update_baseline: tyro.conf.FlagCreatePairsOff[bool] = False
    """Write this check's figures there instead of comparing."""
    tolerance_percent: float = 5.0
    """How much worse a figure may be. Losses hold everywhere; tokens per second are judged only on the same machine,
    where a matrix product and a copy take as long as they did then."""
    folder: Path | None = None
    """Keep the run there; unless given, it lies in a temporary folder that stays only when something failed."""
    device: str = "auto"
    """"auto" (CUDA where there is one), "cpu" or "cuda"."""


def main(arguments: Sequence[str]) -> int:
    """Run the command and return its exit code."""
    given = parse(SmokeArguments, "smoke", arguments)
    try:
        return run(given)
    except (ValueError, OSError) as error:
        return fail("smoke", error)


def run(given: SmokeArguments) -> int:
    """Check, compare and return the exit code.

    Raises:
        ValueError: an option cannot be used; nothing was run.
    """
    if not 0 <= given.tolerance_percent < math.inf:
        raise ValueError(f"--tolerance_percent must be a finite number of at least 0, not {given.tolerance_percent}")
    check_device_name(given.device)

    from nsa.device import choose_device
    from nsa.preflight.smoke import SmokeCheck, read_baseline

    device = choose_device(given.device).type
    path = given.baseline or Path(f"benchmarks/results/smoke_{device}.json")
    baseline = None
    if not given.update_baseline and (given.baseline is not None or path.is_file()):
        baseline = read_baseline(path)
    if given.folder is not None:
        if given.folder.exists():
            raise ValueError(f"{given.folder} exists already and is left as it is; give --folder another name")
        check_place(given.folder, "--folder")
    if given.update_baseline:
        check_place(path, "--baseline")
    folder = given.folder or Path(tempfile.mkdtemp(prefix="nsa-smoke-"))
    check = SmokeCheck(folder, device)
    if not _all_steps_pass(check):
        print(f"failed; what it left lies in {folder}")
        return EXIT_FAILED
    code = _judge(check.figures(), baseline, path, given)
    if given.folder is None and code == EXIT_DONE:
        shutil.rmtree(folder)
    else:
        print(f"the run lies in {folder}")
    return code


def _all_steps_pass(check: SmokeCheck) -> bool:
    console = Console(highlight=False)
    for step in check.run():
        console.print(f"{'FAILED' if step.problem else 'ok':<7}{step.name} ({step.seconds:.1f} s)", markup=False)
        if step.problem is not None:
            console.print(printable(f"       {step.problem}"), markup=False, soft_wrap=True)
            return False
    return True


def _judge(figures: Figures, baseline: Figures | None, path: Path, given: SmokeArguments) -> int:
    from nsa.preflight.smoke import another_machine, compare, write_baseline

    rows = compare(figures, baseline, given.tolerance_percent)
    Console(highlight=False).print(_table(rows, f"against {path}" if baseline else "no baseline"))
    if given.update_baseline:
        write_baseline(path, figures)
        print(f"wrote {path}")
    elif baseline is None:
        print(f"nothing to compare with: there is no {path}; --update_baseline writes it")
    if baseline is not None and (why := another_machine(figures, baseline)):
        print(f"the speed is only reported: {why}")
    worse = [row.figure for row in rows if row.verdict == "worse"]
    print(f"worse than the baseline: {', '.join(worse)}" if worse else "the smoke check passed")
    return EXIT_FAILED if worse else EXIT_DONE


def _table(rows: Sequence[ComparedRow], title: str) -> Table:
    table = Table(title=Text(printable(title)))
    for heading in ("figure", "now", "baseline", "change", "verdict"):
        table.add_column(heading, justify="left" if heading in ("figure", "verdict") else "right")
    for row in rows:
        before = "-" if row.baseline is None else f"{row.baseline:,.6g}"
        change = "-" if row.change_percent is None else f"{row.change_percent:+.2f}%"
        table.add_row(row.figure, f"{row.now:,.6g}", before, change, row.verdict)
    return table
