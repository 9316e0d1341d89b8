"""A YAML file and command line overrides become one checked `RunConfig`, and back into YAML.

    config = load_config("configs/train_showcase.yaml", ["--optim.lr", "1e-3"])

What is wrong with the file is a `ConfigError` that names the key, and for an unknown key the nearest known one. What is
wrong with an override is explained by tyro, which then exits with code 2.
"""

from __future__ import annotations

import difflib
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import tyro
import yaml
from pydantic import BaseModel, ValidationError

from nsa.train.config import RunConfig


class ConfigError(ValueError):
    """A config file that cannot be used: missing, not YAML, or with a wrong key or value."""


def load_config(path: str | Path, overrides: Sequence[str] = (), *, prog: str = "nsa train CONFIG") -> RunConfig:
    """The config in `path` with `overrides` such as `["--optim.lr", "1e-3"]` on top.

    Raises:
        ConfigError: the file is missing or does not describe a run.
        SystemExit: code 2 for a wrong override, after tyro's explanation; code 0 for `--help`.
    """
    return override_config(read_config(path), overrides, prog=prog)


def read_config(path: str | Path) -> RunConfig:
    """The config in `path`; `model_fields_set` of each section tells the keys that the file has.

    Raises:
        ConfigError: the file is missing or does not describe a run.
    """
    return parse_config(_read(Path(path)), source=str(path))


def parse_config(values: Any, *, source: str) -> RunConfig:
    """Check the mapping that a YAML file holds; `source` names it in errors."""
    if values is None:
        values = {}
    if not isinstance(values, dict):
        raise ConfigError(f"{source} must hold sections such as `train:`, not a {type(values).__name__}")
    try:
        return RunConfig.model_validate(values)
    except ValidationError as error:
        lines = [_explain(dict(problem)) for problem in error.errors()]
        raise ConfigError("\n  ".join([f"{source} has {len(lines)} wrong entries:", *lines])) from None


def override_config(config: RunConfig, overrides: Sequence[str], *, prog: str = "nsa train CONFIG") -> RunConfig:
    """`config` with command line overrides; an unknown option or a wrong value ends the process with code 2."""
    markers = (tyro.conf.FlagConversionOff, tyro.conf.AvoidSubcommands)
    return tyro.cli(RunConfig, default=config, args=list(overrides), prog=prog, use_underscores=True, config=markers)


def dump_config(config: RunConfig) -> str:
    """The whole config as YAML; reading it back gives an equal config."""
    return yaml.safe_dump(config.model_dump(mode="json"), sort_keys=False, allow_unicode=True, width=120)


def _read(path: Path) -> Any:
    if not path.is_file():
        raise ConfigError(f"there is no config file {path}; give the path of a YAML file, such as those in configs/")
    try:
        return yaml.safe_load(path.read_text(encoding="utf-8"))
    except UnicodeDecodeError as error:
        raise ConfigError(f"{path} is not UTF-8 text: {error}") from None
    except yaml.YAMLError as error:
        raise ConfigError(f"{path} is not valid YAML: {error}") from None


def _explain(problem: dict[str, Any]) -> str:
    """One line for one of pydantic's findings."""
    location = [str(part) for part in problem["loc"]]
    key = ".".join(location)
    if problem["type"] != "extra_forbidden":
        given = "" if isinstance(problem["input"], dict | BaseModel) else f", not {problem['input']!r}"
        return f"{key or 'the whole'}: {problem['msg'].removeprefix('Value error, ')}{given}"
    known = _known_keys(RunConfig)
    same_section = [name for name in known if name.rpartition(".")[0] == ".".join(location[:-1])]
    near = _nearest(location[-1], same_section) or _nearest(location[-1], known)
    hint = f"did you mean {near}?" if near else f"known there: {', '.join(same_section) or ', '.join(known)}"
    return f"{key} is unknown; {hint}"


def _nearest(name: str, keys: Sequence[str]) -> str | None:
    """The dotted key whose last part is nearest to `name`, or None."""
    by_last_part = {key.rpartition(".")[2]: key for key in keys}
    near = difflib.get_close_matches(name, by_last_part, n=1)
    return by_last_part[near[0]] if near else None


def _known_keys(model: type[BaseModel], prefix: str = "") -> list[str]:
    """Every dotted key under `model`, sections themselves included."""
    keys: list[str] = []
    for name, field in model.model_fields.items():
        keys.append(prefix + name)
        if isinstance(field.annotation, type) and issubclass(field.annotation, BaseModel):
            keys += _known_keys(field.annotation, f"{prefix}{name}.")
    return keys
