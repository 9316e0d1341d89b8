"""`nsa resume RUN [--section.key value ...]`: resume a run from its newest whole checkpoint."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING

import tyro

from nsa.cli import fail
from nsa.cli.arguments import parse_with_overrides
from nsa.cli.train import run_training
from nsa.config.resume_keys import ALLOWED, ALLOWED_SECTIONS

# What needs torch is imported when the config is known to be right.
if TYPE_CHECKING:
    from nsa.runs.folder import RunFolder
    from nsa.train.parallel import Parallel
    from nsa.train.trainer import Trainer


@dataclass(frozen=True)
class ResumeArguments:
    __doc__ = f"""Resume a run from its newest checkpoint whose every file is as it was written.

    The steps after it are done again, with the run's stored config. These keys may be changed:
    {", ".join(f"--{name}" for name in sorted(ALLOWED))}, and all of the sections {", ".join(ALLOWED_SECTIONS)}.
    """

    run: tyro.conf.Positional[Path]
    """The folder of the run, such as runs/NAME."""


def main(arguments: Sequence[str]) -> int:
    """Run the command and return its exit code."""
    given, overrides = parse_with_overrides(ResumeArguments, "resume", arguments)
    from nsa.launch.resume_config import resumed_config  # not for --help

    try:
        stored = resumed_config(given.run, overrides)
    except (ValueError, OSError) as error:
        return fail("resume", error)

    def begin(parallel: Parallel) -> tuple[Trainer, RunFolder]:
        from nsa.launch.resume import prepare_resume

        return prepare_resume(stored, ["nsa", "resume", *arguments], parallel)

    return run_training("resume", stored.wanted, begin)
