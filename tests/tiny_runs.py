"""A config for runs of seconds: a model of some thousand parameters on a few paragraphs of words."""

from __future__ import annotations

import random
from collections.abc import Callable
from pathlib import Path
from typing import Any

from nsa.config.run import RunConfig

TEXT = "the state of our union is strong and the people are many in all the land by the sea"
MODEL = {
    "hidden_size": 32,
    "intermediate_size": 48,
    "num_hidden_layers": 1,
    "num_attention_heads": 2,
    "num_key_value_heads": 1,
    "compress_block_size": 8,
    "compress_stride": 4,
    "select_block_size": 16,
    "num_selected_blocks": 3,
    "window_size": 16,
}
TRAIN = {"steps": 6, "sequence_length": 64, "batch_tokens": 512, "micro_batch_rows": 4, "log_every_steps": 2}


def write_corpus(path: Path) -> None:
    """A text file of 120 paragraphs."""
    draw, words = random.Random(0), TEXT.split()
    paragraphs = [" ".join(draw.choices(words, k=draw.randint(20, 60))) for _ in range(120)]
    path.write_text("\n\n".join(paragraphs), encoding="utf-8")


def tiny_config_values(corpus: Path, runs: Path) -> dict[str, Any]:
    """The tiny config as a YAML file would hold it."""
    return {
        "run": {"name": "tiny", "folder": str(runs), "device": "cpu"},
        "model": dict(MODEL),
        "data": {"source": "text", "paths": [str(corpus)], "text_split": "paragraphs", "heldout": 0.2},
        "optim": {"lr": 1e-2, "warmup_steps": 2},
        "train": dict(TRAIN),
        "eval": {"every_steps": 3, "rows": 4},
        "sample": {"max_new_tokens": 8, "prompts": ["the state "]},
    }


def builder(values: dict[str, Any]) -> Callable[..., RunConfig]:
    """`build(run={"name": "b"}, train={"steps": 3})`: the config of `values` with some keys changed."""

    def build(**changes: dict[str, Any]) -> RunConfig:
        changed = {name: dict(section) for name, section in values.items()}
        for name, section in changes.items():
            changed.setdefault(name, {}).update(section)
        return RunConfig.model_validate(changed)

    return build
