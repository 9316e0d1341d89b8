"""`nsa doctor [--json]`: whether this machine can train and run models, and what it has."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import tyro

from nsa.cli import EXIT_DONE, EXIT_USAGE
from nsa.cli.arguments import parse
from nsa.config.options import OptionError


@dataclass(frozen=True)
class DoctorArguments:
    """Versions, devices, kernels, disk, memory, processes and the Hub. Exit code 0: usable; 2: not, and why."""

    json: tyro.conf.FlagCreatePairsOff[bool] = False
    """Print JSON instead of text."""
    folder: Path = Path(".")
    """Where runs would be written; its disk is looked at."""
    hub_timeout_s: float = 3.0
    """Seconds that the Hugging Face Hub may take to answer."""


def main(arguments: Sequence[str]) -> int:
    """Run the command and return its exit code."""
    given = parse(DoctorArguments, "doctor", arguments)
    if not given.folder.is_dir():
        raise OptionError(f"there is no folder {given.folder}; give an existing one with --folder")
    if not 0 < given.hub_timeout_s <= 3600:
        raise OptionError(f"--hub_timeout_s must be above 0 and at most 3600, not {given.hub_timeout_s:g}")

    from nsa.preflight.doctor import diagnose  # takes seconds

    diagnosis = diagnose(given.folder, hub_timeout_s=given.hub_timeout_s)
    print(diagnosis.json() if given.json else diagnosis.text())
    return EXIT_USAGE if diagnosis.problems else EXIT_DONE
