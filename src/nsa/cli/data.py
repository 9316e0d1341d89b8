"""`nsa data check CONFIG`: run the loader of a config alone, and say what comes out of it and how fast."""

from __future__ import annotations

import argparse
import json
import sys
from collections.abc import Sequence
from dataclasses import asdict

from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeRemainingColumn

from nsa.cli import EXIT_DONE, EXIT_USAGE, fail
from nsa.data.check import DataCheck, check_data
from nsa.train.config import RunConfig
from nsa.train.load_config import load_config

PROG = "nsa data check CONFIG"


def main(arguments: Sequence[str]) -> int:
    """Run the command and return its exit code."""
    parser = _parser()
    if arguments and arguments[0] not in ("check", "-h", "--help"):
        print(f"nsa data: unknown action {arguments[0]!r}; there is `{PROG}`", file=sys.stderr)
        return EXIT_USAGE
    if len(arguments) < 2 and not (arguments and arguments[0] in ("-h", "--help")):
        parser.print_usage(sys.stderr)
        return EXIT_USAGE
    given, overrides = parser.parse_known_args(arguments)
    if given.batches < 1:
        return fail("data check", ValueError(f"--batches must be at least 1, not {given.batches}"))
    try:
        config = load_config(given.config, overrides, prog=PROG)
        result = _check(config, given.batches)
    except (ValueError, OSError) as error:
        return fail("data check", error)
    print(json.dumps(asdict(result), indent=2, ensure_ascii=False) if given.json else _table(result))
    return EXIT_DONE


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(
        prog="nsa data",
        description="Open source, tokenizer and held-out documents of a run as the run would, take batches as fast as "
        "they come, and report speed, waits and contents. Nothing is written.",
        epilog="Exit codes: 0 done, 2 the config or the data cannot be used.",
        usage="nsa data check CONFIG [--batches N] [--json] [--section.key value ...]",
        allow_abbrev=False,
    )
    parser.add_argument("action", choices=["check"], help="what to do")
    parser.add_argument("config", help="a YAML file, as for nsa train; --section.key value overrides it")
    parser.add_argument("--batches", type=int, default=200, help="batches to time, behind the first (default 200)")
    parser.add_argument("--json", action="store_true", help="print one JSON object instead of a table")
    return parser


def _check(config: RunConfig, num_batches: int) -> DataCheck:
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
    return "\n".join(f"{name:<12} {text}" for name, text in lines.items())
