"""`nsa train CONFIG [--section.key value ...]`: train from a YAML config with overrides on top of it."""

from __future__ import annotations

import sys
from collections.abc import Sequence

from transformers.utils import logging

from nsa.cli import EXIT_DONE, EXIT_FAILED, EXIT_STOPPED, EXIT_USAGE, fail
from nsa.train.config import RunConfig
from nsa.train.guards import TrainingError
from nsa.train.load_config import dump_config, load_config, override_config
from nsa.train.observe.report import results
from nsa.train.run import Outcome, prepare, train

PROG = "nsa train CONFIG"


def main(arguments: Sequence[str]) -> int:
    """Run the command and return its exit code."""
    if arguments and arguments[0] in ("-h", "--help"):
        override_config(RunConfig(), ["--help"], prog=PROG)
    if not arguments or arguments[0].startswith("-"):
        print("usage: nsa train CONFIG [--section.key value ...]; CONFIG is a YAML file", file=sys.stderr)
        return EXIT_USAGE
    logging.disable_progress_bar()
    path, *overrides = arguments
    try:
        config = load_config(path, overrides, prog=PROG)
        print(dump_config(config))
        trainer, folder = prepare(config, command=["nsa", "train", *arguments])
    except (ValueError, OSError) as error:
        return fail("train", error)
    try:
        outcome = train(trainer, folder)
    except TrainingError as error:
        print(f"nsa train: failed: {error}", file=sys.stderr)
        return EXIT_FAILED
    print(closing(outcome))
    return EXIT_STOPPED if outcome.stopped_by else EXIT_DONE


def closing(outcome: Outcome) -> str:
    """The samples, the results and where everything lies."""
    folder = outcome.folder
    samples = [folder.samples / f"{name}.txt" for name in ("before", "after")]
    parts = [path.read_text(encoding="utf-8") for path in samples if path.is_file()]
    parts += ["\n".join(f"{name:<28} {text}" for name, text in results(outcome.metrics).items()), ""]
    ended = f"stopped by {outcome.stopped_by}" if outcome.stopped_by else "finished"
    parts += [f"{ended}; everything lies in {folder.path}: report.md, curves.png, training.csv, checkpoints/latest"]
    return "\n".join(parts)
