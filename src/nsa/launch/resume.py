"""Resuming a run that was stopped, killed or failed: `nsa resume RUN [--section.key value ...]`.

    stored = resumed_config(Path("runs/NAME"), ["--train.steps", "800"])
    outcome = train(*prepare_resume(stored))

The run resumes from the newest checkpoint whose every file is as it was written; one that was killed before its first
checkpoint begins again. The stored config is used; `nsa.config.resume_keys` lists what may be changed.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from nsa.config.load import dump_config, read_config
from nsa.config.run import RunConfig
from nsa.launch.environment import snapshot
from nsa.launch.resume_config import StoredConfig, changed_keys, check_unchanged
from nsa.preflight.examine import examine_resume
from nsa.runs.checkpoints import RUN_CONFIG
from nsa.runs.files import check_run_files
from nsa.runs.folder import RunFolder, read_json, write_json, write_text
from nsa.runs.halt import clear_stale_halt
from nsa.runs.restore import put_damaged_beats_aside, restore_tables
from nsa.terminal import printable
from nsa.train.checkpoint.load import choose_checkpoint
from nsa.train.parallel import Parallel, on_main, one_process
from nsa.train.summary import data_index, describe
from nsa.train.trainer import Trainer

IN_REPORT = {"description", "replaced_because", "held_out_documents"}  # what a report needs of `data_index.json`


@dataclass(frozen=True)
class ResumedFrom:
    """Where a run resumes, for `status.json` and `env.json`.

    Attributes:
        checkpoint: name of its folder, or None for a run that begins again.
        step: optimizer steps done.
        count: how often the run has been resumed, this time included.
        unix_time_s: when.
        world_size: ranks that resume it.
        changed: keys of the config with the values before the checkpoint and from now on.
    """

    checkpoint: str | None
    step: int
    count: int
    unix_time_s: float
    world_size: int
    changed: dict[str, list[Any]]


def prepare_resume(
    stored: StoredConfig, command: Sequence[str] = (), parallel: Parallel | None = None
) -> tuple[Trainer, RunFolder]:
    """Check and build everything, load the newest undamaged checkpoint, and only then change the run folder.

    Damaged checkpoints are set aside before it is known whether the others load.

    Args:
        stored: the run's config, by `resumed_config`; this process locks its folder.
        command: the command line, for `env.json`.
        parallel: this process among those of the run; one process unless given.

    Raises:
        ValueError: there is nothing to resume, another process still runs, or preflight refuses, as for a full disk.
        CheckpointError: the checkpoint does not fit the model of the config.
    """
    parallel = parallel or one_process(stored.wanted.run.device)
    folder = RunFolder(stored.run)
    say = _say if parallel.is_main else _nothing
    if note := on_main(parallel, folder.lock.acquire):
        say(f"note: {note}")
    try:
        return _prepare_locked(folder, stored, command, parallel, say)
    except BaseException:
        folder.lock.close()
        raise


def _prepare_locked(
    folder: RunFolder,
    stored: StoredConfig,
    command: Sequence[str],
    parallel: Parallel,
    say: Callable[[str], object],
) -> tuple[Trainer, RunFolder]:
    config = stored.wanted
    before = on_main(parallel, lambda: _look_into(folder, config, parallel))
    if stored.note:
        say(f"note: {stored.note}")
    say(f"checking the checkpoints in {folder.checkpoints}")
    checkpoint, damaged = on_main(parallel, lambda: choose_checkpoint(folder.checkpoints))
    for note in damaged:
        say(f"note: {note}")
    trained = stored.trained
    if checkpoint is not None:
        # Its contents were read only now: it may be an older one than that whose config was taken.
        source = checkpoint / RUN_CONFIG
        trained = read_config(source)
        check_unchanged(trained, config, path=folder.config_yaml, source=source)
    trainer = Trainer(config, parallel, checkpoint=checkpoint)
    if trainer.resume_note:
        say(f"note: {trainer.resume_note}")
    done = before.get("state") == "finished" and not before.get("report_failure")
    if done and trainer.step >= config.train.steps:
        raise ValueError(
            f"{folder.path} has finished its {config.train.steps} steps; to continue, give more: --train.steps "
            f"{2 * config.train.steps}"
        )
    if checkpoint is None and before.get("state") in ("finished", "stopped") and before.get("step"):
        raise ValueError(
            f"{folder.path} was {before['state']} after step {before['step']}, but {folder.checkpoints} holds no "
            f"checkpoint; restore one from a copy, or begin anew: nsa train {folder.config_yaml} --run.name "
            f"{config.run.name}-2"
        )
    changed = changed_keys(trained, config)
    name = checkpoint and checkpoint.name
    resumed = ResumedFrom(name, trainer.step, _count(before) + 1, time.time(), parallel.world_size, changed)
    say(describe(trainer))
    say(_announcement(folder, resumed))
    env = snapshot(trainer.device, command)
    for note in on_main(parallel, lambda: _record(folder, trainer, checkpoint, resumed, env)):
        say(f"note: {note}")
    return trainer, folder


def _look_into(folder: RunFolder, config: RunConfig, parallel: Parallel) -> dict[str, Any]:
    """What `status.json` says, {} where it is lost; raises `ValueError` for what would end the run later on."""
    check_run_files(folder.path)
    examine_resume(config, folder.path, world_size=parallel.world_size).raise_if_refused()
    return read_json(folder.status_json) or {}


def _count(status: dict[str, Any]) -> int:
    """How often a run has been resumed, by its status, which may be damaged."""
    resumed_from = status.get("resumed_from")
    count = resumed_from.get("count") if isinstance(resumed_from, dict) else None
    return count if isinstance(count, int) else 0


def _record(
    folder: RunFolder, trainer: Trainer, checkpoint: Path | None, resumed: ResumedFrom, env: dict[str, Any]
) -> list[str]:
    """Write config, environment and status of the resumed run, and what of the folder was lost.

    Returns:
        A line about everything that was put aside, restored or lost.
    """
    stale = clear_stale_halt(folder.halt, folder.lock.since_ns())
    notes = [*([stale] if stale else []), *restore_tables(folder, checkpoint, resumed.step)]
    notes += put_damaged_beats_aside(folder)
    write_text(folder.config_yaml, dump_config(trainer.config))
    folder.samples.mkdir(exist_ok=True)
    if not (read_json(folder.data_index_json) or {}).keys() >= IN_REPORT:
        write_json(folder.data_index_json, data_index(trainer))
    first = env | (read_json(folder.env_json) or {})
    now = {name: value for name, value in env.items() if first.get(name) != value}
    before = first.get("resumed")
    all_resumed = [*(before if isinstance(before, list) else []), {**vars(resumed), **now}]
    write_json(folder.env_json, {**first, "resumed": all_resumed})
    folder.begin_again(step=resumed.step, resumed_from=vars(resumed))
    return notes


def _announcement(folder: RunFolder, resumed: ResumedFrom) -> str:
    lines = [f"resuming {folder.path} from {resumed.checkpoint or 'its beginning: there is no checkpoint yet'}"]
    lines += [f"{name}: {old} -> {new}" for name, (old, new) in resumed.changed.items()]
    if "train.steps" in resumed.changed:
        lines.append("the learning rate follows the schedule of the new train.steps from here on")
    return "\n".join(lines)


def _say(text: str) -> None:
    print(printable(text), flush=True)


def _nothing(text: str) -> None:
    """What the other ranks say."""
