"""Training benchmark: whole optimizer steps of a small model, NSA against dense, in tokens per second.

    nsa bench train --out benchmarks/results/train_cpu.csv

A step is `Trainer.train_step`: fetch a batch of real text, forward, loss, backward, clip, guard, AdamW. The default is
the one-layer toy: width 128, 8 heads in 2 groups, 8 rows of 128 tokens, blocks 16/8/32, 8 selected, window 64, fp32.
The two models take turns, so that a busy machine slows both alike.

CSV columns: `attention`, `num_parameters`, `tokens` of a step, `step_ms` (median), `tokens_per_s` from that median.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch

from nsa.bench.protocol import median_ms
from nsa.train.config import RunConfig
from nsa.train.trainer import Trainer


@dataclass(frozen=True)
class TrainBench:
    """What to measure: the sizes of the model and the batch, and how often."""

    num_hidden_layers: int = 1
    """Decoder layers."""
    hidden_size: int = 128
    """Width of the model."""
    num_attention_heads: int = 8
    """Query heads."""
    num_key_value_heads: int = 2
    """Key/value heads."""
    sequence_length: int = 128
    """Tokens in a row."""
    rows: int = 8
    """Rows of a step."""
    geometry: tuple[int, int, int, int, int] = (16, 8, 32, 8, 64)
    """compress_block_size, compress_stride, select_block_size, num_selected_blocks, window_size."""
    backend: str = "auto"
    """Implementation of the NSA operator."""
    warmup: int = 5
    """Steps of each model before the clock counts."""
    repeats: int = 50
    """Steps of each model that count."""
    device: str = "cpu"
    """Where to run."""


@dataclass(frozen=True)
class TrainRow:
    """One line of the CSV; its fields are the columns."""

    attention: str
    num_parameters: int
    tokens: int
    step_ms: float
    tokens_per_s: float


def measure_train(bench: TrainBench) -> list[TrainRow]:
    """Run the benchmark, a row for each kind of attention.

    Raises:
        ValueError: a size does not fit.
    """
    trainers = {name: Trainer(_config(bench, name)) for name in ("nsa", "full_attention")}
    candidates = {name: {"step": trainer.train_step} for name, trainer in trainers.items()}
    ms = median_ms(candidates, torch.device(bench.device), bench.warmup, bench.repeats)
    return [_row(name, trainer, ms[f"{name}_step"]) for name, trainer in trainers.items()]


def _row(name: str, trainer: Trainer, step_ms: float) -> TrainRow:
    tokens = trainer.config.train.batch_tokens
    return TrainRow(name, trainer.model.num_parameters(), tokens, step_ms, 1000 * tokens / step_ms)


def _config(bench: TrainBench, layer_type: str) -> RunConfig:
    names = ("compress_block_size", "compress_stride", "select_block_size", "num_selected_blocks", "window_size")
    model = {
        "hidden_size": bench.hidden_size,
        "intermediate_size": 11 * bench.hidden_size // 4,
        "num_hidden_layers": bench.num_hidden_layers,
        "num_attention_heads": bench.num_attention_heads,
        "num_key_value_heads": bench.num_key_value_heads,
        "layer_types": (layer_type,),
        "attention_backend": bench.backend,
        **dict(zip(names, bench.geometry, strict=True)),
    }
    train = {
        "sequence_length": bench.sequence_length,
        "batch_tokens": bench.rows * bench.sequence_length,
        "micro_batch_rows": bench.rows,
        "steps": bench.warmup + bench.repeats,
    }
    return RunConfig.model_validate({"model": model, "train": train, "run": {"device": bench.device}})
