"""`nsa data check CONFIG`: run the loader of a config alone, and say what comes out of it and how fast."""

from __future__ import annotations

import json
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from typing import TYPE_CHECKING, Literal

import tyro

from nsa.cli import EXIT_DONE, fail
from nsa.cli.arguments import asks_for_help, parse_with_overrides
from nsa.config.options import OptionError
from nsa.terminal import printable

if TYPE_CHECKING:
    from nsa.config.run import RunConfig
    from nsa.data.check import DataCheck


@dataclass(frozen=True)
class DataArguments:
    """Open source, tokenizer and held-out documents of a run as the run would, take batches as fast as they come, and
    report speed, waits and contents. Nothing is written. Every --section.key of `nsa train` may follow.

    Exit code 0: done; 2: the config or the data cannot be used.
    """

    action: tyro.conf.Positional[Literal["check"]]
    """What to do."""
    config: tyro.conf.Positional[str]
    """A YAML file, or the name of a config of the package."""
    batches: int = 200
    """Batches to time, behind the first."""
    json: tyro.conf.FlagCreatePairsOff[bool] = False
    """Print one JSON object instead of a table."""


def main(arguments: Sequence[str]) -> int:
    """Run the command and return its exit code."""
    if arguments and arguments[0] != "check" and not asks_for_help(arguments):
        raise OptionError(f"unknown action {arguments[0][:60]!r}; there is `nsa data check CONFIG`")
    given, overrides = parse_with_overrides(DataArguments, "data", arguments)
    if not 1 <= given.batches <= 10**9:
        raise OptionError(f"--batches must be from 1 to {10**9:,}, not {given.batches}")
    try:
        from nsa.config.load import load_config

        result = _check(load_config(given.config, overrides), given.batches)
    except (ValueError, OSError) as error:
        return fail("data check", error)
    print(json.dumps(asdict(result), indent=2, ensure_ascii=False) if given.json else _table(result))
    return EXIT_DONE


def _check(config: RunConfig, num_batches: int) -> DataCheck:
    from rich.console import Console
    from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeRemainingColumn

    from nsa.data.check import check_data

    columns = TextColumn("{task.description}"), BarColumn(), MofNCompleteColumn(), TimeRemainingColumn()
    with Progress(*columns, console=Console(stderr=True), transient=True) as progress:
        task = progress.add_task("opening, first window", total=num_batches)

        def advance(done: int) -> None:
            progress.update(task, completed=done, description="batches")

        return check_data(
            config.data,
            sequence_length=config.train.sequence_length,
            rows_per_batch=config.train.micro_batch_rows,
            seed=config.run.seed,
            num_batches=num_batches,
            advance=advance,
        )


def _table(result: DataCheck) -> str:
    """The result for people."""
    index = result.index
    total = "without end" if index["num_documents"] is None else f"{index['num_documents']:,}"
    training = result.num_training_documents
    epoch = "not known before one is over" if result.epoch_tokens is None else f"{result.epoch_tokens:,} tokens"
    size_bytes = sum(file["size_bytes"] for file in index["files"])
    lines = {
        "source": index["description"],
        "files": f"{len(index['files'])}, {size_bytes / 1e6:,.1f} MB; {index['read']}",
        "fingerprint": index["fingerprint"],
        "tokenizer": f"{result.tokenizer}, vocabulary {result.vocab_size:,}",
        "documents": total + (f", {training:,} to train on" if training is not None else ""),
        "held out": f"{index['held_out_rule']}; evaluation has {result.num_heldout_documents:,} documents, "
        f"{result.num_heldout_tokens:,} tokens",
        "epoch": epoch,
        "opening": f"{result.open_s:.2f} s, then {result.first_batch_s:.2f} s to the first batch",
        "timed": f"{result.num_batches:,} batches, {result.tokens:,} tokens in {result.wall_s:.2f} s; "
        f"{result.epochs} whole epochs, {result.num_documents_seen:,} documents",
        "tokens/s": f"{result.tokens_per_s:,.0f} sustained: windows {result.window_tokens_per_s:,.0f}, batches from "
        f"them {result.batch_tokens_per_s:,.0f}",
        "fetch": f"p50 {result.fetch_p50_ms:.2f}, p95 {result.fetch_p95_ms:.2f}, max {result.fetch_max_ms:.2f} ms",
        "padding": f"{result.padding_share:.4%} of the positions; {result.pieces_per_row:.2f} pieces in a row",
        "machine": f"{result.num_cpus} CPUs, load {result.load_1min:.2f} at the start",
    }
    return printable("\n".join(f"{name:<12} {text}" for name, text in lines.items()))
