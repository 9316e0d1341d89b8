"""`nsa preflight CONFIG [--section.key value ...]`: what a run needs, and everything that is wrong with it."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Annotated

import tyro

from nsa.cli import EXIT_DONE, EXIT_USAGE, fail
from nsa.cli.arguments import parse_with_overrides
from nsa.config.options import OptionError
from nsa.terminal import printable


@dataclass(frozen=True)
class PreflightArguments:
    """Say what a run needs (parameters, memory, time, disk) and everything that is wrong with it, each with its remedy.
    Every --section.key of `nsa train` may follow.

    Exit code 0: the run may start; 2: an error stands in the way.
    """

    config: tyro.conf.Positional[str]
    """A YAML file, or the name of a config of the package."""
    for_: Annotated[str | None, tyro.conf.arg(name="for")] = None
    """Judge for a GPU of this name, or a part of it such as "h200", instead of this machine; a wrong one lists them."""
    world_size: int = 1
    """Processes that torchrun starts."""
    json: tyro.conf.FlagCreatePairsOff[bool] = False
    """Print JSON instead of text."""


def main(arguments: Sequence[str]) -> int:
    """Run the command and return its exit code: 0 ready, 2 refused."""
    given, overrides = parse_with_overrides(PreflightArguments, "preflight", arguments)
    if not 1 <= given.world_size <= 2**20:
        raise OptionError(f"--world_size must be from 1 to {2**20:,}, not {given.world_size}")
    try:
        from nsa.config.load import load_config

        config = load_config(given.config, overrides)

        from transformers.utils import logging

        from nsa.machine import machine_named
        from nsa.preflight.examine import examine

        logging.disable_progress_bar()
        machine = None if given.for_ is None else machine_named(given.for_)
        report = examine(config, machine=machine, world_size=given.world_size)
    except (ValueError, OSError) as error:
        return fail("preflight", error)
    print(report.json() if given.json else printable(report.text()))
    return EXIT_USAGE if report.refused_by else EXIT_DONE
