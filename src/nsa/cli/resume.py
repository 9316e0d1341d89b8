"""`nsa resume RUN [--section.key value ...]`: go on with a run from its newest whole checkpoint."""

from __future__ import annotations

import sys
from collections.abc import Sequence
from pathlib import Path

from nsa.cli import EXIT_DONE, EXIT_USAGE
from nsa.cli.train import run_training
from nsa.train.resume import ALLOWED, ALLOWED_SECTIONS, prepare_resume, resumed_config

USAGE = "usage: nsa resume RUN [--section.key value ...]; RUN is the folder of a run, such as runs/NAME"


def main(arguments: Sequence[str]) -> int:
    """Run the command and return its exit code."""
    if arguments and arguments[0] in ("-h", "--help"):
        print(f"{USAGE}\n\n{explanation()}")
        return EXIT_DONE
    if not arguments or arguments[0].startswith("-"):
        print(USAGE, file=sys.stderr)
        return EXIT_USAGE
    run, *overrides = arguments
    return run_training(
        "resume",
        lambda: resumed_config(Path(run), overrides)[1],
        lambda config, parallel: prepare_resume(Path(run), overrides, ["nsa", "resume", *arguments], parallel),
        resumed=True,
    )


def explanation() -> str:
    """What is continued, and which keys may be changed."""
    return (
        "The run goes on in its folder from the newest checkpoint whose every file is as it was written; steps after\n"
        "it are done again. Its stored config is used. These keys may be changed:\n"
        + "\n".join(f"  --{name}" for name in sorted(ALLOWED))
        + f"\nand all of the sections {', '.join(ALLOWED_SECTIONS)}."
    )
