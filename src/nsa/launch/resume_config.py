"""The config that a run resumes with: that of its newest checkpoint, which `config.yaml` can only change by name.

`config.yaml` may have been edited, emptied by a loss of power, or removed; `run_config.yaml` in the checkpoint has a
checksum. Before the first checkpoint, the config in `env.json` stands for it.
"""

from __future__ import annotations

import os
from collections.abc import Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from nsa.config.load import ConfigError, override_config, parse_config, read_config, read_overrides
from nsa.config.resume_keys import ALLOWED, ALLOWED_SECTIONS, is_allowed
from nsa.config.run import RunConfig
from nsa.runs.checkpoints import RUN_CONFIG, FileSum, Listing, is_complete, step_folders
from nsa.runs.files import expect_file
from nsa.runs.folder import RunFolder, read_json

PLACE = frozenset({"run.name", "run.folder"})  # a run folder may be moved
SHOWN_KEYS = 6


@dataclass(frozen=True)
class StoredConfig:
    """What the files of a run say, and what is asked for on top of it.

    Attributes:
        run: the run folder.
        trained: the config of the steps done so far.
        wanted: the same with the keys that `config.yaml` and overrides change.
        note: a line about a `config.yaml` that says less than it should, or None.
    """

    run: Path
    trained: RunConfig
    wanted: RunConfig
    note: str | None


def resumed_config(run: Path, overrides: Sequence[str] = ()) -> StoredConfig:
    """The config in a run folder, with overrides such as `["--train.steps", "800"]`.

    Raises:
        ValueError: this is no run folder, its `config.yaml` is not of its checkpoints, or an override is not allowed.
    """
    if not run.is_dir():
        raise ValueError(f"{run} is no run folder; give the folder of a run, such as runs/NAME")
    read_overrides(overrides)  # a slip in them is told first
    stored = stored_config(run)
    config = override_config(stored.wanted, overrides)
    refused = [name for name in changed_keys(stored.wanted, config) if not is_allowed(name)]
    if refused:
        lines = [
            "a resumed run keeps what decides its steps, so these cannot be changed:",
            *(f"  {name}" for name in refused),
            f"Begin a new run for that: nsa train {run / 'config.yaml'} --run.name {config.run.name}-2 ... "
            f"A resumed run may change {', '.join(sorted(ALLOWED))} and the sections {', '.join(ALLOWED_SECTIONS)}.",
        ]
        raise ValueError("\n".join(lines))
    return replace(stored, wanted=config)


def stored_config(run: Path) -> StoredConfig:
    """The config in a run folder.

    Raises:
        ValueError: this is no run folder, its config cannot be read, or it differs from the checkpoint's in keys that
            decide its steps.
    """
    path = run / "config.yaml"
    if os.path.lexists(path):
        expect_file(path)
    source = trained_source(run)
    trained = None if source is None else source.read()
    if not _says_something(path):
        if source is None or trained is None:
            raise ValueError(
                f"{run} is no run folder: it holds no config.yaml with contents, and no checkpoint that has the "
                f"config; give the folder of a run, such as runs/NAME"
            )
        return StoredConfig(run, trained, trained, f"{path} is lost; the config is that of {source.path}")
    try:
        given = read_config(path)
    except ConfigError as error:
        remedy = f"; correct it, or remove it: {source.path} has the config" if source else ""
        raise ValueError(f"{error}{remedy}") from None
    if source is None or trained is None:
        if missing := sorted(RunConfig.model_fields.keys() - given.model_fields_set):
            raise ValueError(f"{path} has lost its sections {', '.join(missing)}; restore it, or begin a new run")
        return StoredConfig(run, given, given, None)
    values, missing = _on_top(trained, given)
    wanted = parse_config(values, source=str(path))
    check_unchanged(trained, wanted, path=path, source=source.path)
    note = (
        f"{path} lacks {len(missing)} keys, such as {missing[0]}; they are those of {source.path}" if missing else None
    )
    return StoredConfig(run, trained, wanted, note)


@dataclass(frozen=True)
class TrainedSource:
    """A file that has the config of the steps done so far."""

    path: Path

    def read(self) -> RunConfig:
        """The config; raises `ConfigError` for a file of a version that knew other keys."""
        if self.path.suffix == ".json":
            return parse_config((read_json(self.path) or {}).get("config"), source=str(self.path))
        return read_config(self.path)


def trained_source(run: Path) -> TrainedSource | None:
    """Where the config of the steps done so far stands: the newest checkpoint that is whole, or `env.json`."""
    folder = RunFolder(run)
    for checkpoint in reversed(step_folders(folder.checkpoints)):
        path = checkpoint / RUN_CONFIG
        if is_complete(checkpoint) and Listing.read(checkpoint).files.get(RUN_CONFIG) == FileSum.of(path):
            return TrainedSource(path)
    has_config = isinstance((read_json(folder.env_json) or {}).get("config"), dict)
    return TrainedSource(folder.env_json) if has_config else None


def check_unchanged(trained: RunConfig, wanted: RunConfig, *, path: Path, source: Path) -> None:
    """Raise `ValueError` with both values of the keys that decide a step and differ in `path` from `source`."""
    changed = changed_keys(trained, wanted)
    refused = {name: values for name, values in changed.items() if not is_allowed(name) and name not in PLACE}
    if not refused:
        return
    lines = [f"  {name}: {old!r} -> {new!r}" for name, (old, new) in list(refused.items())[:SHOWN_KEYS]]
    if len(refused) > SHOWN_KEYS:
        lines.append(f"  and {len(refused) - SHOWN_KEYS} more")
    raise ValueError(
        "\n".join(
            [
                f"{path} is not what the run was trained with ({source}):",
                *lines,
                f"A resumed run keeps what decides its steps. To continue as it was: rm {path}; for the new values "
                f"begin a new run: nsa train {path} --run.name {wanted.run.name}-2",
            ]
        )
    )


def changed_keys(before: RunConfig, after: RunConfig) -> dict[str, list[Any]]:
    """Dotted keys whose values differ, with the value before and after."""
    old, new = before.model_dump(mode="json"), after.model_dump(mode="json")
    return {
        f"{section}.{key}": [old[section][key], new[section][key]]
        for section in new
        for key in new[section]
        if old[section][key] != new[section][key]
    }


def _says_something(path: Path) -> bool:
    """Whether there is a file with more in it than a loss of power leaves: nothing, or zeros."""
    if not path.is_file():
        return False
    with path.open("rb") as file:
        while piece := file.read(2**16):
            if piece.strip(b"\0 \t\r\n"):
                return True
    return False


def _on_top(trained: RunConfig, given: RunConfig) -> tuple[dict[str, Any], list[str]]:
    """The values of `trained` with those that `given` has of its own, and the keys that it has not."""
    values, own = trained.model_dump(mode="json"), given.model_dump(mode="json")
    missing = []
    for section in values:
        keys = getattr(given, section).model_fields_set if section in given.model_fields_set else set()
        values[section].update({key: own[section][key] for key in keys})
        missing += [f"{section}.{key}" for key in values[section] if key not in keys]
    return values, missing
