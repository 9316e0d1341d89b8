"""Decode benchmark: time for one token of a small model at growing context, NSA against dense, and what is read.

    nsa bench decode --contexts 2048 32768 --out benchmarks/results/decode_cpu.csv

Both models are filled by a prefill of random tokens in chunks, go on from one context to the next, and decode random
tokens one at a time; times are medians. The stages are timed alone on one layer's cache and multiplied by the number of
layers, so that their sum stays below the total, which has the projections, the gates and the MLPs too.

CSV columns: `context` tokens; `total_ms` for a token; `cmp_ms`, `choose_ms`, `slc_ms`, `win_ms` of the branches and
the choice of blocks; `dense_ms` of the same model with dense attention; `reads_predicted` and `reads_done`, tokens that
each layer and group reads for one token.
"""

from __future__ import annotations

import copy
import statistics
import time
from collections.abc import Callable
from dataclasses import dataclass

import torch
from torch import Tensor
from transformers import DynamicCache

from nsa.cache import NSACache, Reads
from nsa.hf import NSACacheLayer, NSAConfig, NSAForCausalLM
from nsa.ops import decode
from nsa.ops.api import mean_pool


@dataclass(frozen=True)
class DecodeBench:
    """What to measure: the sizes of the model, the contexts, and how often."""

    contexts: tuple[int, ...] = (2048, 8192, 32768)
    """Tokens in the cache before the measured ones, ascending."""
    num_hidden_layers: int = 4
    """Decoder layers."""
    hidden_size: int = 256
    """Width of the model; its SwiGLU is 4 times as wide."""
    num_attention_heads: int = 8
    """Query heads."""
    num_key_value_heads: int = 2
    """Key/value heads."""
    batch: int = 1
    """Rows decoded together."""
    prefill_chunk: int = 2048
    """Tokens of one prefill pass."""
    warmup: int = 5
    """Tokens decoded before the clock runs."""
    repeats: int = 50
    """Tokens that are timed."""
    dense: bool = True
    """Measure the dense model too; its prefill takes most of the time at long contexts."""
    device: str = "cpu"
    """Where to run."""


@dataclass(frozen=True)
class DecodeRow:
    """One line of the CSV; its fields are the columns, nan where the dense model was not measured."""

    context: int
    total_ms: float
    cmp_ms: float
    choose_ms: float
    slc_ms: float
    win_ms: float
    dense_ms: float
    reads_predicted: int
    reads_done: int


def measure_decode(bench: DecodeBench) -> list[DecodeRow]:
    """Run the benchmark, one row for each context.

    Raises:
        ValueError: the contexts do not ascend from 1, or a size does not fit.
    """
    if not bench.contexts or list(bench.contexts) != sorted(set(bench.contexts)) or bench.contexts[0] < 1:
        raise ValueError(f"contexts must ascend from at least 1, not {list(bench.contexts)}")
    if min(bench.repeats, bench.prefill_chunk, bench.batch) < 1:
        raise ValueError("repeats, prefill_chunk and batch must be at least 1")
    with torch.no_grad():
        nsa = _Decoder(bench, "nsa")
        dense = _Decoder(bench, "full_attention") if bench.dense else None
        return [_measure(bench, context, nsa, dense) for context in bench.contexts]


class _Decoder:
    """A model with one kind of attention, its cache, and what can be asked of them."""

    def __init__(self, bench: DecodeBench, layer_type: str) -> None:
        torch.manual_seed(0)
        self.bench = bench
        config = NSAConfig(
            vocab_size=512,
            hidden_size=bench.hidden_size,
            intermediate_size=4 * bench.hidden_size,
            num_hidden_layers=bench.num_hidden_layers,
            num_attention_heads=bench.num_attention_heads,
            num_key_value_heads=bench.num_key_value_heads,
            layer_types=[layer_type] * bench.num_hidden_layers,
        )
        self.config, self.head_dim = config, bench.hidden_size // bench.num_attention_heads
        self.model = NSAForCausalLM(config).eval()
        self.model.to(torch.device(bench.device))  # pyright: ignore[reportArgumentType]
        self.cache = DynamicCache(config=config)

    def fill(self, context: int) -> None:
        """Prefill random tokens until the cache holds `context` of them, or leave it where it holds more already."""
        while (held := self.cache.get_seq_length()) < context:
            self._forward(min(self.bench.prefill_chunk, context - held))

    def step(self) -> None:
        """Decode one token."""
        self._forward(1)

    def stages(self) -> tuple[Reads, dict[str, Callable[[], object]]]:
        """What the last step read, and the stages of the next one on a copy of the first layer's cache."""
        layer = self.cache.layers[0]
        assert isinstance(layer, NSACacheLayer)
        assert isinstance(layer.state, NSACache)
        cache, geometry, bench = copy.deepcopy(layer.state), self.config.geometry, self.bench
        k, v = torch.randn(2, bench.batch, 1, bench.num_key_value_heads, self.head_dim, device=bench.device)

        def compress(k: Tensor, v: Tensor, rows: list[int], first: list[int]) -> tuple[Tensor, Tensor]:
            return mean_pool(k, geometry), mean_pool(v, geometry)

        view = cache.append((k, v), (k, v), (k, v), compress)
        group = bench.num_attention_heads // bench.num_key_value_heads
        q = torch.randn(bench.batch, bench.num_key_value_heads, group, self.head_dim, device=bench.device)
        last = torch.tensor(view.lengths, device=bench.device) - 1
        _, p_cmp = decode.compressed_step(q, view, geometry)
        blocks = decode.choose_step(p_cmp, last, max(view.lengths), geometry)
        return layer.state.reads, {
            "cmp_ms": lambda: decode.compressed_step(q, view, geometry),
            "choose_ms": lambda: decode.choose_step(p_cmp, last, max(view.lengths), geometry),
            "slc_ms": lambda: decode.selected_step(q, view, blocks, last, geometry),
            "win_ms": lambda: decode.window_step(q, view, geometry),
        }

    def _forward(self, length: int) -> None:
        ids = torch.randint(512, (self.bench.batch, length), device=self.bench.device)
        self.model(ids, past_key_values=self.cache, logits_to_keep=1)


def _measure(bench: DecodeBench, context: int, nsa: _Decoder, dense: _Decoder | None) -> DecodeRow:
    nsa.fill(context)
    total_ms = _median_ms(nsa.step, bench)
    reads, stages = nsa.stages()
    stage_ms = {name: _median_ms(stage, bench) * bench.num_hidden_layers for name, stage in stages.items()}
    dense_ms = float("nan")
    if dense is not None:
        dense.fill(context)
        dense_ms = _median_ms(dense.step, bench)
    predicted, done = (sum(tokens[0] for tokens in counts.values()) for counts in (reads.predicted, reads.done))
    return DecodeRow(context, total_ms, **stage_ms, dense_ms=dense_ms, reads_predicted=predicted, reads_done=done)


def _median_ms(run: Callable[[], object], bench: DecodeBench) -> float:
    times = []
    for _ in range(bench.warmup + bench.repeats):
        start = time.perf_counter()
        run()
        times.append(time.perf_counter() - start)
    return statistics.median(times[bench.warmup :]) * 1000
