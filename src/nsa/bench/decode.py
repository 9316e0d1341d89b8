"""Decode benchmark: time for one token of a small model at growing context, NSA against dense, and what is read.

    nsa bench decode --contexts 2048 32768 --out decode_cpu.csv

Both models are filled by a prefill of random tokens in chunks and then decode random tokens one at a time. Contexts and
models take turns, each on a cache of its own, so that a busy machine slows all alike. The stages are timed alone on one
layer's cache and multiplied by the number of layers; the total has the projections, the gates and the MLPs too.

CSV columns: `context` tokens; `total_ms` for a token; `cmp_ms`, `choose_ms`, `slc_ms`, `win_ms` of the branches and
the choice of blocks; `dense_ms` of the same model with dense attention; `reads_predicted` and `reads_done`, tokens that
each layer and group reads for one token.
"""

from __future__ import annotations

import copy
import math
from dataclasses import dataclass

import torch
from torch import Tensor
from transformers import DynamicCache

from nsa.bench.protocol import Steps, median_ms
from nsa.bench.settings import DecodeBench
from nsa.cache import NSACache
from nsa.device import choose_device
from nsa.hf import NSACacheLayer, NSAConfig, NSAForCausalLM
from nsa.ops.api import mean_pool
from nsa.ops.torch_native import decode

STAGES = ("cmp", "choose", "slc", "win")


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
    if min(bench.prefill_chunk, bench.batch) < 1:
        raise ValueError(f"prefill_chunk {bench.prefill_chunk} and batch {bench.batch} must be at least 1")
    layer_types = {"nsa": "nsa", "dense": "full_attention"} if bench.dense else {"nsa": "nsa"}
    models = {name: _Decoder(bench, layer_type) for name, layer_type in layer_types.items()}
    candidates: dict[str, Steps] = {}
    decoders: dict[tuple[str, int], _Decoder] = {}
    with torch.no_grad():
        for context in bench.contexts:
            for name, model in models.items():
                model.fill(context)
                decoders[name, context] = model.copy()
                candidates[f"{name}_{context}"] = {"ms": decoders[name, context].step}
            candidates[f"stage_{context}"] = models["nsa"].stages()
        times = median_ms(candidates, choose_device(bench.device), bench.warmup, bench.repeats)
    rows = []
    for context in bench.contexts:
        stages = {f"{stage}_ms": times[f"stage_{context}_{stage}"] * bench.num_hidden_layers for stage in STAGES}
        reads = dict(zip(("reads_predicted", "reads_done"), decoders["nsa", context].reads(), strict=True))
        dense_ms = times.get(f"dense_{context}_ms", math.nan)
        rows.append(DecodeRow(context, times[f"nsa_{context}_ms"], **stages, dense_ms=dense_ms, **reads))
    return rows


class _Decoder:
    """A model with one kind of attention, its cache, and what can be asked of them; copies share the weights."""

    def __init__(self, bench: DecodeBench, layer_type: str) -> None:
        torch.manual_seed(0)
        self.bench = bench
        self.config = NSAConfig(
            vocab_size=512,
            hidden_size=bench.hidden_size,
            intermediate_size=4 * bench.hidden_size,
            num_hidden_layers=bench.num_hidden_layers,
            num_attention_heads=bench.num_attention_heads,
            num_key_value_heads=bench.num_key_value_heads,
            layer_types=[layer_type] * bench.num_hidden_layers,
        )
        self.head_dim = bench.hidden_size // bench.num_attention_heads
        self.model = NSAForCausalLM(self.config).eval()
        self.model.to(choose_device(bench.device))  # pyright: ignore[reportArgumentType]
        self.cache = DynamicCache(config=self.config)

    def copy(self) -> _Decoder:
        """One with a cache of its own."""
        other = copy.copy(self)
        other.cache = copy.deepcopy(self.cache)
        return other

    def fill(self, context: int) -> None:
        """Prefill random tokens until the cache holds `context` of them."""
        while (held := self.cache.get_seq_length()) < context:
            self._forward(min(self.bench.prefill_chunk, context - held))

    def step(self) -> None:
        """Decode one token."""
        self._forward(1)

    def reads(self) -> tuple[int, int]:
        """Tokens that the last step read for a group, predicted and done."""
        reads = self._first_cache().reads
        predicted, done = (sum(tokens[0] for tokens in counts.values()) for counts in (reads.predicted, reads.done))
        return predicted, done

    def stages(self) -> Steps:
        """The stages of the next step, on a copy of the first layer's cache."""
        cache, geometry, bench = copy.deepcopy(self._first_cache()), self.config.geometry, self.bench
        k, v = torch.randn(
            2, bench.batch, 1, bench.num_key_value_heads, self.head_dim, device=choose_device(bench.device)
        )

        def compress(k: Tensor, v: Tensor, rows: list[int], first: list[int]) -> tuple[Tensor, Tensor]:
            return mean_pool(k, geometry), mean_pool(v, geometry)

        view = cache.append((k, v), (k, v), (k, v), compress)
        group = bench.num_attention_heads // bench.num_key_value_heads
        q = torch.randn(
            bench.batch, bench.num_key_value_heads, group, self.head_dim, device=choose_device(bench.device)
        )
        last = torch.tensor(view.lengths, device=choose_device(bench.device)) - 1
        _, p_cmp = decode.compressed_step(q, view, geometry)
        blocks = decode.choose_step(p_cmp, last, max(view.lengths), geometry)
        steps = (
            lambda: decode.compressed_step(q, view, geometry),
            lambda: decode.choose_step(p_cmp, last, max(view.lengths), geometry),
            lambda: decode.selected_step(q, view, blocks, last, geometry),
            lambda: decode.window_step(q, view, geometry),
        )
        return dict(zip(STAGES, steps, strict=True))

    def _first_cache(self) -> NSACache:
        layer = self.cache.layers[0]
        assert isinstance(layer, NSACacheLayer)
        assert isinstance(layer.state, NSACache)
        return layer.state

    def _forward(self, length: int) -> None:
        ids = torch.randint(512, (self.bench.batch, length), device=choose_device(self.bench.device))
        self.model(ids, past_key_values=self.cache, logits_to_keep=1)
