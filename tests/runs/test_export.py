"""An exported model is the checkpoint's, without the state of training; a damaged one is not exported."""

from __future__ import annotations

import json
import os
from pathlib import Path

import pytest
import torch
from transformers import AutoModelForCausalLM

from nsa.data.tokenizers import load_tokenizer
from nsa.hf import NSAForCausalLM
from nsa.runs.checkpoints import FileSum
from nsa.runs.export import export_model
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


@pytest.mark.parametrize("name", ["../escaped.txt", "a/../../escaped.txt"])
def test_nothing_is_copied_out_of_the_target(tmp_path: Path, model: NSAForCausalLM, name: str) -> None:
    checkpoint = save_model(tmp_path, 5, model)
    (tmp_path / "escaped.txt").write_text("planted beside the checkpoint")
    (checkpoint / "a").mkdir()
    listing = json.loads((checkpoint / "complete.json").read_text())
    listing["files"][name] = vars(FileSum.of(tmp_path / "escaped.txt"))
    (checkpoint / "complete.json").write_text(json.dumps(listing))
    (tmp_path / "out").mkdir()
    with pytest.raises(ValueError, match=r"escaped\.txt', which lies outside of it"):
        export_model(checkpoint, tmp_path / "out" / "model")
    assert list((tmp_path / "out").iterdir()) == []


def test_files_have_the_rights_that_the_umask_gives(tmp_path: Path, model: NSAForCausalLM) -> None:
    for umask in (0o022, 0o027):
        before = os.umask(umask)
        try:
            checkpoint = save_model(tmp_path / f"{umask}", 5, model)
            (checkpoint / "config.json").chmod(0o600)
            export_model(checkpoint, tmp_path / f"{umask}" / "model")
        finally:
            os.umask(before)
        folders = [checkpoint, tmp_path / f"{umask}" / "model"]
        files = {path for folder in folders for path in folder.rglob("*") if path.is_file()}
        files.remove(checkpoint / "config.json")
        assert {path.stat().st_mode & 0o777 for path in files} == {0o666 & ~umask}
