"""`nsa preflight CONFIG [--section.key value ...]`: what a run needs, and everything that is wrong with it."""

from __future__ import annotations

import argparse
from collections.abc import Sequence

from transformers.utils import logging

from nsa.cli import EXIT_DONE, EXIT_USAGE, fail
from nsa.train.load_config import load_config
from nsa.train.preflight.machine import GPUS, machine_named
from nsa.train.preflight.report import examine

PROG = "nsa preflight CONFIG"


def main(arguments: Sequence[str]) -> int:
    """Run the command and return its exit code: 0 ready, 2 refused."""
    given, overrides = _parser().parse_known_args(list(arguments))
    logging.disable_progress_bar()
    try:
        machine = None if given.machine is None else machine_named(given.machine)
        config = load_config(given.config, overrides, prog=PROG)
        report = examine(config, machine=machine, world_size=given.world_size)
    except (ValueError, OSError) as error:
        return fail("preflight", error)
    print(report.json() if given.json else report.text())
    return EXIT_USAGE if report.refused_by else EXIT_DONE


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(
        prog="nsa preflight",
        usage="nsa preflight CONFIG [--for GPU] [--world_size N] [--json] [--section.key value ...]",
        description="Say what a run needs (parameters, memory, time, disk) and everything that is wrong with it, each "
        "with its remedy. Exit code 0: it may start; 2: an error stands in the way.",
        epilog="Other options are those of `nsa train CONFIG`, on top of the config.",
        allow_abbrev=False,
    )
    parser.add_argument("config", metavar="CONFIG", help="YAML config of the run")
    parser.add_argument(
        "--for",
        dest="machine",
        metavar="GPU",
        help=f"judge for such a GPU instead of this machine; a part of one of the names: {', '.join(GPUS)}",
    )
    parser.add_argument("--world_size", type=_positive, default=1, metavar="N", help="processes that torchrun starts")
    parser.add_argument("--json", action="store_true", help="print JSON instead of text")
    return parser


def _positive(text: str) -> int:
    number = int(text)
    if number < 1:
        raise argparse.ArgumentTypeError(f"must be at least 1, not {number}")
    return number
