"""Training benchmark: whole optimizer steps of a small model, NSA against dense, in tokens per second.

    nsa bench train --out benchmarks/results/train_cpu.csv

A step is `Trainer.train_step`: fetch a batch of real text, forward, loss, backward, clip, guard, AdamW. The default is
the one-layer toy: width 128, 8 heads in 2 groups, 8 rows of 128 tokens, blocks 16/8/32, 8 selected, window 64, fp32.
The two models take turns, so that a busy machine slows both alike.

CSV columns: `attention`, `num_parameters`, `tokens` of a step, `step_ms` (median), `tokens_per_s` from that median.
"""

from __future__ import annotations

import statistics
from dataclasses import dataclass

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
    if bench.repeats < 1:
        raise ValueError(f"repeats must be at least 1, not {bench.repeats}")
    trainers = {name: Trainer(_config(bench, name)) for name in ("nsa", "full_attention")}
    step_s: dict[str, list[float]] = {name: [] for name in trainers}
    for _ in range(bench.warmup + bench.repeats):
        for name, trainer in trainers.items():
            step_s[name].append(trainer.train_step()[0].step_s)
    return [_row(name, trainer, statistics.median(step_s[name][bench.warmup :])) for name, trainer in trainers.items()]


def _row(name: str, trainer: Trainer, median_s: float) -> TrainRow:
    tokens = trainer.config.train.batch_tokens
    return TrainRow(name, trainer.model.num_parameters(), tokens, 1000 * median_s, tokens / median_s)


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
