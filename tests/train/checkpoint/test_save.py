"""A checkpoint of a run: it holds the state of its step though training goes on, and a failed one is named and gone."""

from __future__ import annotations

import errno
import os
import threading
from pathlib import Path

import pytest
import torch
from torch.distributed.checkpoint.filesystem import FileSystemWriter
from transformers import AutoModelForCausalLM

from nsa.config.run import OptimSection
from nsa.data.tokenizers import ByteTokenizer, load_tokenizer
from nsa.hf import NSAForCausalLM
from nsa.runs.checkpoints import complete_checkpoints, damage, newest_checkpoint
from nsa.runs.errors import CheckpointError
from nsa.runs.folder import read_json
from nsa.train.checkpoint import save as module
from nsa.train.checkpoint.load import load_checkpoint, restore_random_state
from nsa.train.checkpoint.save import Checkpointer
from nsa.train.optim import build_optimizer
from saved_runs import ONE_PROCESS, save_model
from tiny_models import tiny_config


def build(seed: int, **changes: object) -> tuple[NSAForCausalLM, torch.optim.Optimizer]:
    torch.manual_seed(seed)
    model = NSAForCausalLM(tiny_config("nsa", vocab_size=259, **changes))
    return model, build_optimizer(model, OptimSection())


def step(model: NSAForCausalLM, optimizer: torch.optim.Optimizer) -> float:
    """An optimizer step on random tokens from torch's generator."""
    ids = torch.randint(0, 259, (1, 48))
    loss = model(ids, labels=ids).loss
    loss.backward()
    optimizer.step()
    optimizer.zero_grad()
    return loss.item()


def checkpointer(run: Path, model: NSAForCausalLM, keep: int = 9) -> Checkpointer:
    options = {"tokenizer": ByteTokenizer(), "config_yaml": "run: {}\n", "keep": keep}
    return Checkpointer(run / "checkpoints", model, ONE_PROCESS, **options)


@pytest.mark.parametrize("tied", [True, False])
def test_steps_after_a_checkpoint_are_repeated_bit_for_bit(tmp_path: Path, tied: bool) -> None:
    model, optimizer = build(0, tie_word_embeddings=tied)
    with checkpointer(tmp_path, model) as saver:
        for _ in range(2):
            step(model, optimizer)
        saver.save(2, optimizer=optimizer, trainer={"tokens": 96})
        losses = [step(model, optimizer) for _ in range(3)]
    other, other_optimizer = build(1, tie_word_embeddings=tied)
    checkpoint = newest_checkpoint(tmp_path)
    assert damage(checkpoint) is None
    load_checkpoint(checkpoint, model=other, optimizer=other_optimizer, parallel=ONE_PROCESS)
    assert read_json(checkpoint / "trainer.json") == {"step": 2, "tokens": 96}
    assert restore_random_state(checkpoint, seed=0, parallel=ONE_PROCESS) is None
    assert [step(other, other_optimizer) for _ in range(3)] == losses
    assert all(torch.equal(a, b) for a, b in zip(model.parameters(), other.parameters(), strict=True))


def test_a_checkpoint_before_the_first_step_is_exact_too(tmp_path: Path) -> None:
    model, optimizer = build(0)
    with checkpointer(tmp_path, model) as saver:
        saver.save(0, optimizer=optimizer, trainer={})
        losses = [step(model, optimizer) for _ in range(3)]
    untouched, fresh = build(0)
    assert [step(untouched, fresh) for _ in range(3)] == losses
    other, other_optimizer = build(1)
    checkpoint = newest_checkpoint(tmp_path)
    load_checkpoint(checkpoint, model=other, optimizer=other_optimizer, parallel=ONE_PROCESS)
    restore_random_state(checkpoint, seed=0, parallel=ONE_PROCESS)
    assert [step(other, other_optimizer) for _ in range(3)] == losses


def test_training_goes_on_while_a_checkpoint_is_written(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    model, optimizer = build(0)
    before = [p.detach().clone() for p in model.parameters()]
    go_on, honest = threading.Event(), FileSystemWriter.write_data

    def slow(self, *args):
        assert go_on.wait(60)
        return honest(self, *args)

    monkeypatch.setattr(FileSystemWriter, "write_data", slow)
    with checkpointer(tmp_path, model) as saver:
        saver.save(1, optimizer=optimizer, trainer={})
        step(model, optimizer)
        assert not saver.failed
        assert complete_checkpoints(tmp_path / "checkpoints") == []
        go_on.set()
        saver.wait()
        saved = AutoModelForCausalLM.from_pretrained(newest_checkpoint(tmp_path))
    assert all(torch.equal(a, b) for a, b in zip(before, saved.parameters(), strict=True))
    assert not all(torch.equal(a, b) for a, b in zip(before, model.parameters(), strict=True))


def test_a_checkpoint_loads_as_a_transformers_model_with_its_tokenizer(tmp_path: Path) -> None:
    model, _ = build(0)
    path = save_model(tmp_path, 3, model)
    loaded = AutoModelForCausalLM.from_pretrained(path)
    ids = torch.tensor([load_tokenizer(path).encode("the state of the union")])
    assert torch.equal(loaded(ids).logits, model.eval()(ids).logits)
    assert {p.dtype for p in loaded.parameters()} == {torch.float32}


@pytest.mark.parametrize("place", ["parts", "model", "tokenizer"])
def test_a_full_disk_is_named_and_leaves_the_older_checkpoints(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, place: str
) -> None:
    model, optimizer = build(0)

    def full(*args: object, **kwargs: object) -> None:
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))

    with checkpointer(tmp_path, model) as saver:
        saver.save(5, optimizer=optimizer, trainer={})
        saver.wait()
        if place == "parts":
            monkeypatch.setattr(torch, "save", full)
        elif place == "model":
            monkeypatch.setattr(module, "_read_weights", full)
        else:
            monkeypatch.setattr(ByteTokenizer, "save", full)
        saver.save(10, optimizer=optimizer, trainer={})
        with pytest.raises(CheckpointError) as caught:
            saver.wait()
    message = str(caught.value)
    for part in ("step_000010 could not be written", "rank 0: OSError", "No space left", f"nsa resume {tmp_path}"):
        assert part in message
    assert sorted(path.name for path in (tmp_path / "checkpoints").iterdir()) == ["latest", "step_000005"]
    assert damage(newest_checkpoint(tmp_path)) is None


def test_a_failed_checkpoint_is_noticed_without_waiting_and_by_the_next_one(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    model, optimizer = build(0)
    done = threading.Event()

    def full(*args: object) -> None:
        done.set()
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))

    monkeypatch.setattr(FileSystemWriter, "write_data", full)
    with checkpointer(tmp_path, model) as saver:
        saver.save(1, optimizer=optimizer, trainer={})
        assert done.wait(60)
        for _ in range(1000):
            if saver.failed:
                break
            threading.Event().wait(0.01)
        assert saver.failed
        with pytest.raises(CheckpointError, match="step_000001"):
            saver.save(2, optimizer=optimizer, trainer={})


def test_what_torch_save_hides_is_said(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    model, optimizer = build(0)

    def broken(*args: object) -> None:
        try:
            raise OSError(errno.EFBIG, os.strerror(errno.EFBIG))
        finally:
            raise RuntimeError("unexpected pos 704 vs 598")

    monkeypatch.setattr(FileSystemWriter, "write_data", broken)
    with pytest.raises(CheckpointError, match="File too large"), checkpointer(tmp_path, model) as saver:
        saver.save(1, optimizer=optimizer, trainer={})


def test_a_failure_of_training_waits_for_the_checkpoint_and_keeps_its_own_message(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    model, optimizer = build(0)

    def fail_after_saving(step: int) -> None:
        with checkpointer(tmp_path, model) as saver:
            saver.save(step, optimizer=optimizer, trainer={})
            raise KeyError(step)

    with pytest.raises(KeyError):
        fail_after_saving(1)
    assert newest_checkpoint(tmp_path).name == "step_000001"
    monkeypatch.setattr(module, "commit", lambda *args, **kwargs: 1 / 0)
    with pytest.raises(KeyError) as caught:
        fail_after_saving(2)
    assert "step_000002 could not be written" in caught.value.__notes__[0]


def test_a_checkpoint_of_another_model_is_refused(tmp_path: Path) -> None:
    path = save_model(tmp_path, 3, build(0)[0])
    model, optimizer = build(0, hidden_size=64)
    with pytest.raises(CheckpointError, match=r"step_000003 cannot be read into this model"):
        load_checkpoint(path, model=model, optimizer=optimizer, parallel=ONE_PROCESS)


def test_another_number_of_ranks_gets_random_numbers_of_its_own(tmp_path: Path) -> None:
    path = save_model(tmp_path, 3, build(0)[0])
    two = type(ONE_PROCESS)(1, 1, 2, ONE_PROCESS.device, "ddp")
    draws = []
    for seed in (0, 0, 1):
        note = restore_random_state(path, seed=seed, parallel=two)
        assert note is not None
        assert "written by 1 ranks and is continued by 2" in note
        draws.append(torch.rand(3).tolist())
    assert draws[0] == draws[1] != draws[2]


def test_what_a_killed_writer_left_is_removed_at_the_start(tmp_path: Path) -> None:
    part = tmp_path / "checkpoints" / ".step_000009.part" / "state"
    part.mkdir(parents=True)
    (part / "__1_0.distcp").write_text("of another number of ranks")
    with checkpointer(tmp_path, build(0)[0]):
        assert list((tmp_path / "checkpoints").iterdir()) == []
