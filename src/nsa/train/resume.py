"""Going on with a run after it was stopped, killed or failed: `nsa resume RUN [--section.key value ...]`.

    trainer, folder = prepare_resume(Path("runs/NAME"), ["--train.steps", "800"])
    outcome = train(trainer, folder, resumed=True)

The newest checkpoint whose every file is as it was written decides where the run goes on; a run that was killed before
its first checkpoint begins again. The stored config is used; what may be changed is listed in `ALLOWED`.
"""

from __future__ import annotations

import json
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, TypeVar

from nsa.train.checkpoint_load import choose_checkpoint
from nsa.train.config import RunConfig
from nsa.train.load_config import dump_config, load_config, override_config
from nsa.train.observe.environment import snapshot
from nsa.train.observe.summary import describe
from nsa.train.parallel import Parallel, one_process
from nsa.train.run_folder import RunFolder, write_json, write_text
from nsa.train.stop import clear_stale_halt
from nsa.train.trainer import Trainer

T = TypeVar("T")

ALLOWED = frozenset(
    {
        "run.device",
        "run.num_threads",
        "model.attention_backend",
        "data.cache_folder",
        "data.first_batch_timeout_s",
        "data.hub_access",
        "data.paths",
        "data.prefetch_batches",
        "data.stall_timeout_s",
        "train.activation_checkpointing",
        "train.checkpoint_every_steps",
        "train.collective_timeout_s",
        "train.compile",
        "train.early_stop_evals",
        "train.keep_checkpoints",
        "train.keep_every_steps",
        "train.log_every_steps",
        "train.micro_batch_rows",
        "train.parallel",
        "train.steps",
        "eval.every_steps",
        "eval.rows",
    }
)
"""Keys that a resumed run may change: how long, where and how it computes, and what it writes. None changes what a step
is meant to compute, though another device or another cut of the batch changes the last bits. Files may lie elsewhere,
but their contents must be the same: the data's fingerprint is compared."""

ALLOWED_SECTIONS = ("guards", "observe", "preflight", "sample")
"""Sections that a resumed run may change throughout."""


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
        ValueError: there is nothing to resume, another process still runs, or an override is not allowed.
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
        SystemExit: code 2 for an override that cannot be read.
    """
    path = run / "config.yaml"
    if not path.is_file():
        raise ValueError(
            f"{run} is no run folder: it holds no config.yaml; give the folder of a run, such as runs/NAME"
        )
    stored = load_config(path)
    config = override_config(stored, overrides, prog="nsa resume RUN")
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
    before = on_main(parallel, folder.read_status)
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
    count = ((before.get("resumed_from") or {}).get("count") or 0) + 1
    changed = changed_keys(stored, config)
    source = checkpoint and checkpoint.name
    resumed = ResumedFrom(source, trainer.step, count, time.time(), parallel.world_size, changed)
    say(describe(trainer))
    say(_announcement(folder, resumed))
    env = snapshot(trainer.device, command)
    if note := on_main(parallel, lambda: _record(folder, config, resumed, env)):
        say(f"note: {note}")
    return trainer, folder


def _record(folder: RunFolder, config: RunConfig, resumed: ResumedFrom, env: dict[str, Any]) -> str | None:
    """Write config, environment and status of the resumed run; returns a line about a stale HALT file."""
    note = clear_stale_halt(folder.halt)
    write_text(folder.config_yaml, dump_config(config))
    first = json.loads(folder.env_json.read_text(encoding="utf-8"))
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
