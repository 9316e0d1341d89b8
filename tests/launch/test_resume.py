"""A resumed run is the run that was never interrupted, bit for bit; and what cannot be resumed is refused."""

from __future__ import annotations

import json
import os
import shutil
import signal
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file
from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

from nsa.config.load import load_config
from nsa.config.resume_keys import ALLOWED
from nsa.config.run import RunConfig
from nsa.launch.resume import prepare_resume
from nsa.launch.resume_config import changed_keys, resumed_config
from nsa.launch.start import prepare
from nsa.preflight.examine import examine_resume
from nsa.runs.checkpoints import newest_checkpoint
from nsa.runs.folder import RunFolder
from nsa.runs.tables import TRAINING_COLUMNS, VALIDATION_COLUMNS, read_csv
from nsa.train.loop import Outcome, train
from nsa.train.trainer import Trainer

STEPS = {"steps": 8, "checkpoint_every_steps": 3, "keep_checkpoints": 9}
TIMES = {"tokens_per_s", "step_s", "fetch_s"}


def resume(folder: Path, *overrides: str) -> Outcome:
    return train(*prepare_resume(resumed_config(folder, overrides), ["nsa", "resume"]))


def table(folder: Path) -> list[dict[str, Any]]:
    rows = read_csv(folder / "training.csv", TRAINING_COLUMNS)
    return [{name: value for name, value in row.items() if name not in TIMES} for row in rows]


def evaluations(folder: Path) -> list[dict[str, Any]]:
    return read_csv(folder / "val.csv", VALIDATION_COLUMNS)


def weights(folder: Path) -> dict[str, torch.Tensor]:
    return load_file(newest_checkpoint(folder) / "model.safetensors")


def equal_weights(one: Path, other: Path) -> bool:
    first, second = weights(one), weights(other)
    return first.keys() == second.keys() and all(torch.equal(first[name], second[name]) for name in first)


def run_until(config: RunConfig, step: int, monkeypatch: pytest.MonkeyPatch, how: str) -> Path:
    """Begin a run and end it after `step`, with or without an orderly stop; its folder."""
    trainer, folder = prepare(config)
    honest_step = trainer.train_step

    def interrupted() -> Any:
        if trainer.step == step and how == "crash":
            raise MemoryError
        if trainer.step == step - 1 and how == "stop":
            os.kill(os.getpid(), signal.SIGTERM)
        return honest_step()

    monkeypatch.setattr(trainer, "train_step", interrupted)
    if how == "stop":
        assert train(trainer, folder).stopped_by == "SIGTERM"
    else:
        with pytest.raises(MemoryError):
            train(trainer, folder)
    return folder.path


@pytest.fixture(scope="module")
def whole(module_tiny: Callable[..., RunConfig]) -> Path:
    """The folder of a run of eight steps that nothing interrupted."""
    return train(*prepare(module_tiny(run={"name": "whole"}, train=STEPS))).folder.path


def copied(whole: Path, tmp_path: Path) -> Path:
    """A run folder of its own that is as that of `whole`."""
    return Path(shutil.copytree(whole, tmp_path / "copied", symlinks=True))


@pytest.mark.parametrize(("how", "step", "kept"), [("stop", 4, 4), ("crash", 5, 3), ("crash", 2, 0)])
def test_a_resumed_run_equals_an_uninterrupted_one_bit_for_bit(
    whole: Path, tiny, monkeypatch: pytest.MonkeyPatch, how: str, step: int, kept: int
) -> None:
    folder = run_until(tiny(train=STEPS), step, monkeypatch, how)
    time.sleep(1)  # TensorBoard tells files of one process in order by the second
    outcome = resume(folder)
    assert outcome.stopped_by is None
    assert table(folder) == table(whole)
    assert evaluations(folder) == evaluations(whole)
    assert equal_weights(folder, whole)
    assert (folder / "samples" / "after.txt").read_text() == (whole / "samples" / "after.txt").read_text()
    metrics, expected = outcome.metrics, json.loads((whole / "metrics.json").read_text())
    for name in ("step", "tokens", "train_loss", "val_loss", "best_val_loss", "untrained_val_loss"):
        assert metrics[name] == expected[name], name
    status = json.loads((folder / "status.json").read_text())
    assert (status["state"], status["step"], status["reason"]) == ("finished", 8, None)
    assert status["resumed_from"]["checkpoint"] == (f"step_{kept:06d}" if kept else None)
    assert (status["resumed_from"]["step"], status["resumed_from"]["count"]) == (kept, 1)
    assert json.loads((folder / "env.json").read_text())["resumed"][0]["command"] == ["nsa", "resume"]
    board = EventAccumulator(str(folder / "tb"))
    board.Reload()
    assert [event.step for event in board.Scalars("train/loss")] == list(range(1, 9))


def test_a_run_is_resumed_again_and_again(whole: Path, tiny, monkeypatch: pytest.MonkeyPatch) -> None:
    folder = run_until(tiny(train=STEPS), 4, monkeypatch, "crash")
    trainer, opened = prepare_resume(resumed_config(folder))
    honest_step = trainer.train_step

    def crash_again() -> Any:
        if trainer.step == 7:
            raise MemoryError
        return honest_step()

    monkeypatch.setattr(trainer, "train_step", crash_again)
    with pytest.raises(MemoryError):
        train(trainer, opened)
    resume(folder)
    assert table(folder) == table(whole)
    assert equal_weights(folder, whole)
    resumed = json.loads((folder / "env.json").read_text())["resumed"]
    assert [(entry["step"], entry["count"]) for entry in resumed] == [(3, 1), (6, 2)]


@pytest.mark.parametrize("damage", ["truncated", "flipped"])
def test_a_damaged_checkpoint_is_named_and_the_one_before_it_resumed(
    whole: Path, tiny, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str], damage: str
) -> None:
    folder = run_until(tiny(train=STEPS), 7, monkeypatch, "crash")
    part = folder / "checkpoints" / "step_000006" / "state" / "__0_0.distcp"
    contents = bytearray(part.read_bytes())
    contents[len(contents) // 2] ^= 1
    part.write_bytes(contents[: len(contents) // 2] if damage == "truncated" else contents)
    capsys.readouterr()
    resume(folder)
    out = capsys.readouterr().out
    assert f"damaged checkpoint skipped: {part}" in out
    assert f"resuming {folder} from step_000003" in out
    assert (folder / "checkpoints" / "damaged_step_000006").is_dir()
    assert table(folder) == table(whole)
    assert equal_weights(folder, whole)


def test_a_run_can_be_made_longer_and_the_change_is_recorded(tiny) -> None:
    folder = train(*prepare(tiny(train=STEPS))).folder.path
    with pytest.raises(ValueError, match=r"has finished its 8 steps; to continue, give more: --train\.steps 16"):
        resume(folder)
    before = table(folder)
    outcome = resume(folder, "--train.steps", "10", "--eval.every_steps", "5")
    assert table(folder)[:8] == before
    assert [row["step"] for row in table(folder)] == list(range(1, 11))
    assert [row["step"] for row in evaluations(folder)] == [0, 3, 6, 8, 10]
    assert outcome.metrics["step"] == 10
    assert load_config(folder / "config.yaml").train.steps == 10
    changed = json.loads((folder / "status.json").read_text())["resumed_from"]["changed"]
    assert changed == {"train.steps": [8, 10], "eval.every_steps": [3, 5]}


def test_a_run_that_was_killed_while_it_closed_only_closes_again(tiny, monkeypatch: pytest.MonkeyPatch) -> None:
    from nsa.train import loop as module

    with monkeypatch.context() as patch:
        patch.setattr(module, "draw_curves", lambda *args: 1 / 0)
        trainer, opened = prepare(tiny(train=STEPS))
        with pytest.raises(ZeroDivisionError):
            train(trainer, opened)
    folder = opened.path
    before = (folder / "checkpoints" / "step_000008" / "complete.json").stat().st_mtime_ns
    assert resume(folder).metrics["step"] == 8
    assert (folder / "checkpoints" / "step_000008" / "complete.json").stat().st_mtime_ns == before
    assert (folder / "report.md").is_file()


@pytest.mark.parametrize(
    "override",
    [("--optim.lr", "1e-3"), ("--run.seed", "4"), ("--data.heldout", "0.5"), ("--train.batch_tokens", "256")],
)
def test_what_decides_the_steps_cannot_be_changed(tiny, override: tuple[str, str]) -> None:
    _, folder = prepare(tiny())
    with pytest.raises(ValueError, match=override[0].removeprefix("--")) as caught:
        resumed_config(folder.path, override)
    assert "nsa train" in str(caught.value)


def test_the_keys_that_may_be_changed_exist() -> None:
    sections = RunConfig().model_dump()
    known = {f"{section}.{key}" for section, keys in sections.items() for key in keys}
    assert not ALLOWED - known
    assert changed_keys(RunConfig(), RunConfig()) == {}


def test_a_folder_that_is_no_run_or_is_in_use_is_refused(tiny, tmp_path: Path) -> None:
    with pytest.raises(ValueError, match="is no run folder: it holds no config"):
        prepare_resume(resumed_config(tmp_path))
    trainer, folder = prepare(tiny(train=STEPS))
    with pytest.raises(ValueError, match=f"is in use by process {os.getpid()}"):
        prepare_resume(resumed_config(folder.path))
    train(trainer, folder)
    assert resume(folder.path, "--train.steps", "9").metrics["step"] == 9


def test_a_run_with_other_data_is_refused_and_its_tables_stay(
    tiny, corpus: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    text = tmp_path / "words.txt"
    text.write_text(corpus.read_text())
    folder = run_until(tiny(train=STEPS, data={"paths": [str(text)]}), 4, monkeypatch, "crash")
    before = table(folder)
    text.write_text(corpus.read_text() + "\n\nOne paragraph more, and the order of all is another.")
    with pytest.raises(ValueError, match="of other data"):
        resume(folder)
    assert table(folder) == before
    text.write_text(corpus.read_text())
    assert resume(folder).metrics["step"] == 8


def test_a_stale_halt_file_does_not_stop_a_resumed_run(
    tiny, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    folder = run_until(tiny(train=STEPS), 4, monkeypatch, "crash")
    (folder / "HALT").write_text("from last week")
    assert resume(folder).stopped_by is None
    assert "was put aside as HALT.old" in capsys.readouterr().out
    assert not (folder / "HALT").exists()


def test_a_halt_file_stops_a_run_with_its_reason_and_the_next_goes_on(
    whole: Path, tiny, monkeypatch: pytest.MonkeyPatch
) -> None:
    trainer, folder = prepare(tiny(train=STEPS))
    honest_step = trainer.train_step

    def halted() -> Any:
        if trainer.step == 3:
            folder.halt.write_text("the disk is needed")
        return honest_step()

    monkeypatch.setattr(trainer, "train_step", halted)
    assert train(trainer, folder).stopped_by == "HALT: the disk is needed"
    status = folder.read_status()
    assert (status["state"], status["step"], status["reason"]) == ("stopped", 4, "HALT: the disk is needed")
    assert newest_checkpoint(folder.path).name == "step_000004"
    resume(folder.path)
    assert table(folder.path) == table(whole)


@pytest.mark.parametrize("text", [None, "", '{"sta', "[]"])
def test_a_run_goes_on_without_the_small_files_that_a_crash_took(tiny, text: str | None) -> None:
    folder = train(*prepare(tiny(train=STEPS))).folder
    for path in (folder.status_json, folder.env_json, folder.data_index_json, folder.preflight_json):
        path.unlink() if text is None else path.write_text(text)
    for path in (folder.training_csv, folder.val_csv, folder.samples / "before.txt", folder.samples / "after.txt"):
        path.unlink()
    folder.samples.rmdir()
    assert resume(folder.path, "--train.steps", "9").metrics["step"] == 9
    assert (folder.read_status()["state"], folder.read_status()["step"]) == ("finished", 9)
    assert [row["step"] for row in table(folder.path)] == list(range(1, 10))
    assert json.loads(folder.data_index_json.read_text())["held_out_documents"]
    assert json.loads(folder.env_json.read_text())["resumed"][0]["step"] == 8
    assert "after step 9 of 9" in folder.report_md.read_text()


def test_a_damaged_folder_is_mended_from_its_checkpoint_and_what_was_there_is_kept(
    whole: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    folder = copied(whole, tmp_path)
    for name in ("val.csv", "heartbeat_rank0.jsonl"):
        (folder / name).write_text((folder / name).read_text() + "garbage\n")
    (folder / "training.csv").write_text("")
    (folder / "health.csv").unlink()
    (folder / "config.yaml").write_text("")
    assert resume(folder, "--train.steps", "9").metrics["step"] == 9
    said = capsys.readouterr().out
    copy = folder / "checkpoints" / "step_000008" / "tables"
    for part in (
        f"note: {folder}/config.yaml is lost; the config is that of {copy.parent}/run_config.yaml",
        f"note: {folder}/training.csv is damaged ({folder}/training.csv must begin with the header",
        f"; restored from {copy}/training.csv",
        f"note: {folder}/health.csv is missing; restored from {copy}/health.csv",
        "the file is now damaged_heartbeat_rank0.jsonl",
        f"{copy}/val.csv; what was there is now damaged_val.csv",
    ):
        assert part in said, part
    assert table(folder)[:8] == table(whole)
    assert evaluations(folder)[: len(evaluations(whole))] == evaluations(whole)
    assert (folder / "damaged_val.csv").read_text().endswith("garbage\n")
    before, after = (load_config(run / "config.yaml") for run in (whole, folder))
    assert changed_keys(before, after) == {"train.steps": [8, 9]}


def test_a_run_whose_checkpoints_were_removed_does_not_begin_again_over_its_tables(tiny) -> None:
    folder = train(*prepare(tiny(train=STEPS))).folder
    shutil.rmtree(folder.checkpoints)
    before = table(folder.path)
    with pytest.raises(ValueError, match=r"was finished after step 8, but .* holds no checkpoint; restore"):
        resume(folder.path, "--train.steps", "9")
    assert table(folder.path) == before


def test_a_full_disk_refuses_to_go_on_unless_old_checkpoints_make_room(tiny, monkeypatch: pytest.MonkeyPatch) -> None:
    folder = train(*prepare(tiny(train=STEPS))).folder
    size = sum(file.stat().st_size for file in folder.checkpoints.rglob("*") if file.is_file())
    monkeypatch.setattr("nsa.preflight.examine._free_gib", lambda path: 0.0)
    assert not examine_resume(load_config(folder.config_yaml), folder.path).refused_by
    with pytest.raises(ValueError, match=r"(?s)disk-too-small: the checkpoints take up to .*--preflight.allow disk"):
        resume(
            folder.path, "--train.steps", "9", "--train.keep_checkpoints", "50", "--train.checkpoint_every_steps", "1"
        )
    assert size == sum(file.stat().st_size for file in folder.checkpoints.rglob("*") if file.is_file())
    shutil.rmtree(folder.checkpoints / "step_000003")
    shutil.rmtree(folder.checkpoints / "step_000006")
    with pytest.raises(ValueError, match="disk-too-small"):
        resume(folder.path, "--train.steps", "9")
    assert resume(folder.path, "--train.steps", "9", "--preflight.allow", "disk-too-small").metrics["step"] == 9


def test_a_long_rest_without_checkpoints_is_refused(tiny) -> None:
    folder = train(*prepare(tiny(train=STEPS))).folder
    with pytest.raises(ValueError, match="no-checkpoints"):
        resume(folder.path, "--train.steps", "9000", "--train.checkpoint_every_steps", "0")


def test_a_compiled_rest_follows_the_same_losses(whole: Path, tiny, monkeypatch: pytest.MonkeyPatch) -> None:
    folder = run_until(tiny(train=STEPS), 4, monkeypatch, "stop")
    resume(folder, "--train.compile", "True")
    losses, expected = ([row["loss"] for row in table(path)] for path in (folder, whole))
    assert losses == pytest.approx(expected, rel=1e-5)


def test_a_trainer_goes_on_where_the_checkpoint_was_and_with_its_guards(tiny, tmp_path: Path) -> None:
    trainer, folder = Trainer(tiny()), RunFolder(tmp_path)
    trainer.guard.num_skipped = 3
    trainer.train_step()
    with trainer.checkpointer(folder) as checkpointer:
        trainer.save(checkpointer)
    other = Trainer(tiny(), checkpoint=newest_checkpoint(tmp_path))
    assert other.position == trainer.position
    assert other.guard.state_dict()["num_skipped"] == 3
    assert len(other.guard.state_dict()["losses"]) == 1
    with other.checkpointer(folder) as checkpointer:
        assert checkpointer.saved_step == 1
