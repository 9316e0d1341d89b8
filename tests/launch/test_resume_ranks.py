"""Two processes stop together, resume bit for bit under DDP and FSDP2, and go on with another number of ranks."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file

from nsa.config.run import RunConfig
from nsa.launch.resume import prepare_resume
from nsa.launch.resume_config import resumed_config
from nsa.launch.start import prepare
from nsa.runs.checkpoints import damage, newest_checkpoint
from nsa.runs.tables import TRAINING_COLUMNS, read_csv
from nsa.train.loop import train
from ranks import run_ranks

TRAIN = {"steps": 6, "checkpoint_every_steps": 2, "micro_batch_rows": 2, "keep_checkpoints": 9}

STOP_AND_RESUME = """
import os, signal
from pathlib import Path
from nsa.config.run import RunConfig
from nsa.launch.resume import prepare_resume
from nsa.launch.resume_config import resumed_config
from nsa.launch.start import prepare
from nsa.train.loop import train

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
    second = train(*prepare_resume(resumed_config(folder.path), parallel=parallel))
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
    outcome = train(*prepare_resume(resumed_config(folder, ["--train.parallel", "none"])))
    assert outcome.stopped_by is None
    assert "was written by 2 ranks and is continued by 1" in capsys.readouterr().out
    assert losses(folder) == pytest.approx(before, rel=1e-4)
    assert json.loads((folder / "status.json").read_text())["resumed_from"]["world_size"] == 1


FULL_DISK_THEN_RESUME = """
import errno, os
from pathlib import Path
from nsa.runs.errors import CheckpointError
from nsa.config.run import RunConfig
from nsa.launch.resume import prepare_resume
from nsa.launch.resume_config import resumed_config
from nsa.launch.start import prepare
from nsa.train.loop import train
from torch.distributed.checkpoint.filesystem import FileSystemWriter

honest = FileSystemWriter.write_data

def full(self, *args):
    written = honest(self, *args)
    if parallel.rank == 1 and "step_000004" in str(self.path):
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))
    return written

values, alone = given
with setup_parallel("cpu", "fsdp2", timeout_s=100) as parallel:
    FileSystemWriter.write_data = full
    trainer, folder = prepare(RunConfig.model_validate(values), parallel=parallel)
    try:
        train(trainer, folder)
    except CheckpointError as error:
        parallel.barrier()
        failure = (trainer.step, str(error), folder.read_status())
    FileSystemWriter.write_data = honest
    trainer, folder = prepare_resume(resumed_config(Path(alone), ["--train.parallel", "fsdp2"]), parallel=parallel)
    steps = [trainer.step]
    train(trainer, folder)
    report((failure, [*steps, trainer.step]))
"""


@pytest.fixture(scope="module")
def more_runs(module_tiny: Callable[..., RunConfig]) -> dict[str, Any]:
    """A run of two ranks whose second meets a full disk, and one that they continue for a single process."""
    full, alone = config(module_tiny, "full", "fsdp2"), config(module_tiny, "alone", "auto")
    folder = train(*prepare(alone)).folder.path
    before = losses(folder)
    (folder / "checkpoints" / "step_000006" / "complete.json").unlink()
    seen = run_ranks(FULL_DISK_THEN_RESUME, (full.model_dump(mode="json"), str(folder)))
    return {"seen": seen, "full": folder.parent / "full", "alone": folder, "before": before}


def test_two_ranks_go_on_where_one_process_was(more_runs: dict[str, Any]) -> None:
    assert [steps for _, steps in more_runs["seen"]] == [[4, 6], [4, 6]]
    assert losses(more_runs["alone"]) == pytest.approx(more_runs["before"], rel=1e-4)


def test_a_full_disk_on_one_rank_ends_both_after_the_same_step(more_runs: dict[str, Any]) -> None:
    (first, message, status), (second, other_message, _) = [failure for failure, _ in more_runs["seen"]]
    assert first == second
    for text in (message, other_message, status["reason"]):
        assert "step_000004 could not be written: rank 1: OSError: [Errno 28] No space left on device" in text
    assert (status["state"], status["step"]) == ("failed", first)
    checkpoints = more_runs["full"] / "checkpoints"
    assert sorted(path.name for path in checkpoints.iterdir()) == ["latest", "step_000002"]
