"""kill -9 at every stage of a step and of a save: the newest whole checkpoint is found and the run ends up the same."""

from __future__ import annotations

import multiprocessing
import os
import pkgutil
import signal
from collections.abc import Callable
from multiprocessing.context import ForkServerContext
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file

from nsa.config.run import RunConfig
from nsa.launch.resume import prepare_resume
from nsa.launch.resume_config import resumed_config
from nsa.launch.start import prepare
from nsa.runs.checkpoints import complete_checkpoints, damage, newest_checkpoint
from nsa.runs.tables import TRAINING_COLUMNS, read_csv
from nsa.train.loop import train

TRAIN = {"steps": 6, "checkpoint_every_steps": 2, "keep_checkpoints": 1}
TIMEOUT_S = 120

# Stage -> what is killed when it is called for the checkpoint of step 4, and the step of the newest whole checkpoint.
STAGES = {
    "a step": ("nsa.train.trainer.Trainer", "_backward", 2),
    "staging": ("torch.distributed.checkpoint.staging.BlockingAsyncStager", "stage", 2),
    "writing the parts": ("torch.distributed.checkpoint.filesystem", "_write_item", 2),
    "adding checksums": ("nsa.train.checkpoint.save.FileSum", "of", 2),
    "writing the model": ("nsa.train.checkpoint.save", "_read_weights", 2),
    "renaming": ("nsa.runs.checkpoints.os", "replace", 2),
    "pointing": ("nsa.runs.checkpoints", "_point", 4),
    "removing old ones": ("nsa.runs.checkpoints.shutil", "rmtree", 4),
}


def train_until_killed(values: dict[str, Any], place: str, name: str) -> None:
    """In a process of its own: train, and die where `place.name` is called for the checkpoint of step 4."""
    torch.set_num_threads(1)
    trainer, folder = prepare(RunConfig.model_validate(values))
    owner = pkgutil.resolve_name(place)
    honest_step, honest_save = trainer.train_step, trainer.save

    def kill(*args: object, **kwargs: object) -> None:
        os.kill(os.getpid(), signal.SIGKILL)

    def step() -> Any:
        if trainer.step == 3 and place.endswith("Trainer"):
            setattr(owner, name, kill)
        return honest_step()

    def save(checkpointer: Any) -> None:
        if trainer.step == 4:
            setattr(owner, name, kill)
        honest_save(checkpointer)
        checkpointer.wait()

    trainer.train_step, trainer.save = step, save
    train(trainer, folder)


@pytest.fixture(scope="module")
def processes() -> ForkServerContext:
    """Processes that begin with the imports done, and no threads."""
    context = multiprocessing.get_context("forkserver")
    context.set_forkserver_preload(["nsa.train.loop"])
    return context


@pytest.fixture(scope="module")
def whole(module_tiny: Callable[..., RunConfig]) -> Path:
    """The folder of a run that nothing killed."""
    return train(*prepare(module_tiny(run={"name": "whole"}, train=TRAIN))).folder.path


def losses(folder: Path) -> list[tuple[Any, Any]]:
    return [(row["step"], row["loss"]) for row in read_csv(folder / "training.csv", TRAINING_COLUMNS)]


@pytest.mark.parametrize("stage", STAGES)
def test_a_killed_run_ends_up_as_if_it_had_not_been(
    whole: Path, tiny: Callable[..., RunConfig], processes: ForkServerContext, stage: str
) -> None:
    place, name, newest = STAGES[stage]
    config = tiny(train=TRAIN)
    process = processes.Process(target=train_until_killed, args=(config.model_dump(mode="json"), place, name))
    process.start()
    process.join(TIMEOUT_S)
    assert process.exitcode == -signal.SIGKILL
    folder = Path(config.run.folder) / config.run.name
    assert newest_checkpoint(folder).name == f"step_{newest:06d}"
    assert damage(newest_checkpoint(folder)) is None
    trainer, opened = prepare_resume(resumed_config(folder))
    assert trainer.step == newest
    train(trainer, opened)
    assert losses(folder) == losses(whole)
    one, other = (load_file(newest_checkpoint(run) / "model.safetensors") for run in (folder, whole))
    assert all(torch.equal(one[key], other[key]) for key in other)
    assert [path.name for path in complete_checkpoints(folder / "checkpoints")] == ["step_000006"]
    assert not list((folder / "checkpoints").glob(".*"))
