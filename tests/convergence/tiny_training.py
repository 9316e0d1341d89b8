"""Losses of a tiny model over some steps of training, for any backend; by itself, in Triton's interpreter.

    TRITON_INTERPRET=1 PYTHONPATH=src:tests python tests/convergence/tiny_training.py 5

Steps are of SGD: AdamW would hide a gradient that is wrong by a factor.
"""

from __future__ import annotations

import json
import sys
from contextlib import nullcontext
from dataclasses import dataclass, field
from itertools import pairwise
from typing import Any

import torch
from torch import Tensor

from nsa.ops import routing
from tiny_models import tiny_model

VOCAB_SIZE = 61


@dataclass(frozen=True)
class Case:
    """A model and its rows.

    Attributes:
        layer_types: of the model.
        rows: sequences of a step; 1 where documents are packed.
        length: tokens of a row.
        bounds: of packed documents.
        options: further keys of the config.
    """

    layer_types: tuple[str, ...] = ("nsa",)
    rows: int = 2
    length: int = 72
    bounds: tuple[int, ...] | None = None
    options: dict[str, Any] = field(default_factory=dict)


CASES = {
    "grouped heads": Case(),
    "one group": Case(options={"num_key_value_heads": 1, "shared_kv": True}),
    "packed documents": Case(rows=1, length=120, bounds=(0, 50, 50, 57, 120)),
    "packed documents, learned compression": Case(
        rows=1, length=120, bounds=(0, 50, 50, 57, 120), options={"compression": "conv", "compress_rope": "after"}
    ),
    "beside dense layers": Case(("full_attention", "nsa", "sliding_attention")),
    "keys and values of two sizes": Case(options={"value_head_dim": 12, "gate": "sigmoid"}),
}
INTERPRETED = {
    "packed documents": Case(rows=1, length=40, bounds=(0, 24, 40), options={"num_attention_heads": 2}),
    "one group beside a dense layer": Case(
        ("full_attention", "nsa"), rows=1, length=33, options={"num_attention_heads": 2, "num_key_value_heads": 1}
    ),
}


def batch(case: Case, generator: torch.Generator) -> Tensor:
    """Documents that repeat a motif of 3 to 8 tokens, with an eighth of their tokens drawn anew."""
    bounds = case.bounds or (0, case.length)
    ids = torch.randint(VOCAB_SIZE, (case.rows, case.length), generator=generator)
    for row in ids:
        for start, end in pairwise(bounds):
            period = int(torch.randint(3, 9, (1,), generator=generator))
            motif = torch.randint(VOCAB_SIZE, (period,), generator=generator)
            repeated = motif.repeat(-(-(end - start) // period))[: end - start]
            kept = torch.rand(end - start, generator=generator) < 7 / 8
            row[start:end] = torch.where(kept, repeated, row[start:end])
    return ids


def losses(case: Case, backend: str, num_steps: int, *, device: str = "cpu", bf16: bool = False) -> list[float]:
    """The losses before each step, in fp32 or by autocast in bf16."""
    model = tiny_model(*case.layer_types, attention_backend=backend, **case.options).float().train().to(device)
    optimizer = torch.optim.SGD(model.parameters(), lr=0.05, momentum=0.9)
    cu_seqlens = None if case.bounds is None else torch.tensor(case.bounds, dtype=torch.int32, device=device)
    generator, found = torch.Generator().manual_seed(0), []
    for _ in range(num_steps):
        ids = batch(case, generator).to(device)
        with torch.autocast(device, torch.bfloat16) if bf16 else nullcontext():
            loss = model(ids, labels=ids, cu_seqlens=cu_seqlens, use_cache=False).loss
        loss.backward()
        optimizer.step()
        optimizer.zero_grad()
        found.append(loss.item())
    return found


if __name__ == "__main__":
    torch.set_num_threads(1)
    routing._why_not_triton = lambda *_: None  # the interpreter needs no GPU
    for name, case in INTERPRETED.items():
        print(json.dumps({"case": name, "losses": losses(case, "triton", int(sys.argv[1]))}), flush=True)
