"""Checkpoints are whole or absent, the newest are kept, and a damaged one is passed over."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import torch
from transformers import AutoModelForCausalLM

import nsa.hf  # noqa: F401  (registers the model)
from nsa.data.tokenizers import ByteTokenizer, load_tokenizer
from nsa.train.checkpoint import complete_checkpoints, newest_checkpoint, save_checkpoint
from nsa.train.model import build_model


class FakeModel:
    """Stands in where the weights do not matter."""

    def save_pretrained(self, folder: str) -> None:
        (Path(folder) / "model.safetensors").write_text("weights")


class FailingModel:
    """Fails half-way through its files."""

    def save_pretrained(self, folder: str) -> None:
        (Path(folder) / "model.safetensors").write_text("wei")
        raise OSError("No space left on device")


class FakeTokenizer:
    def save(self, folder: Path) -> None:
        (folder / "tokenizer.json").write_text("{}")


def save(run: Path, step: int, model: object = None, keep: int = 2) -> Path:
    return save_checkpoint(
        run / "checkpoints",
        step,
        model=model or FakeModel(),  # pyright: ignore[reportArgumentType]
        tokenizer=FakeTokenizer(),
        trainer={"tokens": step * 10},
        keep=keep,
    )


def test_the_newest_are_kept_and_latest_points_at_the_last(tmp_path: Path) -> None:
    for step in (5, 10, 20):
        save(tmp_path, step)
    names = sorted(path.name for path in (tmp_path / "checkpoints").iterdir())
    assert names == ["latest", "step_000010", "step_000020"]
    assert (tmp_path / "checkpoints" / "latest").resolve().name == "step_000020"
    assert newest_checkpoint(tmp_path).name == "step_000020"
    assert json.loads((newest_checkpoint(tmp_path) / "trainer.json").read_text()) == {"step": 20, "tokens": 200}


def test_steps_are_ordered_as_numbers(tmp_path: Path) -> None:
    for step in (999_999, 1_000_000):
        save(tmp_path, step)
    assert newest_checkpoint(tmp_path).name == "step_1000000"


def test_a_failed_save_leaves_the_checkpoint_before_it(tmp_path: Path) -> None:
    save(tmp_path, 5)
    with pytest.raises(OSError, match="No space left"):
        save(tmp_path, 10, FailingModel())
    assert [path.name for path in complete_checkpoints(tmp_path / "checkpoints")] == ["step_000005"]
    assert (tmp_path / "checkpoints" / "latest").resolve().name == "step_000005"
    assert save(tmp_path, 10).name == "step_000010"


@pytest.mark.parametrize("damage", ["shorter", "missing", "unlisted"])
def test_a_damaged_checkpoint_is_passed_over(tmp_path: Path, damage: str) -> None:
    save(tmp_path, 5)
    newest = save(tmp_path, 10)
    if damage == "shorter":
        (newest / "model.safetensors").write_text("weigh")
    else:
        (newest / ("model.safetensors" if damage == "missing" else "complete.json")).unlink()
    assert newest_checkpoint(tmp_path).name == "step_000005"


def test_a_folder_without_a_checkpoint_is_an_error(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match="holds no complete checkpoint"):
        newest_checkpoint(tmp_path)


def test_a_checkpoint_loads_as_a_transformers_model_with_its_tokenizer(tmp_path: Path, tiny) -> None:
    model = build_model(tiny(), vocab_size=259, eos_token_id=257)
    path = save_checkpoint(tmp_path, 3, model=model, tokenizer=ByteTokenizer(), trainer={}, keep=1)
    loaded = AutoModelForCausalLM.from_pretrained(path)
    ids = torch.tensor([load_tokenizer(path).encode("the state of the union")])
    assert torch.equal(loaded(ids).logits, model.eval()(ids).logits)
