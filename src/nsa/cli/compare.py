"""`nsa compare RUN RUN ... --out PATH`: loss curves of several runs in one picture and one table."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import tyro

from nsa.cli import EXIT_DONE, fail
from nsa.cli.arguments import parse
from nsa.terminal import printable


@dataclass(frozen=True)
class CompareArguments:
    """Show one run or compare several, also in progress or killed: OUT.csv, OUT.png and a Markdown table."""

    runs: tyro.conf.Positional[tuple[Path, ...]]
    """Run folders; differences are against the first."""
    out: Path = Path("comparison")
    """Path of the results, without an ending."""


def main(arguments: Sequence[str]) -> int:
    """Run the command and return its exit code."""
    given = parse(CompareArguments, "compare", arguments)
    from nsa.runs.compare import compare_runs  # takes seconds

    try:
        table = compare_runs(given.runs, given.out)
    except (ValueError, OSError) as error:
        return fail("compare", error)
    print(table)
    print(printable(f"\nwrote {given.out}.csv and {given.out}.png"))
    return EXIT_DONE
