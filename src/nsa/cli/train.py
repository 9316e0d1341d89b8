"""`nsa train CONFIG [--section.key value ...]`: train from a YAML config with overrides on top of it."""

from __future__ import annotations

import sys
from collections.abc import Callable, Sequence
from contextlib import ExitStack
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING

import tyro

from nsa.cli import EXIT_DONE, EXIT_FAILED, EXIT_STOPPED, explained, fail
from nsa.cli.arguments import asks_for_help, parse_with_overrides, show_help
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


@dataclass(frozen=True)
class TrainArguments:
    """Train a model; every key of the config may follow."""

    config: tyro.conf.Positional[str]
    """A YAML file, or the name of a config of the package."""


def main(arguments: Sequence[str]) -> int:
    """Run the command and return its exit code."""
    if asks_for_help(arguments):
        show_help(RunConfig, "train CONFIG")
    given, overrides = parse_with_overrides(TrainArguments, "train", arguments)
    try:
        config = _read(given.config, overrides)
    except (ValueError, OSError) as error:
        return fail("train", error)

    def begin(parallel: Parallel) -> tuple[Trainer, RunFolder]:
        from nsa.launch.start import prepare

        if parallel.is_main:
            print(dump_config(config))
        return prepare(config, ["nsa", "train", *arguments], parallel)

    return run_training("train", config, begin)


def _read(path: str, overrides: Sequence[str]) -> RunConfig:
    config = load_config(path, overrides)
    # `prepare` looks again at both; here torch is not yet imported.
    check_unused(Path(config.run.folder) / config.run.name)
    for data in (config.data, *config.data.mix):
        check_present(data.paths)
    return config


def run_training(command: str, config: RunConfig, begin: Callable[[Parallel], tuple[Trainer, RunFolder]]) -> int:
    """Train as one of the processes that torchrun started, or as the only one, and return the exit code.

    Args:
        command: its name in messages.
        config: of the run.
        begin: builds everything; what it refuses is bad input.
    """
    try:
        # An error must leave this block as one: the other ranks may be waiting where this one will not come.
        with lasting_output(), ExitStack() as stack:
            trainer, folder = _begin(config, begin, stack)

            from nsa.train.loop import train

            outcome = train(trainer, folder)
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
    config: RunConfig, begin: Callable[[Parallel], tuple[Trainer, RunFolder]], stack: ExitStack
) -> tuple[Trainer, RunFolder]:
    """Join the other processes and build everything; the processes part again when `stack` closes."""
    try:
        from transformers.utils import logging

        from nsa.train.parallel import setup_parallel

        logging.disable_progress_bar()
        options = {"timeout_s": config.train.collective_timeout_s}
        parallel = stack.enter_context(setup_parallel(config.run.device, config.train.parallel, **options))
        return begin(parallel)
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
        parts += [f"resume with: nsa resume {folder.path}"]
    return "\n".join(parts)
