"""`nsa train CONFIG [--section.key value ...]`: train from a YAML config with overrides on top of it."""

from __future__ import annotations

import sys
from collections.abc import Callable, Sequence
from contextlib import ExitStack

from transformers.utils import logging

from nsa.cli import EXIT_DONE, EXIT_FAILED, EXIT_STOPPED, EXIT_USAGE, fail
from nsa.data.errors import DataError
from nsa.train.checkpoint import CheckpointError
from nsa.train.config import RunConfig
from nsa.train.guards import TrainingError
from nsa.train.load_config import dump_config, load_config, override_config
from nsa.train.observe.report import results
from nsa.train.parallel import Parallel, setup_parallel
from nsa.train.run import Outcome, prepare, train
from nsa.train.run_folder import RunFolder
from nsa.train.trainer import Trainer

PROG = "nsa train CONFIG"


def main(arguments: Sequence[str]) -> int:
    """Run the command and return its exit code."""
    if arguments and arguments[0] in ("-h", "--help"):
        override_config(RunConfig(), ["--help"], prog=PROG)
    if not arguments or arguments[0].startswith("-"):
        print("usage: nsa train CONFIG [--section.key value ...]; CONFIG is a YAML file", file=sys.stderr)
        return EXIT_USAGE
    path, *overrides = arguments

    def begin(config: RunConfig, parallel: Parallel) -> tuple[Trainer, RunFolder]:
        if parallel.is_main:
            print(dump_config(config))
        return prepare(config, ["nsa", "train", *arguments], parallel)

    return run_training("train", lambda: load_config(path, overrides, prog=PROG), begin)


def run_training(
    command: str,
    read: Callable[[], RunConfig],
    begin: Callable[[RunConfig, Parallel], tuple[Trainer, RunFolder]],
    *,
    resumed: bool = False,
) -> int:
    """Train as one of the processes that torchrun started, or as the only one, and return the exit code.

    Args:
        command: its name in messages.
        read: gives the config.
        begin: builds everything; what it refuses is bad input.
        resumed: the run folder has a beginning already.
    """
    logging.disable_progress_bar()
    try:
        # An error must leave this block as one: the other ranks may be waiting where this one will not come.
        with ExitStack() as stack:
            trainer, folder = _begin(read, begin, stack)
            outcome = train(trainer, folder, resumed=resumed)
            if trainer.parallel.is_main:
                print(closing(outcome))
    except BadInputError as error:
        return fail(command, error)
    except (TrainingError, DataError, OSError) as error:
        print("\n  ".join([f"nsa {command}: failed: {error}", *getattr(error, "__notes__", [])]), file=sys.stderr)
        return EXIT_FAILED
    return EXIT_STOPPED if outcome.stopped_by else EXIT_DONE


class BadInputError(Exception):
    """What stands in the way of a run before it begins."""


def _begin(
    read: Callable[[], RunConfig],
    begin: Callable[[RunConfig, Parallel], tuple[Trainer, RunFolder]],
    stack: ExitStack,
) -> tuple[Trainer, RunFolder]:
    """Join the other processes and build everything; the processes part again when `stack` closes."""
    try:
        config = read()
        options = {"timeout_s": config.train.collective_timeout_s}
        parallel = stack.enter_context(setup_parallel(config.run.device, config.train.parallel, **options))
        return begin(config, parallel)
    except (ValueError, OSError, CheckpointError) as error:
        raise BadInputError(str(error)) from error


def closing(outcome: Outcome) -> str:
    """The samples, the results and where everything lies."""
    folder = outcome.folder
    samples = [folder.samples / f"{name}.txt" for name in ("before", "after")]
    parts = [path.read_text(encoding="utf-8") for path in samples if path.is_file()]
    parts += ["\n".join(f"{name:<28} {text}" for name, text in results(outcome.metrics).items()), ""]
    ended = f"stopped by {outcome.stopped_by}" if outcome.stopped_by else "finished"
    parts += [f"{ended}; everything lies in {folder.path}: report.html, report.md, training.csv, checkpoints/latest"]
    if outcome.stopped_by:
        parts += [f"go on with: nsa resume {folder.path}"]
    return "\n".join(parts)
