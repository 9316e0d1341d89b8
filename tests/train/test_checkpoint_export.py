"""An exported model is the checkpoint's, without the state of training; a damaged one is not exported."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from transformers import AutoModelForCausalLM

from nsa.data.tokenizers import load_tokenizer
from nsa.hf import NSAForCausalLM
from nsa.train.checkpoint_export import export_model
from saved_runs import save_model
from tiny_models import tiny_config


@pytest.fixture
def model() -> NSAForCausalLM:
    torch.manual_seed(0)
    return NSAForCausalLM(tiny_config("nsa", vocab_size=259))


def test_the_newest_model_is_exported_alone(tmp_path: Path, model: NSAForCausalLM) -> None:
    run, target = tmp_path / "run", tmp_path / "out" / "model"
    save_model(run / "checkpoints", 5, NSAForCausalLM(model.config))
    newest = save_model(run / "checkpoints", 10, model)
    assert export_model(run, target) == newest
    assert {path.name for path in target.iterdir()} == {
        "config.json",
        "generation_config.json",
        "model.safetensors",
        "tokenizer.json",
        "tokenizer_config.json",
    }
    loaded = AutoModelForCausalLM.from_pretrained(target)
    assert all(torch.equal(a, b) for a, b in zip(loaded.parameters(), model.parameters(), strict=True))
    assert load_tokenizer(target).decode([72, 105]) == "Hi"
    with pytest.raises(ValueError, match="exists already"):
        export_model(newest, target)


def test_a_damaged_model_is_not_exported(tmp_path: Path, model: NSAForCausalLM) -> None:
    checkpoint = save_model(tmp_path, 5, model)
    weights = checkpoint / "model.safetensors"
    contents = bytearray(weights.read_bytes())
    contents[-1] ^= 1
    weights.write_bytes(contents)
    with pytest.raises(ValueError, match=r"model\.safetensors is not what was written"):
        export_model(checkpoint, tmp_path / "model")
    assert not (tmp_path / "model").exists()
