"""`nsa halt RUN [REASON ...]`: ask a run to stop after its current step, with a checkpoint."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import tyro

from nsa.cli import EXIT_DONE, fail
from nsa.cli.arguments import parse
from nsa.runs.folder import RunFolder
from nsa.runs.halt import ask_to_halt


@dataclass(frozen=True)
class HaltArguments:
    """Stop a run after its current step, with a checkpoint that `nsa resume` takes; from any machine that shares it."""

    run: tyro.conf.Positional[Path]
    """The folder of the run, such as runs/NAME."""
    reason: tyro.conf.Positional[tuple[str, ...]] = ()
    """Words that the run's status will give as the reason."""


def main(arguments: Sequence[str]) -> int:
    """Run the command and return its exit code."""
    given = parse(HaltArguments, "halt", arguments)
    folder = RunFolder(given.run)
    try:
        running = is_running(folder)
        ask_to_halt(folder.halt, " ".join(given.reason))
    except (ValueError, OSError) as error:
        return fail("halt", error)
    if running:
        print(f"wrote {folder.halt}; the run stops after its current step with a checkpoint")
    else:
        print(
            f"wrote {folder.halt}, but no process on this machine trains in {folder.path}: it stops one on another "
            f"machine; if the run was killed, nothing is left to stop, and `nsa resume {folder.path}` resumes it"
        )
    return EXIT_DONE


def is_running(folder: RunFolder) -> bool:
    """Whether a process on this machine trains in the folder, or begins to.

    Raises:
        ValueError: this is no run folder, or none trains and `status.json` says that none does.
    """
    if not folder.status_json.is_file():
        raise ValueError(f"{folder.path} is no run folder: it holds no status.json")
    if folder.lock.is_held():
        return True
    try:
        status = folder.read_status()
    except ValueError as error:
        raise ValueError(f"{error}; to stop it all the same: touch {folder.halt}") from None
    if status["state"] != "running":
        raise ValueError(f"{folder.path} is {status['state']} at step {status['step']}; nothing to halt")
    return False
