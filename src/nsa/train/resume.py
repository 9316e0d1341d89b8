"""Going on with a run after it was stopped, killed or failed: `nsa resume RUN [--section.key value ...]`.

    trainer, folder = prepare_resume(Path("runs/NAME"), ["--train.steps", "800"])
    outcome = train(trainer, folder, resumed=True)

The newest checkpoint whose every file is as it was written decides where the run goes on; a run that was killed before
its first checkpoint begins again. The stored config is used; what may be changed is listed in `ALLOWED`.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, TypeVar

from nsa.train.checkpoint_load import choose_checkpoint
from nsa.train.config import RunConfig
from nsa.train.load_config import dump_config, load_config, override_config
from nsa.train.observe.csv_log import HEALTH_COLUMNS, TRAINING_COLUMNS, VALIDATION_COLUMNS, read_csv
from nsa.train.observe.environment import snapshot
from nsa.train.observe.heartbeat import heartbeat_files, read_heartbeats
from nsa.train.observe.summary import data_index, describe
from nsa.train.parallel import Parallel, one_process
from nsa.train.preflight.report import examine_resume
from nsa.train.resume_keys import ALLOWED, ALLOWED_SECTIONS
from nsa.train.run_folder import RunFolder, read_json, write_json, write_text
from nsa.train.stop import clear_stale_halt
from nsa.train.trainer import Trainer

T = TypeVar("T")


@dataclass(frozen=True)
class ResumedFrom:
    """Where a run goes on, for `status.json` and `env.json`.

    Attributes:
        checkpoint: name of its folder, or None for a run that begins again.
        step: optimizer steps done.
        count: how often the run has been resumed, this time included.
        unix_time_s: when.
        world_size: ranks that go on.
        changed: keys of the config with their old and new values.
    """

    checkpoint: str | None
    step: int
    count: int
    unix_time_s: float
    world_size: int
    changed: dict[str, list[Any]]


def prepare_resume(
    run: Path, overrides: Sequence[str] = (), command: Sequence[str] = (), parallel: Parallel | None = None
) -> tuple[Trainer, RunFolder]:
    """Check and build everything, load the newest undamaged checkpoint, and only then change the run folder.

    Damaged checkpoints are set aside before it is known whether the others load.

    Args:
        run: the run folder, which this process locks.
        overrides: such as `["--train.steps", "800"]`.
        command: the command line, for `env.json`.
        parallel: this process among those of the run; one process unless given.

    Raises:
        ValueError: there is nothing to resume, another process still runs, an override is not allowed, or preflight
            refuses, as for a full disk.
        CheckpointError: the checkpoint does not fit the model of the config.
    """
    stored, config = resumed_config(run, overrides)
    parallel = parallel or one_process(config.run.device)
    folder = RunFolder(run)
    say = print if parallel.is_main else _nothing
    if note := on_main(parallel, folder.lock.acquire):
        say(f"note: {note}")
    try:
        return _prepare_locked(folder, stored, config, command, parallel, say)
    except BaseException:
        folder.lock.close()
        raise


def resumed_config(run: Path, overrides: Sequence[str]) -> tuple[RunConfig, RunConfig]:
    """The stored config of a run, and the same with overrides.

    Raises:
        ValueError: this is no run folder, or an override is not allowed.
    """
    path = run / "config.yaml"
    if not path.is_file():
        raise ValueError(
            f"{run} is no run folder: it holds no config.yaml; give the folder of a run, such as runs/NAME"
        )
    stored = load_config(path)
    config = override_config(stored, overrides)
    refused = [name for name in changed_keys(stored, config) if not _allowed(name)]
    if refused:
        lines = [f"  {name}" for name in refused]
        raise ValueError(
            "\n".join(
                [
                    "a resumed run keeps what decides its steps, so these cannot be changed:",
                    *lines,
                    f"Begin a new run for that: nsa train {path} --run.name {config.run.name}-2 ... "
                    f"A resumed run may change {', '.join(sorted(ALLOWED))} and the sections "
                    f"{', '.join(ALLOWED_SECTIONS)}.",
                ]
            )
        )
    return stored, config


def changed_keys(before: RunConfig, after: RunConfig) -> dict[str, list[Any]]:
    """Dotted keys whose values differ, with the value before and after."""
    old, new = before.model_dump(mode="json"), after.model_dump(mode="json")
    return {
        f"{section}.{key}": [old[section][key], new[section][key]]
        for section in new
        for key in new[section]
        if old[section][key] != new[section][key]
    }


def on_main(parallel: Parallel, action: Callable[[], T]) -> T:
    """Rank 0's result of `action` on all ranks; a `ValueError` or `OSError` of rank 0 is raised on all of them."""
    result, error = None, None
    if parallel.is_main:
        try:
            result = action()
        except (ValueError, OSError) as caught:
            error = caught
    result, error = parallel.broadcast((result, error))
    if error is not None:
        raise error
    return result  # pyright: ignore[reportReturnType]


def _prepare_locked(
    folder: RunFolder,
    stored: RunConfig,
    config: RunConfig,
    command: Sequence[str],
    parallel: Parallel,
    say: Callable[[str], object],
) -> tuple[Trainer, RunFolder]:
    before = on_main(parallel, lambda: _look_into(folder, config, parallel))
    trainer = Trainer(config, parallel)
    say(f"checking the checkpoints in {folder.checkpoints}")
    checkpoint, damaged = on_main(parallel, lambda: choose_checkpoint(folder.checkpoints))
    for note in damaged:
        say(f"note: {note}")
    if checkpoint is not None and (note := trainer.load(checkpoint)):
        say(f"note: {note}")
    if before.get("state") == "finished" and trainer.step >= config.train.steps:
        raise ValueError(
            f"{folder.path} has finished its {config.train.steps} steps; to go on, give more: --train.steps "
            f"{2 * config.train.steps}"
        )
    if checkpoint is None and before.get("state") in ("finished", "stopped") and before.get("step"):
        raise ValueError(
            f"{folder.path} was {before['state']} after step {before['step']}, but {folder.checkpoints} holds no "
            f"checkpoint; restore one from a copy, or begin anew: nsa train {folder.config_yaml} --run.name "
            f"{config.run.name}-2"
        )
    count = ((before.get("resumed_from") or {}).get("count") or 0) + 1
    changed = changed_keys(stored, config)
    source = checkpoint and checkpoint.name
    resumed = ResumedFrom(source, trainer.step, count, time.time(), parallel.world_size, changed)
    say(describe(trainer))
    say(_announcement(folder, resumed))
    env = snapshot(trainer.device, command)
    if note := on_main(parallel, lambda: _record(folder, trainer, resumed, env)):
        say(f"note: {note}")
    return trainer, folder


def _look_into(folder: RunFolder, config: RunConfig, parallel: Parallel) -> dict[str, Any]:
    """What `status.json` says, {} where it is lost; raises `ValueError` for what would end the run later on.

    Tables and beats are read again when the run ends: one that cannot be read must not cost the report then.
    """
    examine_resume(config, folder.path, world_size=parallel.world_size).raise_if_refused()
    tables = {
        folder.training_csv: TRAINING_COLUMNS,
        folder.val_csv: VALIDATION_COLUMNS,
        folder.health_csv: HEALTH_COLUMNS,
    }
    for path, columns in tables.items():
        if path.is_file():
            _readable(path, lambda path=path, columns=columns: read_csv(path, columns))
    for path in heartbeat_files(folder.path).values():
        _readable(path, lambda path=path: read_heartbeats(path))
    return read_json(folder.status_json) or {}


def _readable(path: Path, read: Callable[[], object]) -> None:
    try:
        read()
    except ValueError as error:
        raise ValueError(f"{error}; correct that line, or move {path} away, and a new one is begun") from None


def _record(folder: RunFolder, trainer: Trainer, resumed: ResumedFrom, env: dict[str, Any]) -> str | None:
    """Write config, environment and status of the resumed run, and what of the folder was lost.

    Returns:
        A line about a stale HALT file, or None.
    """
    note = clear_stale_halt(folder.halt)
    write_text(folder.config_yaml, dump_config(trainer.config))
    folder.samples.mkdir(exist_ok=True)
    if read_json(folder.data_index_json) is None:
        write_json(folder.data_index_json, data_index(trainer))
    first = read_json(folder.env_json) or env
    now = {name: value for name, value in env.items() if first.get(name) != value}
    write_json(folder.env_json, {**first, "resumed": [*first.get("resumed", []), {**vars(resumed), **now}]})
    folder.begin_again(step=resumed.step, resumed_from=vars(resumed))
    return note


def _announcement(folder: RunFolder, resumed: ResumedFrom) -> str:
    lines = [f"resuming {folder.path} from {resumed.checkpoint or 'its beginning: there is no checkpoint yet'}"]
    lines += [f"{name}: {old} -> {new}" for name, (old, new) in resumed.changed.items()]
    if "train.steps" in resumed.changed:
        lines.append("the learning rate follows the schedule of the new train.steps from here on")
    return "\n".join(lines)


def _allowed(name: str) -> bool:
    return name in ALLOWED or name.partition(".")[0] in ALLOWED_SECTIONS


def _nothing(text: str) -> None:
    """What the other ranks say."""
