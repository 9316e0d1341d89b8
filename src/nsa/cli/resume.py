"""`nsa resume RUN [--section.key value ...]`: go on with a run from its newest whole checkpoint."""

from __future__ import annotations

import sys
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING

from nsa.cli import EXIT_DONE, EXIT_USAGE, fail
from nsa.cli.arguments import asks_for_help
from nsa.cli.train import run_training
from nsa.config.load import ConfigError, read_overrides
from nsa.config.options import OptionError
from nsa.config.resume_keys import ALLOWED, ALLOWED_SECTIONS

if TYPE_CHECKING:
    from nsa.config.run import RunConfig

USAGE = "usage: nsa resume RUN [--section.key value ...]; RUN is the folder of a run, such as runs/NAME"


def main(arguments: Sequence[str]) -> int:
    """Run the command and return its exit code."""
    if asks_for_help(arguments):
        print(f"{USAGE}\n\n{explanation()}")
        return EXIT_DONE
    if not arguments or arguments[0].startswith("-"):
        print(USAGE, file=sys.stderr)
        return EXIT_USAGE
    run, *overrides = arguments
    try:  # a slip is told before torch is imported
        read_overrides(overrides)
        is_folder = Path(run).is_dir()
    except (ConfigError, OSError) as error:
        return fail("resume", error)
    if not is_folder:
        raise OptionError(f"{run} is no run folder; give the folder of a run, such as runs/NAME")

    from nsa.launch.resume import prepare_resume, resumed_config

    def read() -> RunConfig:
        return resumed_config(Path(run), overrides)[1]

    return run_training(
        "resume",
        read,
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
