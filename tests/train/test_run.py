"""Whole runs of a tiny model: what they leave behind, and that they are exact, repeatable and guarded."""

from __future__ import annotations

import json
import math
import os
import re
import signal
from collections.abc import Iterator
from dataclasses import replace
from itertools import pairwise
from pathlib import Path

import pytest
import torch
from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

from nsa.config.load import load_config
from nsa.data import open_source
from nsa.data.heldout import heldout_rule
from nsa.data.stream.packing import Batch
from nsa.device import choose_device
from nsa.launch.start import prepare
from nsa.runs.checkpoints import newest_checkpoint
from nsa.runs.errors import TrainingError
from nsa.runs.tables import TRAINING_COLUMNS, VALIDATION_COLUMNS, column, read_csv
from nsa.train.loop import Outcome, train
from nsa.train.optim import learning_rate
from nsa.train.trainer import Trainer


def run(config) -> Outcome:
    return train(*prepare(config, command=["nsa", "train", "tiny.yaml"]))


def losses(folder: Path) -> list[float]:
    return [row["loss"] for row in read_csv(folder / "training.csv", TRAINING_COLUMNS)]


@pytest.fixture(scope="module")
def finished(tmp_path_factory: pytest.TempPathFactory, module_tiny) -> Path:
    """The folder of one whole run."""
    return run(module_tiny(run={"folder": str(tmp_path_factory.mktemp("finished"))})).folder.path


def test_a_run_leaves_every_file(finished: Path) -> None:
    files = {str(path.relative_to(finished)) for path in finished.rglob("*") if path.is_file()}
    files = {name for name in files if not name.startswith("tb/")}
    step = "checkpoints/step_000006"
    assert {
        "config.yaml",
        "env.json",
        "data_index.json",
        "status.json",
        "training.csv",
        "val.csv",
        "metrics.json",
        "curves.png",
        "report.md",
        "samples/before.txt",
        "samples/after.txt",
        f"{step}/config.json",
        f"{step}/model.safetensors",
        f"{step}/tokenizer.json",
        f"{step}/trainer.json",
        f"{step}/complete.json",
    } <= files
    assert not [name for name in files if ".part" in name]
    assert newest_checkpoint(finished).name == "step_000006"


def test_the_guide_lists_all_that_a_run_leaves(finished: Path) -> None:
    guide = (Path(__file__).parents[2] / "docs" / "operations.md").read_text(encoding="utf-8")
    table = guide.split("## The run folder\n")[1].split("\n## ")[0]
    left = {path.name + "/" * path.is_dir() for path in finished.iterdir()}
    assert left <= set(re.findall(r"`([^`]+)`", table))


def test_the_stored_config_is_the_whole_config_of_the_run(finished: Path, module_tiny) -> None:
    stored = load_config(finished / "config.yaml")
    assert stored == module_tiny(run={"folder": str(finished.parent)})


def test_the_tables_have_every_step_and_evaluation(finished: Path, module_tiny) -> None:
    config = module_tiny()
    rows = read_csv(finished / "training.csv", TRAINING_COLUMNS)
    assert [row["step"] for row in rows] == [1, 2, 3, 4, 5, 6]
    assert [row["tokens"] for row in rows] == [512 * step for step in range(1, 7)]
    assert [row["lr"] for row in rows] == [learning_rate(step, 6, config.optim) for step in range(1, 7)]
    seconds = column(rows, "step_s")
    speeds = [512 / seconds[0], 512 / seconds[1], *(1024 / (a + b) for a, b in pairwise(seconds[1:]))]
    assert column(rows, "tokens_per_s") == pytest.approx(speeds)  # of two steps, as many as lie between log lines
    assert all(0 <= row["fetch_s"] < row["step_s"] for row in rows)
    evaluations = read_csv(finished / "val.csv", VALIDATION_COLUMNS)
    assert [row["step"] for row in evaluations] == [0, 3, 6]
    assert all(row["val_ppl"] == pytest.approx(math.exp(row["val_loss"])) for row in evaluations)
    assert evaluations[0]["val_loss"] == pytest.approx(math.log(259), abs=0.1)
    assert evaluations[-1]["val_loss"] < evaluations[0]["val_loss"]


def test_metrics_status_and_environment_tell_the_same_story(finished: Path) -> None:
    metrics = json.loads((finished / "metrics.json").read_text())
    last = read_csv(finished / "val.csv", VALIDATION_COLUMNS)[-1]
    assert {name: metrics[name] for name in VALIDATION_COLUMNS} == last
    assert metrics["train_loss"] == pytest.approx(sum(losses(finished)) / 6)
    assert metrics["tokens"] == 6 * 512
    status = json.loads((finished / "status.json").read_text())
    assert (status["state"], status["step"], status["reason"]) == ("finished", 6, None)
    env = json.loads((finished / "env.json").read_text())
    assert env["command"] == ["nsa", "train", "tiny.yaml"]
    assert env["packages"]["torch"] == torch.__version__
    report = (finished / "report.md").read_text()
    for part in (f"{last['val_bits_per_byte']:.4f}", "(curves.png)", "[prompt] the state", f"{last['val_loss']:.4f}"):
        assert part in report


def test_the_data_index_and_the_report_name_the_held_out_documents(finished: Path, module_tiny) -> None:
    index = json.loads((finished / "data_index.json").read_text())
    config = module_tiny()
    source = open_source(config.data)
    is_held_out = heldout_rule(source, config.data.heldout)
    held_out = [document.name for document in source if is_held_out(document.name)]
    assert index["held_out_documents"] == held_out
    assert index["num_training_documents"] == len(source) - len(held_out)
    assert held_out[0] in (finished / "report.md").read_text()


def test_tensorboard_has_the_losses(finished: Path) -> None:
    board = EventAccumulator(str(finished / "tb"))
    board.Reload()
    assert [event.value for event in board.Scalars("train/loss")] == pytest.approx(losses(finished))
    assert [event.step for event in board.Scalars("eval/val_loss")] == [0, 3, 6]


def test_samples_before_and_after_differ_by_the_training_alone(finished: Path) -> None:
    before, after = ((finished / "samples" / f"{name}.txt").read_text() for name in ("before", "after"))
    assert before.splitlines()[0].replace("before training, step 0", "") == after.splitlines()[0].replace(
        "after training, step 6", ""
    )
    assert before.splitlines()[2] == after.splitlines()[2] == "[prompt] the state "
    assert before.splitlines()[3:] != after.splitlines()[3:]


def test_two_runs_with_one_seed_agree_bit_for_bit_and_another_seed_does_not(finished: Path, tiny) -> None:
    again = run(tiny(run={"name": "again"})).folder.path
    other = run(tiny(run={"name": "other", "seed": 1})).folder.path
    assert losses(again) == losses(finished)
    assert (again / "val.csv").read_text() == (finished / "val.csv").read_text()
    assert (again / "samples" / "after.txt").read_text() == (finished / "samples" / "after.txt").read_text()
    assert losses(other) != losses(finished)


def test_a_step_does_not_depend_on_how_it_is_cut_into_micro_batches(tiny) -> None:
    results = []
    for rows in (8, 2):
        trainer = Trainer(tiny(train={"batch_tokens": 512, "micro_batch_rows": rows}))
        assert trainer.config.num_micro_batches == 8 // rows
        records = [trainer.train_step() for _ in range(3)]
        results.append(([(record.loss, record.grad_norm) for record in records], list(trainer.model.parameters())))
    (whole, weights), (cut, cut_weights) = results
    torch.testing.assert_close(torch.tensor(cut), torch.tensor(whole), rtol=2e-5, atol=0)
    # AdamW divides by the gradient's size, so rounding of tiny gradients shows in full: compare the whole change.
    assert torch.allclose(
        torch.cat([p.flatten() for p in cut_weights]), torch.cat([p.flatten() for p in weights]), atol=2e-4
    )


def random_bytes(seed: int) -> Iterator[Batch]:
    """Endless fresh rows of uniform random bytes, each label the next byte."""
    draw = torch.Generator().manual_seed(seed)
    while True:
        bytes_ = torch.randint(0, 256, (4, 65), generator=draw)
        bounds = torch.arange(0, 4 * 64 + 1, 64, dtype=torch.int32)
        yield Batch(bytes_[:, :-1].clone(), bytes_[:, 1:].clone(), bounds, None)


def test_the_loss_weighs_every_valid_label_of_the_step_alike(tiny) -> None:
    """One micro-batch has a single label: loss and gradient are means over tokens, not over micro-batches."""
    trainer = Trainer(tiny(train={"batch_tokens": 512, "micro_batch_rows": 4}))
    full, sparse = next(random_bytes(0)), next(random_bytes(1))
    sparse.labels[:] = -100
    sparse.labels[2, 10] = 7
    by_token = []
    for batch in (full, sparse):
        log_probabilities = trainer.model(input_ids=batch.input_ids, use_cache=False).logits.log_softmax(-1)
        chosen = batch.labels.clamp(min=0).unsqueeze(-1)
        by_token.append(-log_probabilities.gather(-1, chosen).squeeze(-1)[batch.labels >= 0])
    mean = torch.cat(by_token).mean()
    gradients = torch.autograd.grad(mean, list(trainer.model.parameters()))
    trainer.batches = iter([full, sparse])
    record = trainer.train_step()
    assert record.loss == pytest.approx(mean.item(), rel=1e-5)
    assert record.grad_norm == pytest.approx(torch.cat([g.flatten() for g in gradients]).norm().item(), rel=1e-5)


def test_random_bytes_are_never_predicted_better_than_their_entropy(tiny) -> None:
    """Fresh random bytes at each step: a loss below ln 256 would mean that the model sees its labels."""
    config = tiny(
        train={"steps": 40, "batch_tokens": 1024, "micro_batch_rows": 4},
        optim={"warmup_steps": 2, "lr": 1e-2},
        guards={"entropy_floor_nats": math.log(256)},
    )
    trainer = Trainer(config)
    trainer.batches = random_bytes(0)
    steps = [trainer.train_step().loss for _ in range(40)]
    assert steps[0] == pytest.approx(math.log(259), abs=0.1)
    assert min(steps) > math.log(256) - 0.02
    assert sum(steps[-5:]) / 5 == pytest.approx(math.log(256), abs=0.1)


def test_a_model_that_sees_its_labels_is_an_error(tiny) -> None:
    config = tiny(
        train={"steps": 200}, optim={"warmup_steps": 2, "lr": 1e-2}, guards={"entropy_floor_nats": math.log(256)}
    )
    trainer, folder = prepare(config)
    trainer.batches = (replace(batch, input_ids=batch.labels) for batch in random_bytes(0))
    with pytest.raises(TrainingError, match=r"below the data's floor of 5\.5452"):
        train(trainer, folder)
    status = folder.read_status()
    assert status["state"] == "failed"
    assert "floor" in status["reason"]


def test_a_nan_ends_the_run_before_the_step_and_keeps_all_files(tiny, monkeypatch: pytest.MonkeyPatch) -> None:
    trainer, folder = prepare(tiny(train={"steps": 6, "checkpoint_every_steps": 2}))
    honest_step, weights = trainer.train_step, {}

    def damaged_at_4():
        if trainer.step == 3:
            weights.update({name: p.detach().clone() for name, p in trainer.model.named_parameters()})
            hook = trainer.model.lm_head.register_forward_hook(lambda *call: call[-1] * math.nan)
            try:
                return honest_step()
            finally:
                hook.remove()
        return honest_step()

    monkeypatch.setattr(trainer, "train_step", damaged_at_4)
    with pytest.raises(TrainingError, match=r"step 4 has loss nan .*still those of step 3"):
        train(trainer, folder)
    assert all(torch.equal(p, weights[name]) for name, p in trainer.model.named_parameters())
    status = folder.read_status()
    assert (status["state"], status["step"]) == ("failed", 3)
    assert "loss nan" in status["reason"]
    assert len(losses(folder.path)) == 3
    assert [row["step"] for row in read_csv(folder.val_csv, VALIDATION_COLUMNS)] == [0, 3]
    assert newest_checkpoint(folder.path).name == "step_000002"


def test_a_skipped_step_leaves_the_weights_and_the_run_goes_on(tiny) -> None:
    trainer = Trainer(tiny(guards={"on_nonfinite": "skip"}))
    before = [p.detach().clone() for p in trainer.model.parameters()]
    hook = trainer.model.lm_head.register_forward_hook(lambda *call: call[-1] * math.nan)
    assert math.isnan(trainer.train_step().loss)
    hook.remove()
    assert all(torch.equal(p, old) for p, old in zip(trainer.model.parameters(), before, strict=True))
    assert math.isfinite(trainer.train_step().loss)
    assert not all(torch.equal(p, old) for p, old in zip(trainer.model.parameters(), before, strict=True))
    assert trainer.guard.num_skipped == 1


def test_an_unexpected_error_is_recorded_and_not_swallowed(tiny, monkeypatch: pytest.MonkeyPatch) -> None:
    trainer, folder = prepare(tiny())
    honest_step = trainer.train_step

    def broken_at_3():
        if trainer.step == 2:
            raise MemoryError("no more")
        return honest_step()

    monkeypatch.setattr(trainer, "train_step", broken_at_3)
    with pytest.raises(MemoryError):
        train(trainer, folder)
    status = folder.read_status()
    assert (status["state"], status["step"], status["reason"]) == ("failed", 2, "MemoryError: no more")
    assert len(losses(folder.path)) == 2


@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGINT])
def test_a_signal_ends_the_run_after_its_step_with_a_checkpoint(
    tiny, monkeypatch: pytest.MonkeyPatch, number: signal.Signals
) -> None:
    trainer, folder = prepare(tiny())
    honest_step = trainer.train_step

    def signalled_in_2():
        if trainer.step == 1:
            os.kill(os.getpid(), number)
        return honest_step()

    monkeypatch.setattr(trainer, "train_step", signalled_in_2)
    before = signal.getsignal(number)
    outcome = train(trainer, folder)
    assert signal.getsignal(number) is before
    assert outcome.stopped_by == number.name
    status = folder.read_status()
    assert (status["state"], status["step"], status["reason"]) == ("stopped", 2, number.name)
    assert newest_checkpoint(folder.path).name == "step_000002"
    assert len(losses(folder.path)) == 2
    assert folder.curves_png.is_file()
    report = folder.report_md.read_text()
    assert f"was stopped by {number.name} after step 2 of 6" in report
    assert "nats per token, after step 0 |" in report  # of the last evaluation, before the stop


def test_a_run_without_progress_ends_early(tiny) -> None:
    config = tiny(
        train={"steps": 40, "early_stop_evals": 2}, eval={"every_steps": 2}, optim={"lr": 1e-12, "warmup_steps": 0}
    )
    trainer = Trainer(config)
    trainer.evaluate()
    first = trainer.evaluations[0]
    assert trainer.early_stop is None
    trainer.evaluations = [first] * 3
    assert trainer.early_stop == f"early stop: 2 evaluations in a row no better than {first.val_loss:.4f}"


def test_checkpoints_come_at_their_steps_and_the_last_one_always(tiny) -> None:
    folder = run(tiny(train={"steps": 5, "checkpoint_every_steps": 2, "keep_checkpoints": 9})).folder
    names = sorted(path.name for path in folder.checkpoints.iterdir())
    assert names == ["latest", "step_000002", "step_000004", "step_000005"]


def test_an_existing_run_folder_is_refused_and_left_alone(tiny, tmp_path: Path) -> None:
    kept = tmp_path / "runs" / "tiny" / "notes.txt"
    kept.parent.mkdir(parents=True)
    kept.write_text("mine")
    with pytest.raises(ValueError, match=r"exists already .*--run\.name tiny-2"):
        prepare(tiny())
    assert [path.name for path in kept.parent.iterdir()] == ["notes.txt"]
    assert kept.read_text() == "mine"


@pytest.mark.parametrize(
    ("changes", "words"),
    [
        ({"data": {"paths": ["absent.txt"]}}, "absent.txt"),
        ({"data": {"heldout": 0}}, "data.heldout"),
        ({"run": {"device": "tpu9"}}, "the device 'tpu9' is unknown"),
        ({"model": {"head_dim": 7}}, "head_dim"),
    ],
)
def test_bad_input_is_found_before_anything_is_written(tiny, tmp_path: Path, changes, words: str) -> None:
    with pytest.raises(ValueError, match=words):
        prepare(tiny(**changes))
    assert not (tmp_path / "runs").exists()


def test_bf16_trains_with_fp32_weights(tiny) -> None:
    trainer = Trainer(tiny(train={"precision": "bf16"}))
    records = [trainer.train_step() for _ in range(2)]
    assert all(math.isfinite(record.loss) for record in records)
    assert {p.dtype for p in trainer.model.parameters()} == {torch.float32}
    in_fp32 = Trainer(tiny()).train_step().loss
    assert records[0].loss == pytest.approx(in_fp32, rel=0.01)
    assert records[0].loss != in_fp32


def test_a_device_that_is_not_here_is_refused() -> None:
    assert choose_device("cpu") == torch.device("cpu")
    with pytest.raises(ValueError, match="CUDA devices"):
        choose_device("cuda:99")


def test_a_run_computes_with_the_threads_of_its_config(tiny) -> None:
    before = torch.get_num_threads()
    try:
        Trainer(tiny(run={"num_threads": 3}))
        assert torch.get_num_threads() == 3
    finally:
        torch.set_num_threads(before)
