"""`nsa page RUN [--beside OTHER]`: write the page of a run anew, with another run's losses beside its own."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import tyro

from nsa.cli import EXIT_DONE, fail
from nsa.cli.arguments import parse
from nsa.runs.folder import RunFolder
from nsa.terminal import printable


@dataclass(frozen=True)
class PageArguments:
    """Write RUN/report.html from the files in the run folder: curves, selection, gates, samples."""

    run: tyro.conf.Positional[Path]
    """Folder of a run that has ended."""
    beside: Path | None = None
    """Folder of another run, whose losses are put beside this one's, such as its dense twin."""


def main(arguments: Sequence[str]) -> int:
    """Run the command and return its exit code."""
    given = parse(PageArguments, "page", arguments)
    from nsa.runs.page import write_page  # takes seconds

    folder = RunFolder(given.run)
    try:
        write_page(folder, RunFolder(given.beside) if given.beside else None)
    except (ValueError, OSError) as error:
        return fail("page", error)
    print(printable(f"wrote {folder.report_html}"))
    return EXIT_DONE
