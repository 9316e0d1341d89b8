"""A run in words before it starts, and in numbers when it has ended."""

from __future__ import annotations

import math
import time
from dataclasses import asdict
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch

from nsa.runs.tables import FINAL_LOSSES
from nsa.train.model import training_route

if TYPE_CHECKING:
    from nsa.train.trainer import Trainer


def describe(trainer: Trainer) -> str:
    """What is about to run, in a few lines."""
    config = trainer.config
    route = training_route(config, trainer.device)
    attention = "no NSA layer" if route is None else f"NSA by {route.backend} ({route.reason})"
    total = config.train.steps * config.train.batch_tokens
    lines = {
        "run": Path(config.run.folder) / config.run.name,
        "model": f"{trainer.model.num_parameters():,} parameters, {config.model.num_hidden_layers} layers "
        f"({', '.join(config.model.layer_types)}), {config.train.precision}",
        "device": f"{trainer.device}, {torch.get_num_threads()} threads; {attention}",
        "data": f"{trainer.corpus.description}; {_documents(trainer)}; tokenizer "
        f"{trainer.tokenizer.name}, vocabulary {trainer.tokenizer.vocab_size}",
        "steps": f"{config.train.steps} of {config.train.batch_tokens:,} tokens "
        f"({config.num_micro_batches} x {config.train.micro_batch_rows} rows of "
        f"{config.train.sequence_length}), {total:,} in all",
    }
    if config.train.fitted:
        lines["time"] = config.train.fitted
    return "\n".join(f"{name:<7} {text}" for name, text in lines.items())


def _documents(trainer: Trainer) -> str:
    """How many documents are trained and evaluated on."""
    held_out = trainer.held_out
    total = trainer.corpus.num_documents
    if trainer.loader.num_documents is not None:
        training = f"{trainer.loader.num_documents:,} documents to train on"
    else:
        training = "documents without end" if total is None else f"{total:,} documents, read during the run"
    return f"{training}, {len(held_out.document_names):,} to evaluate on ({held_out.num_labels:,} tokens)"


def data_index(trainer: Trainer) -> dict[str, Any]:
    """What is trained and evaluated on, for `data_index.json`."""
    return {
        **trainer.corpus.index(),
        "stream_fingerprint": trainer.loader.fingerprint,
        "tokenizer": trainer.tokenizer.name,
        "num_training_documents": trainer.loader.num_documents,
        "held_out_documents": list(trainer.held_out.document_names),
        "num_held_out_tokens": trainer.held_out.num_labels,
        "num_held_out_bytes": trainer.held_out.num_bytes,
    }


def final_metrics(trainer: Trainer, stopped_by: str | None) -> dict[str, Any]:
    """The run in numbers, for `metrics.json` and the report."""
    first, last = trainer.evaluations[0], trainer.evaluations[-1]
    tail = trainer.losses[-FINAL_LOSSES:]
    return {
        "step": trainer.step,
        "tokens": trainer.tokens,
        "stopped_by": stopped_by,
        "data": trainer.corpus.description,
        "data_replaced_because": trainer.corpus.replaced_because,
        "num_parameters": trainer.model.num_parameters(),
        "vocab_size": trainer.tokenizer.vocab_size,
        "log_vocab_size": math.log(trainer.tokenizer.vocab_size),
        "untrained_val_loss": first.val_loss,
        "train_loss": sum(tail) / len(tail) if tail else None,
        "val_step": last.step,
        **{name: value for name, value in asdict(last).items() if name != "step"},
        "best_val_loss": min(record.val_loss for record in trainer.evaluations),
        "num_skipped_steps": trainer.guard.num_skipped,
        "train_s": trainer.train_s,
        "wall_s": time.perf_counter() - trainer.start_s,
        "tokens_per_s": trainer.tokens / trainer.train_s if trainer.train_s else None,
    }
