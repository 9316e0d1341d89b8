"""Reading a checkpoint back into a run: which one, whether it is as it was written, and its state."""

from __future__ import annotations

from pathlib import Path

import torch
from torch.distributed.checkpoint.api import CheckpointException
from torch.distributed.checkpoint.state_dict import (
    StateDictOptions,
    set_model_state_dict,
    set_optimizer_state_dict,
)
from torch.distributed.checkpoint.state_dict_loader import load

from nsa.runs.checkpoints import STATE, Listing, damage, random_file, step_folders, step_of
from nsa.runs.errors import CheckpointError
from nsa.runs.files import put_aside
from nsa.train.checkpoint.read import METADATA, UNREADABLE, PlainPlanner, PlainReader
from nsa.train.checkpoint.rng import seed_rank, set_random_state
from nsa.train.checkpoint.save import MODEL, OPTIMIZER, failure, silent_about_no_group, training_state
from nsa.train.parallel import Parallel

DAMAGED = "damaged_"  # a prefix that takes a folder out of the scan


def choose_checkpoint(checkpoints: Path) -> tuple[Path | None, list[str]]:
    """The newest checkpoint whose every file is as it was written; on one rank.

    Folders that are not are renamed to `damaged_step_...`, so that they are neither chosen nor counted again.

    Returns:
        The checkpoint, or None where there is no folder of one, and a line about each damaged folder.

    Raises:
        ValueError: there are folders of checkpoints, but each is damaged; they are left as they are.
    """
    damaged: dict[Path, str] = {}
    for checkpoint in reversed(step_folders(checkpoints)):
        problem = damage(checkpoint)
        if problem is None and not (checkpoint / STATE / METADATA).is_file():
            problem = f"{checkpoint} holds a model, but no state of training"
        if problem is None:
            return checkpoint, [_set_aside(path, damaged[path]) for path in damaged]
        damaged[checkpoint] = problem
    if damaged:
        raise ValueError(
            f"every checkpoint in {checkpoints} is damaged: {'; '.join(damaged.values())}. Nothing was changed; "
            f"restore one from a copy, or begin anew under another run.name"
        )
    return None, []


def load_checkpoint(
    checkpoint: Path, *, model: torch.nn.Module, optimizer: torch.optim.Optimizer, parallel: Parallel
) -> None:
    """Put weights and optimizer state back, on all ranks, whose number may differ from that of the writers.

    Args:
        checkpoint: a folder that `choose_checkpoint` gave.
        model: of the same config; its weights are replaced.
        optimizer: of the model.
        parallel: this process among those of the run.

    Raises:
        CheckpointError: it cannot be read, or belongs to another model.
    """
    model_state, optimizer_state = training_state(model, optimizer)
    state = {MODEL: model_state, OPTIMIZER: optimizer_state}
    reader, planner = PlainReader(checkpoint / STATE), PlainPlanner()
    try:
        reader.read_metadata()  # DCP would report its errors at length, and look for other files
        with silent_about_no_group():
            load(state, storage_reader=reader, planner=planner, no_dist=parallel.world_size == 1)
    except (CheckpointException, OSError, RuntimeError, ValueError) as error:
        cause = failure(error, parallel.rank)
        raise CheckpointError(f"the checkpoint {checkpoint} cannot be read into this model: {cause}") from error
    # A shared weight is stored once; everything else was demanded by `load` already.
    set_model_state_dict(model, state[MODEL], options=StateDictOptions(strict=False))
    set_optimizer_state_dict(model, optimizer, optim_state_dict=state[OPTIMIZER])


def restore_random_state(checkpoint: Path, *, seed: int, parallel: Parallel) -> str | None:
    """Put this rank's random generators back; with another number of ranks seed them anew.

    Returns:
        A line about generators that were seeded anew, or None.
    """
    written_by = Listing.read(checkpoint).world_size
    step = step_of(checkpoint)
    if written_by == parallel.world_size:
        path = checkpoint / random_file(parallel.rank)
        try:
            set_random_state(torch.load(path, map_location="cpu", weights_only=True), parallel.device)
        except UNREADABLE as error:
            raise CheckpointError(f"{path} holds no random states, and is not read; restore it from a copy") from error
        return None
    seed_rank(seed, step, parallel.rank)
    return (
        f"{checkpoint.name} was written by {written_by} ranks and is continued by {parallel.world_size}: each rank's "
        f"random numbers begin anew from run.seed, step and rank, and sums over ranks may differ in their last bits"
    )


def _set_aside(folder: Path, problem: str) -> str:
    """Rename a damaged folder and say so."""
    target = put_aside(folder, DAMAGED)
    return f"damaged checkpoint skipped: {problem}; the folder is now {target.name}"
