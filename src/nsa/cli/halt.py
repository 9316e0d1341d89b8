"""`nsa halt RUN [REASON ...]`: ask a run to stop after its current step, with a checkpoint."""

from __future__ import annotations

import sys
from collections.abc import Sequence
from pathlib import Path

from nsa.cli import EXIT_DONE, EXIT_USAGE, fail
from nsa.runs.folder import RunFolder
from nsa.runs.halt import ask_to_halt

USAGE = "usage: nsa halt RUN [REASON ...]; RUN is the folder of a run, such as runs/NAME"


def main(arguments: Sequence[str]) -> int:
    """Run the command and return its exit code."""
    if not arguments or arguments[0].startswith("-"):
        asked = bool(arguments) and arguments[0] in ("-h", "--help")
        print(USAGE, file=sys.stdout if asked else sys.stderr)
        return EXIT_DONE if asked else EXIT_USAGE
    folder = RunFolder(Path(arguments[0]))
    try:
        running = is_running(folder)
        ask_to_halt(folder.halt, " ".join(arguments[1:]))
    except (ValueError, OSError) as error:
        return fail("halt", error)
    if running:
        print(f"wrote {folder.halt}; the run stops after its current step with a checkpoint")
    else:
        print(
            f"wrote {folder.halt}, but no process on this machine trains in {folder.path}: it stops one on another "
            f"machine; if the run was killed, nothing is left to stop, and `nsa resume {folder.path}` goes on"
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
