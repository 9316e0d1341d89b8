"""`nsa halt RUN [REASON ...]`: ask a run to stop after its current step, with a checkpoint."""

from __future__ import annotations

import sys
from collections.abc import Sequence
from pathlib import Path

from nsa.cli import EXIT_DONE, EXIT_USAGE, fail
from nsa.train.run_folder import RunFolder
from nsa.train.stop import ask_to_halt

USAGE = "usage: nsa halt RUN [REASON ...]; RUN is the folder of a run, such as runs/NAME"


def main(arguments: Sequence[str]) -> int:
    """Run the command and return its exit code."""
    if not arguments or arguments[0].startswith("-"):
        asked = bool(arguments) and arguments[0] in ("-h", "--help")
        print(USAGE, file=sys.stdout if asked else sys.stderr)
        return EXIT_DONE if asked else EXIT_USAGE
    folder = RunFolder(Path(arguments[0]))
    if not folder.status_json.is_file():
        return fail("halt", ValueError(f"{folder.path} is no run folder: it holds no status.json"))
    try:
        status = folder.read_status()
    except ValueError as error:
        return fail("halt", ValueError(f"{error}; to stop it all the same: touch {folder.halt}"))
    if status["state"] != "running":
        return fail("halt", ValueError(f"{folder.path} is {status['state']} at step {status['step']}; nothing to halt"))
    ask_to_halt(folder.halt, " ".join(arguments[1:]))
    print(f"wrote {folder.halt}; the run stops after its current step with a checkpoint")
    return EXIT_DONE
