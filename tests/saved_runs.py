"""Checkpoints for tests: of a model of some thousand parameters, or of folders with a few bytes in the same layout."""

from __future__ import annotations

from pathlib import Path

import torch

from nsa.data.tokenizers import ByteTokenizer
from nsa.hf import NSAForCausalLM
from nsa.runs.checkpoints import FileSum, commit, prune, step_folder, temporary_folder
from nsa.train.checkpoint.save import Checkpointer
from nsa.train.parallel import Parallel

ONE_PROCESS = Parallel(0, 0, 1, torch.device("cpu"), "none")


def save_model(checkpoints: Path, step: int, model: NSAForCausalLM, *, keep: int = 9) -> Path:
    """A checkpoint of a model that has not been trained."""
    options = {"tokenizer": ByteTokenizer(), "config_yaml": "", "keep": keep}
    with Checkpointer(checkpoints, model, ONE_PROCESS, **options) as checkpointer:
        checkpointer.save(step, optimizer=torch.optim.AdamW(model.parameters()), trainer={})
    return step_folder(checkpoints, step)


def write_files(
    checkpoints: Path, step: int, *, keep: int = 2, keep_every_steps: int = 0, more: dict[str, bytes] | None = None
) -> Path:
    """A whole checkpoint that holds some small files, `more` among them, and no model."""
    final = step_folder(checkpoints, step)
    temporary = temporary_folder(final)
    files = {"model.safetensors": b"weights", "state/.metadata": b"where they are", "random_rank0.pt": b"seeds"}
    files |= more or {}
    for name, contents in files.items():
        (temporary / name).parent.mkdir(parents=True, exist_ok=True)
        (temporary / name).write_bytes(contents)
    sums = {name: FileSum.of(temporary / name) for name in files}
    commit(temporary, final, sums, about={"step": step, "world_size": 1})
    prune(checkpoints, keep=keep, keep_every_steps=keep_every_steps)
    return final
