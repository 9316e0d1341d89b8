"""The arguments of a command: fields of a dataclass, whose docstrings are its `--help`.

    given = parse(GenerateArguments, "generate", ["runs/NAME", "--prompt", "The "])
    given, overrides = parse_with_overrides(PreflightArguments, "preflight", ["c.yaml", "--json", "--train.steps", "9"])

Fields that are marked `Positional` are words, all others options; a field that is itself a dataclass gives options with
a dot (`--thresholds.stall_s`). Values are read as those of a config's overrides are.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Collection, Mapping, Sequence
from typing import Any, TypeVar, get_args, get_type_hints

import tyro

from nsa.config.options import OptionError, option_value, split_options

T = TypeVar("T")


def parse(kind: type[T], command: str, arguments: Sequence[str]) -> T:
    """The arguments of `nsa COMMAND` as an instance of the dataclass `kind`.

    Raises:
        OptionError: an argument is unknown, missing or has a wrong value.
        SystemExit: code 0, after `--help`.
    """
    return _parse(kind, command, arguments, {})[0]


def parse_with_overrides(kind: type[T], command: str, arguments: Sequence[str]) -> tuple[T, list[str]]:
    """As `parse`, and the options that are keys of a config, with their values, for `load_config`."""
    if asks_for_help(arguments):
        return _parse(kind, command, arguments, {})
    from nsa.config.load import config_kinds  # not for --help

    return _parse(kind, command, arguments, config_kinds())


def asks_for_help(arguments: Sequence[str]) -> bool:
    """Whether `--help` stands anywhere among the arguments."""
    return any(argument in ("-h", "--help") for argument in arguments)


def show_help(kind: Any, command: str) -> None:
    """Print the fields of a dataclass or model as options, and end with `SystemExit` of code 0."""
    tyro.cli(kind, prog=f"nsa {command}", args=["--help"], use_underscores=True)


def _parse(
    kind: type[T], command: str, arguments: Sequence[str], config_kinds: Mapping[str, Any]
) -> tuple[T, list[str]]:
    if asks_for_help(arguments):
        show_help(kind, command)
    positional, kinds = _fields(kind)
    try:
        words, options = split_options(arguments, {**config_kinds, **kinds})
        values = {name: option_value(kinds[name], options[name], f"--{name}") for name in options if name in kinds}
        overrides = [word for name in options if name not in kinds for word in (f"--{name}", *options[name])]
        return _build(kind, values | _positional_values(positional, words), positional), overrides
    except OptionError as error:
        hint = "" if "--help" in str(error) else f"; `nsa {command} --help` explains"
        raise OptionError(f"{error}{hint}") from None


def _fields(kind: Any, prefix: str = "") -> tuple[dict[str, Any], dict[str, Any]]:
    """Types of the words and of the options, by name."""
    positional: dict[str, Any] = {}
    options: dict[str, Any] = {}
    hints = get_type_hints(kind, include_extras=True)
    for field in dataclasses.fields(kind):
        hint = hints[field.name]
        markers = getattr(hint, "__metadata__", ())
        if tyro.conf.Suppress in markers:
            continue
        inner = get_args(hint)[0] if markers else hint
        if dataclasses.is_dataclass(inner):
            options |= _fields(inner, f"{field.name}.")[1]
        elif tyro.conf.Positional in markers:
            positional[field.name] = inner
        else:
            options[prefix + _option_name(field.name)] = inner
    return positional, options


def _option_name(field_name: str) -> str:
    """A field that would be a word of Python's ends with an underscore: `for_` is --for."""
    return field_name.rstrip("_")


def _positional_values(positional: Mapping[str, Any], words: Sequence[str]) -> dict[str, Any]:
    values: dict[str, Any] = {}
    rest = list(words)
    for name, kind in positional.items():
        taken, rest = (rest, []) if _takes_many(kind) else (rest[:1], rest[1:])
        if taken:
            values[name] = option_value(kind, taken, name.upper())
    if rest:
        raise OptionError(f"{rest[0][:60]!r} is one word too many")
    return values


def _takes_many(kind: Any) -> bool:
    return getattr(kind, "__origin__", None) is tuple


def _build(kind: Any, values: Mapping[str, Any], positional: Collection[str], prefix: str = "") -> Any:
    """An instance of the dataclass `kind` from values by dotted name."""
    given: dict[str, Any] = {}
    missing: list[str] = []
    hints = get_type_hints(kind)
    for field in dataclasses.fields(kind):
        name = prefix + _option_name(field.name)
        if name in values:
            given[field.name] = values[name]
        elif dataclasses.is_dataclass(hints[field.name]):
            given[field.name] = _build(hints[field.name], values, positional, f"{name}.")
        elif field.default is dataclasses.MISSING and field.default_factory is dataclasses.MISSING:
            missing.append(name.upper() if name in positional else f"--{name}")
    if missing:
        raise OptionError(f"{' and '.join(missing)} must be given")
    try:
        return kind(**given)
    except ValueError as error:  # of a check of its own
        raise OptionError(str(error)) from None
