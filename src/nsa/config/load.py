"""A YAML file and command line overrides become one checked `RunConfig`, and back into YAML.

    config = load_config("configs/train_showcase.yaml", ["--optim.lr", "1e-3"])
    config = load_config("train_showcase")      # a config of the package, from anywhere

What is wrong is a `ConfigError` that names the key, and for an unknown key the nearest known one; file and overrides
are checked alike.
"""

from __future__ import annotations

import difflib
import reprlib
from collections.abc import Collection, Sequence
from pathlib import Path
from typing import Any

from pydantic import BaseModel, ValidationError

from nsa.config.options import OptionError, option_value, split_options
from nsa.config.packaged import find_config
from nsa.config.run import RunConfig
from nsa.config.yaml_file import ConfigError, read_yaml, write_yaml

MAX_SHOWN = 8  # wrong entries in one message
_TYPES = ("int", "float", "str", "bool")
_SAID_BY_US = {
    "model_type": "must be keys with values, as `key: value`",
    "dict_type": "must be keys with values, as `key: value`",
    "invalid_key": "must be a name of letters",
    "tuple_type": "must be a list, as [a, b]",
    "string_type": "must be a text (string), in quotes where it looks like something else",
}

__all__ = [
    "ConfigError",
    "config_kinds",
    "dump_config",
    "load_config",
    "override_config",
    "parse_config",
    "read_config",
    "read_overrides",
]


def load_config(path: str | Path, overrides: Sequence[str] = ()) -> RunConfig:
    """The config in `path` with `overrides` such as `["--optim.lr", "1e-3"]` on top.

    Args:
        path: a YAML file, or the name of a config of the package (`nsa configs` lists them).
        overrides: options with their values, as on the command line.

    Raises:
        ConfigError: the file is missing or does not describe a run, or an override is wrong.
    """
    return override_config(read_config(path), overrides)


def read_config(path: str | Path) -> RunConfig:
    """The config in `path`; `model_fields_set` of each section tells the keys that the file has.

    Raises:
        ConfigError: the file is missing or does not describe a run.
    """
    return parse_config(read_yaml(find_config(path)), source=str(path))


def parse_config(values: Any, *, source: str) -> RunConfig:
    """Check the mapping that a YAML file holds; `source` names it in errors."""
    if values is None:
        values = {}
    if not isinstance(values, dict):
        raise ConfigError(f"{source} must hold sections such as `train:`, not a {type(values).__name__}")
    # A section whose keys are all commented out is an empty one.
    values = {name: {} if name in RunConfig.model_fields and keys is None else keys for name, keys in values.items()}
    return _checked(values, source)


def override_config(config: RunConfig, overrides: Sequence[str]) -> RunConfig:
    """`config` with command line overrides.

    Raises:
        ConfigError: an option is unknown or its value wrong.
    """
    given = read_overrides(overrides)
    if not given:
        return config
    values = config.model_dump()
    for name, value in given.items():
        section, _, key = name.partition(".")
        values[section][key] = value
    return _checked(values, "", given)


def read_overrides(overrides: Sequence[str]) -> dict[str, Any]:
    """Dotted keys with their values, of the right types but not yet checked in a config.

    Raises:
        ConfigError: as `override_config`.
    """
    kinds = config_kinds()
    try:
        words, options = split_options(overrides, kinds)
        if words:
            raise OptionError(f"{_short(words[0])} is one word too many; keys are given as --section.key value")
        return {name: option_value(kinds[name], given, f"--{name}") for name, given in options.items()}
    except OptionError as error:
        raise ConfigError(str(error)) from None


def dump_config(config: RunConfig) -> str:
    """The whole config as YAML; reading it back gives an equal config."""
    return write_yaml(config.model_dump(mode="json"))


def config_kinds(*, sections: bool = False) -> dict[str, Any]:
    """The type of every dotted key; with `sections`, of every section too."""
    kinds: dict[str, Any] = {}
    for section, field in RunConfig.model_fields.items():
        model: Any = field.annotation
        if sections:
            kinds[section] = model
        kinds |= {f"{section}.{key}": inner.annotation for key, inner in model.model_fields.items()}
    return kinds


def _checked(values: dict[str, Any], source: str, options: Collection[str] = ()) -> RunConfig:
    """The config of `values`; errors name its file, or the option that gave a value."""
    try:
        return RunConfig.model_validate(values)
    except ValidationError as error:
        lines = list(dict.fromkeys(_explain(dict(problem), options) for problem in error.errors(include_url=False)))
    if len(lines) == 1:
        raise ConfigError(f"{source}: {lines[0]}" if source else lines[0])
    more = [f"and {len(lines) - MAX_SHOWN} more"] if len(lines) > MAX_SHOWN else []
    head = f"{source or 'the config with these options'} has {len(lines)} wrong entries:"
    raise ConfigError("\n  ".join([head, *lines[:MAX_SHOWN], *more]))


def _explain(problem: dict[str, Any], options: Collection[str]) -> str:
    """One line for one of pydantic's findings."""
    location = [str(part) for part in problem["loc"]]
    if problem["type"] == "extra_forbidden":
        return _unknown(location)
    # Behind the key stand places in a list, keys there, and pydantic's names of the types that the value might have.
    key = ".".join([*location[:2], *(part for part in location[2:] if part not in _TYPES and "[" not in part)])
    message = _SAID_BY_US.get(problem["type"]) or str(problem["msg"]).removeprefix("Value error, ")
    for subject in ("Input should ", "Tuple should ", "String should "):
        message = message.replace(subject, "must ", 1)
    value = _short(problem["input"])
    given = "" if isinstance(problem["input"], dict | BaseModel) or value in message else f", not {value}"
    if ".".join(location[:2]) in options:
        return f"--{key} {message}{given}"
    return f"{_cut(key)}: {message}{given}" if key else message


def _unknown(location: Sequence[str]) -> str:
    known = list(config_kinds(sections=True))
    key = ".".join(location)
    same_section = [name for name in known if name.rpartition(".")[0] == ".".join(location[:-1])]
    elsewhere = [name for name in known if name.rpartition(".")[2] == location[-1]]
    near = next(iter(elsewhere), None) or _nearest(location[-1], same_section) or _nearest(location[-1], known)
    hint = f"did you mean {near}?" if near else f"known there: {', '.join(same_section) or ', '.join(known)}"
    return f"{_cut(key)} is unknown; {hint}"


def _nearest(name: str, keys: Sequence[str]) -> str | None:
    """The dotted key whose last part is nearest to `name`, or None."""
    by_last_part = {key.rpartition(".")[2]: key for key in keys}
    near = difflib.get_close_matches(name, by_last_part, n=1)
    return by_last_part[near[0]] if near else None


def _short(value: Any) -> str:
    """A value in a message: all of it where that is short, and never what it unfolds to."""
    return _cut(reprlib.repr(list(value) if isinstance(value, tuple) else value))


def _cut(text: str) -> str:
    return text if len(text) <= 80 else f"{text[:77]}..."
