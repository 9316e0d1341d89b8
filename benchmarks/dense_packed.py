"""Training steps with dense attention over packed documents, on a GPU: how far their speed depends on the documents.

    python benchmarks/dense_packed.py --out benchmarks/results/dense_packed_h200.csv

The 117M model of configs/nsa_125m.yaml, compiled, bf16, 8 rows of 8,192 random tokens a step. `varlen` is dense
attention as it is; `buckets` has it batch documents of similar length, as where varlen_attn does not serve; `nsa` is
the same model with NSA. The mixes of lengths take turns; `drawn` ones are drawn anew for every step.

    rows    each row is one document
    short   documents of 64 tokens
    long    a document of half a row, then documents of 64 tokens
    drawn   lengths from 32 tokens to a row, all powers of two as likely
    books   three in four rows are one document; the others are as `drawn`

CSV columns: `attention`, `mix`, `documents` of a step (mean), `tokens` of a step, `step_ms` (median), `slowest_ms`,
`tokens_per_s` from the median.
"""

from __future__ import annotations

import argparse
import random
import statistics
import sys
from collections.abc import Callable
from dataclasses import dataclass
from itertools import accumulate
from pathlib import Path

import torch
from torch import Tensor

from nsa.bench.protocol import print_table, timed_s, write_results
from nsa.hf import NSAConfig, NSAForCausalLM, dense_nsa
from nsa.loss import NextTokenLoss
from nsa.train.model import compile_layers

SHORT = 64  # tokens of a short document
LAYER_TYPES = {"varlen": "full_attention", "buckets": "full_attention", "nsa": "nsa"}


@dataclass(frozen=True)
class Settings:
    """Sizes of a step, and how many steps of each mix are untimed and timed."""

    rows: int = 8
    length: int = 8192
    layers: int = 12
    warmup: int = 2
    steps: int = 8


@dataclass(frozen=True)
class Row:
    """One kind of attention over one mix; see the CSV columns above."""

    attention: str
    mix: str
    documents: float
    tokens: int
    step_ms: float
    slowest_ms: float
    tokens_per_s: float


def cut(room: int, lengths: Callable[[], int]) -> list[int]:
    """Lengths that fill `room` tokens; the last is what is left."""
    filled: list[int] = []
    while room:
        filled.append(min(room, lengths()))
        room -= filled[-1]
    return filled


def row_of(mix: str, length: int, draw: random.Random) -> list[int]:
    """Lengths of the documents of a row."""
    if mix == "rows" or (mix == "books" and draw.random() < 0.75):
        return [length]
    if mix == "short":
        return cut(length, lambda: SHORT)
    if mix == "long":
        return [length // 2, *cut(length - length // 2, lambda: SHORT)]
    return cut(length, lambda: int(2 ** draw.uniform(5, length.bit_length() - 1)))


MIXES = ("rows", "short", "long", "drawn", "books")


def bounds_of(mix: str, settings: Settings, draw: random.Random) -> Tensor:
    """`cu_seqlens` of a step."""
    lengths = [n for _ in range(settings.rows) for n in row_of(mix, settings.length, draw)]
    return torch.tensor([0, *accumulate(lengths)], dtype=torch.int32)


def training_step(attention: str, settings: Settings, device: torch.device) -> Callable[[Tensor], None]:
    """Forward, loss, backward and update of a fresh model over rows with the given bounds."""
    torch.manual_seed(0)
    config = NSAConfig(
        vocab_size=50257, hidden_size=768, intermediate_size=2048, num_hidden_layers=settings.layers,
        num_attention_heads=12, num_key_value_heads=2, head_dim=64, tie_word_embeddings=True,
        layer_types=[LAYER_TYPES[attention]] * settings.layers,
    )  # fmt: skip
    model = NSAForCausalLM(config).train()
    model.to(device)  # pyright: ignore[reportArgumentType]  (transformers wraps `to`)
    on_cuda = device.type == "cuda"
    if on_cuda:
        compile_layers(model)
    loss = NextTokenLoss(model, compiled=on_cuda)
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-4, fused=True)
    ids = torch.randint(50257, (settings.rows, settings.length), device=device)
    labels = ids.roll(-1, 1)

    def step(bounds: Tensor) -> None:
        with torch.autocast(device.type, torch.bfloat16):
            nats = loss(ids, labels, bounds)
        (nats / ids.numel()).backward()
        optimizer.step()
        optimizer.zero_grad(set_to_none=True)

    return step


def measure(attention: str, settings: Settings, device: torch.device) -> list[Row]:
    """One row a mix; every kind of attention gets the same documents."""
    torch._dynamo.reset()
    step, draw = training_step(attention, settings, device), random.Random(0)
    times: dict[str, list[float]] = {mix: [] for mix in MIXES}
    documents: dict[str, list[int]] = {mix: [] for mix in MIXES}
    for _ in range(settings.warmup + settings.steps):
        for mix in MIXES:
            bounds = bounds_of(mix, settings, draw).to(device)
            times[mix].append(1000 * timed_s(lambda given=bounds: step(given), device))
            documents[mix].append(bounds.numel() - 1)
    tokens, rows = settings.rows * settings.length, []
    for mix in MIXES:
        timed = times[mix][settings.warmup :]
        median = statistics.median(timed)
        mean = statistics.mean(documents[mix][settings.warmup :])
        rows.append(Row(attention, mix, mean, tokens, median, max(timed), 1000 * tokens / median))
    return rows


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--out", type=Path, help="CSV file; nothing is written unless given")
    parser.add_argument("--device", type=torch.device, default=torch.device("cuda"))
    for name in ("rows", "length", "layers", "warmup", "steps"):
        parser.add_argument(f"--{name}", type=int, default=getattr(Settings, name))
    options = vars(parser.parse_args())
    out, device = options.pop("out"), options.pop("device")
    settings, results = Settings(**options), []
    varlen_serves = dense_nsa.varlen_serves
    for attention in LAYER_TYPES:
        dense_nsa.varlen_serves = varlen_serves if attention == "varlen" else lambda q, v: False
        results += measure(attention, settings, device)
    print_table(results, "Training steps over packed documents")
    if out is not None:
        write_results(results, out, settings, " ".join(["python", *sys.argv]), device)


if __name__ == "__main__":
    main()
