"""`nsa doctor [--json]`: whether this machine can train and run models, and what it has."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import tyro

from nsa.cli import EXIT_DONE, EXIT_USAGE, fail
from nsa.train.doctor import HUB_TIMEOUT_S, diagnose


@dataclass(frozen=True)
class DoctorArguments:
    """Versions, devices, kernels, disk, memory, processes and the Hub. Exit code 0: usable; 2: not, and why."""

    json: tyro.conf.FlagCreatePairsOff[bool] = False
    """Print JSON instead of text."""
    folder: Path = Path(".")
    """Where runs would be written; its disk is looked at."""
    hub_timeout_s: float = HUB_TIMEOUT_S
    """Seconds that the Hugging Face Hub may take to answer."""


def main(arguments: Sequence[str]) -> int:
    """Run the command and return its exit code."""
    given = tyro.cli(DoctorArguments, prog="nsa doctor", args=list(arguments), use_underscores=True)
    if not given.folder.is_dir():
        return fail("doctor", ValueError(f"there is no folder {given.folder}"))
    diagnosis = diagnose(given.folder, hub_timeout_s=given.hub_timeout_s)
    print(diagnosis.json() if given.json else diagnosis.text())
    return EXIT_USAGE if diagnosis.problems else EXIT_DONE
