"""Two processes stop together, resume bit for bit under DDP and FSDP2, and go on with another number of ranks."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file

from nsa.train.checkpoint import damage, newest_checkpoint
from nsa.train.config import RunConfig
from nsa.train.observe.csv_log import TRAINING_COLUMNS, read_csv
from nsa.train.resume import prepare_resume
from nsa.train.run import prepare, train
from ranks import run_ranks

TRAIN = {"steps": 6, "checkpoint_every_steps": 2, "micro_batch_rows": 2, "keep_checkpoints": 9}

STOP_AND_RESUME = """
import os, signal
from pathlib import Path
from nsa.train.config import RunConfig
from nsa.train.resume import prepare_resume
from nsa.train.run import prepare, train

whole, stopped = (RunConfig.model_validate(values) for values in given)
with setup_parallel("cpu", whole.train.parallel, timeout_s=100) as parallel:
    train(*prepare(whole, parallel=parallel))
    trainer, folder = prepare(stopped, parallel=parallel)
    honest_step = trainer.train_step

    def interrupted():
        if trainer.step == 2 and parallel.rank == 1:
            os.kill(os.getpid(), signal.SIGTERM)
        return honest_step()

    trainer.train_step = interrupted
    first = train(trainer, folder)
    parallel.barrier()
    status = folder.read_status()
    ended_at = trainer.step
    parallel.barrier()
    second = train(*prepare_resume(folder.path, parallel=parallel), resumed=True)
    report((first.stopped_by, ended_at, (status["state"], status["step"], status["rank"]), second.stopped_by))
"""


def config(tiny: Callable[..., RunConfig], name: str, mode: str) -> RunConfig:
    return tiny(run={"name": name, "num_threads": 1}, train=TRAIN | {"parallel": mode})


def losses(folder: Path) -> list[float]:
    rows = read_csv(folder / "training.csv", TRAINING_COLUMNS)
    assert [row["step"] for row in rows] == list(range(1, 7))
    return [row["loss"] for row in rows]


def weights(folder: Path) -> dict[str, torch.Tensor]:
    return load_file(newest_checkpoint(folder) / "model.safetensors")


@pytest.fixture(scope="module", params=["ddp", "fsdp2"])
def runs(request: pytest.FixtureRequest, module_tiny: Callable[..., RunConfig]) -> dict[str, Any]:
    """Folders of two runs of two ranks, one of them stopped by a signal to rank 1 and resumed; what the ranks saw."""
    whole, stopped = (config(module_tiny, f"{name}-{request.param}", request.param) for name in ("whole", "stopped"))
    seen = run_ranks(STOP_AND_RESUME, [whole.model_dump(mode="json"), stopped.model_dump(mode="json")])
    root = Path(whole.run.folder)
    return {"seen": seen, "whole": root / whole.run.name, "stopped": root / stopped.run.name}


def test_a_signal_to_one_of_two_ranks_stops_both_after_the_same_step(runs: dict[str, Any]) -> None:
    expected = ("SIGTERM", 3, ("stopped", 3, 1), None)
    assert runs["seen"] == [expected, expected]
    assert (runs["stopped"] / "checkpoints" / "step_000003" / "random_rank1.pt").is_file()


def test_a_run_of_two_ranks_resumes_bit_for_bit(runs: dict[str, Any]) -> None:
    assert losses(runs["stopped"]) == losses(runs["whole"])
    one, other = weights(runs["stopped"]), weights(runs["whole"])
    assert one.keys() == other.keys()
    assert all(torch.equal(one[name], other[name]) for name in one)
    assert damage(newest_checkpoint(runs["stopped"])) is None


def test_one_process_goes_on_where_two_were(runs: dict[str, Any], capsys: pytest.CaptureFixture[str]) -> None:
    folder = runs["whole"]
    (folder / "checkpoints" / "step_000006" / "complete.json").unlink()
    before = losses(folder)
    outcome = train(*prepare_resume(folder, ["--train.parallel", "none"]), resumed=True)
    assert outcome.stopped_by is None
    assert "was written by 2 ranks and is continued by 1" in capsys.readouterr().out
    assert losses(folder) == pytest.approx(before, rel=1e-4)
    assert json.loads((folder / "status.json").read_text())["resumed_from"]["world_size"] == 1


def test_two_ranks_go_on_where_one_process_was(tiny: Callable[..., RunConfig]) -> None:
    alone = config(tiny, "alone", "auto")
    trainer, folder = prepare(alone)
    train(trainer, folder)
    before = losses(folder.path)
    (folder.path / "checkpoints" / "step_000006" / "complete.json").unlink()
    body = """
    from pathlib import Path
    from nsa.train.resume import prepare_resume
    from nsa.train.run import train
    with setup_parallel("cpu", "fsdp2", timeout_s=100) as parallel:
        trainer, folder = prepare_resume(Path(given), ["--train.parallel", "fsdp2"], parallel=parallel)
        start = trainer.step
        train(trainer, folder, resumed=True)
        report((start, trainer.step))
    """
    assert run_ranks(body, str(folder.path)) == [(4, 6), (4, 6)]
    assert losses(folder.path) == pytest.approx(before, rel=1e-4)


FULL_DISK = """
import errno, os
from nsa.train.checkpoint import CheckpointError
from nsa.train.config import RunConfig
from nsa.train.run import prepare, train
from torch.distributed.checkpoint.filesystem import FileSystemWriter

honest = FileSystemWriter.write_data

def full(self, *args):
    written = honest(self, *args)
    if parallel.rank == 1 and "step_000004" in str(self.path):
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))
    return written

FileSystemWriter.write_data = full
with setup_parallel("cpu", "ddp", timeout_s=100) as parallel:
    trainer, folder = prepare(RunConfig.model_validate(given), parallel=parallel)
    try:
        train(trainer, folder)
    except CheckpointError as error:
        parallel.barrier()
        report((trainer.step, str(error), folder.read_status()))
"""


def test_a_full_disk_on_one_rank_ends_both_after_the_same_step(tiny: Callable[..., RunConfig]) -> None:
    values = config(tiny, "full", "ddp")
    (first, message, status), (second, other_message, _) = run_ranks(FULL_DISK, values.model_dump(mode="json"))
    assert first == second
    for text in (message, other_message, status["reason"]):
        assert "step_000004 could not be written: rank 1: OSError: [Errno 28] No space left on device" in text
    assert (status["state"], status["step"]) == ("failed", first)
    folder = Path(values.run.folder) / "full"
    assert sorted(path.name for path in (folder / "checkpoints").iterdir()) == ["latest", "step_000002"]
