"""`nsa watch RUN`: a live table of a run's ranks, and alarms that escalate from a warning to stacks and halt."""

from __future__ import annotations

import json
import sys
import time
from collections.abc import Sequence
from contextlib import nullcontext
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING

import tyro
from rich.console import Console
from rich.live import Live

from nsa.cli import EXIT_DONE, EXIT_FAILED, EXIT_STOPPED, fail
from nsa.cli.arguments import parse
from nsa.runs.places import open_run_folder
from nsa.runs.thresholds import Thresholds
from nsa.terminal import printable

if TYPE_CHECKING:
    from nsa.runs.watch import Look

SHOWN_NOTES = 10  # the watch's last notes under the table
LOG_WIDTH = 200  # columns of a table in a file


@dataclass(frozen=True)
class WatchArguments:
    """Watch a run, from any machine that shares its folder, until it ends.

    A problem that lasts is reported first; then the watch asks the run's processes for their stacks; then it halts the
    run. Exit code 0: healthy or finished; 1: an alarm, or a failed run; 2: bad input; 3: a run that was stopped.
    """

    run: tyro.conf.Positional[Path]
    """The run folder; also one that has ended."""
    once: bool = False
    """Look once, change nothing, and exit."""
    json: bool = False
    """Print one JSON object for each look."""
    interval_s: float = 5.0
    """Seconds between looks."""
    halt: bool = True
    """Halt the run when a serious problem lasts; --no_halt only reports it and asks for stacks."""
    thresholds: Thresholds = field(default_factory=Thresholds)
    """What is healthy."""


def main(arguments: Sequence[str]) -> int:
    """Run the command and return its exit code."""
    given = parse(WatchArguments, "watch", arguments)
    try:
        if not 0 < given.interval_s <= 86400:
            raise ValueError(f"--interval_s must be above 0 and at most 86400, not {given.interval_s:g}")
        open_run_folder(given.run)
        return run(given)
    except (ValueError, OSError) as error:
        return fail("watch", error)
    except KeyboardInterrupt:
        return EXIT_DONE


def run(given: WatchArguments) -> int:
    """Look at the run until it ends, or once; returns the exit code.

    Raises:
        ValueError: this is no run folder, or a file in it is damaged.
    """
    from nsa.runs.watch import Watch  # takes seconds

    watch = Watch(given.run, given.thresholds, halt=given.halt)
    console = Console(highlight=False, width=None if sys.stdout.isatty() else LOG_WIDTH)
    live = Live(console=console, auto_refresh=False) if console.is_terminal and not (given.json or given.once) else None
    history: list[str] = []
    with live or nullcontext():
        while True:
            look = watch.look_once() if given.once else watch.look()
            done = [] if given.once else watch.act(look)
            if (end := watch.gave_up(look)) is not None:
                done.append(end)
            history += done
            _show(given, console, live, look, done, history)
            if given.once or end or not look.running:
                return exit_code(look, gave_up=end is not None)
            time.sleep(given.interval_s)


def exit_code(look: Look, *, gave_up: bool) -> int:
    """0 healthy or finished, 1 an alarm or a failed run, 3 a run that was stopped."""
    if look.status["state"] == "stopped":
        return EXIT_STOPPED
    return EXIT_FAILED if gave_up or look.alarms or look.status["state"] == "failed" else EXIT_DONE


def _show(
    given: WatchArguments, console: Console, live: Live | None, look: Look, done: list[str], history: list[str]
) -> None:
    from nsa.runs.watch_view import as_json, as_line, as_table

    if given.json:
        print(json.dumps(as_json(look, done)), flush=True)
    elif live is not None:
        live.update(as_table(look, history[-SHOWN_NOTES:], width=console.width), refresh=True)
    elif given.once or not look.running:
        console.print(as_table(look, done, width=console.width))
    else:
        for line in [as_line(look), *done]:
            console.print(printable(line), markup=False)
