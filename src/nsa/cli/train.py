"""`nsa train CONFIG [--section.key value ...]`: train from a YAML config with overrides on top of it."""

from __future__ import annotations

import sys
from collections.abc import Callable, Sequence
from contextlib import ExitStack
from pathlib import Path
from typing import TYPE_CHECKING

from nsa.cli import EXIT_DONE, EXIT_FAILED, EXIT_STOPPED, EXIT_USAGE, explained, fail
from nsa.cli.arguments import asks_for_help, show_help
from nsa.config.load import dump_config, load_config
from nsa.config.run import RunConfig
from nsa.data.errors import DataError
from nsa.data.sources.files import check_present
from nsa.runs.errors import CheckpointError, TrainingError
from nsa.runs.folder import RunFolder, check_unused
from nsa.terminal import printable, redacted
from nsa.train.telemetry.output import lasting_output

# What needs torch is imported behind the config, so that a mistake in it is told at once.
if TYPE_CHECKING:
    from nsa.train.loop import Outcome
    from nsa.train.parallel import Parallel
    from nsa.train.trainer import Trainer


def main(arguments: Sequence[str]) -> int:
    """Run the command and return its exit code."""
    if asks_for_help(arguments):
        show_help(RunConfig, "train CONFIG")
    if not arguments or arguments[0].startswith("-"):
        print("usage: nsa train CONFIG [--section.key value ...]; CONFIG is a YAML file", file=sys.stderr)
        return EXIT_USAGE
    path, *overrides = arguments

    def begin(config: RunConfig, parallel: Parallel) -> tuple[Trainer, RunFolder]:
        from nsa.launch.start import prepare

        if parallel.is_main:
            print(dump_config(config))
        return prepare(config, ["nsa", "train", *arguments], parallel)

    return run_training("train", lambda: _read(path, overrides), begin)


def _read(path: str, overrides: Sequence[str]) -> RunConfig:
    config = load_config(path, overrides)
    # `prepare` looks again at both; here torch is not yet imported.
    check_unused(Path(config.run.folder) / config.run.name)
    for data in (config.data, *config.data.mix):
        check_present(data.paths)
    return config


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
    try:
        # An error must leave this block as one: the other ranks may be waiting where this one will not come.
        with lasting_output(), ExitStack() as stack:
            trainer, folder = _begin(read, begin, stack)

            from nsa.train.loop import train

            outcome = train(trainer, folder, resumed=resumed)
            if trainer.parallel.is_main:
                print(printable(closing(outcome)))
    except BadInputError as error:
        return fail(command, error)
    except (TrainingError, DataError, OSError) as error:
        said = "\n  ".join([f"nsa {command}: failed: {error}", *getattr(error, "__notes__", [])])
        print(printable(redacted(said)), file=sys.stderr)
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

        from transformers.utils import logging

        from nsa.train.parallel import setup_parallel

        logging.disable_progress_bar()
        options = {"timeout_s": config.train.collective_timeout_s}
        parallel = stack.enter_context(setup_parallel(config.run.device, config.train.parallel, **options))
        return begin(config, parallel)
    except (ValueError, OSError, CheckpointError) as error:
        raise BadInputError(explained(error)) from error


def closing(outcome: Outcome) -> str:
    """The samples, the results and where everything lies."""
    from nsa.runs.report import results  # it takes torch, which is there by now

    folder = outcome.folder
    samples = [folder.samples / f"{name}.txt" for name in ("before", "after")]
    parts = [path.read_text(encoding="utf-8") for path in samples if path.is_file()]
    parts += ["\n".join(f"{name:<28} {text}" for name, text in results(outcome.metrics).items()), ""]
    ended = f"stopped by {outcome.stopped_by}" if outcome.stopped_by else "finished"
    parts += [f"{ended}; everything lies in {folder.path}: report.html, report.md, training.csv, checkpoints/latest"]
    if outcome.stopped_by:
        parts += [f"go on with: nsa resume {folder.path}"]
    return "\n".join(parts)
