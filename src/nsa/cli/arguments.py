"""The arguments of a command: fields of a dataclass, whose docstrings are its `--help`.

    given = parse(GenerateArguments, "generate", ["runs/NAME", "--prompt", "The "])
    given, overrides = parse_with_overrides(PreflightArguments, "preflight", ["c.yaml", "--json", "--train.steps", "9"])

Fields that are marked `Positional` are words, all others options; a field that is itself a dataclass gives options with
a dot (`--thresholds.stall_s`). Values are read as those of a config's overrides are.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Collection, Mapping, Sequence
from typing import Any, Literal, TypeVar, get_args, get_origin, get_type_hints

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
        show_help(kind, command)
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
    hint = f"; `nsa {command} --help` explains"
    try:
        words, options = split_options(arguments, {**config_kinds, **kinds})
        values = {name: option_value(kinds[name], options[name], f"--{name}") for name in options if name in kinds}
        overrides = [word for name in options if name not in kinds for word in (f"--{name}", *options[name])]
        named, rest = _positional_values(positional, words)
        values |= named
        missing = _missing(kind, values, positional)
        if rest or missing:
            hint = f"; {_usage(kind, command, takes_keys=bool(config_kinds))}{hint}"
            said = f"{rest[0][:60]!r} is one word too many" if rest else f"{' and '.join(missing)} must be given"
            raise OptionError(said)
        return _build(kind, values), overrides
    except OptionError as error:
        if not (kinds or config_kinds):
            hint = f"; {_usage(kind, command, takes_keys=bool(config_kinds))}"
        elif "--help" in str(error):
            hint = ""
        raise OptionError(f"{error}{hint}") from None


def _usage(kind: Any, command: str, *, takes_keys: bool) -> str:
    """`usage: nsa COMMAND WORD [WORD] [WORD ...] [--options] [--section.key value ...]`."""
    positional, options = _fields(kind)
    required = _missing(kind, {}, positional)
    words = []
    for name, inner in positional.items():
        word = get_args(inner)[0] if get_origin(inner) is Literal else name.upper()
        word = f"{word} ..." if _takes_many(inner) else word
        words.append(word if name.upper() in required else f"[{word}]")
    words += ["[--options]"] * bool(options) + ["[--section.key value ...]"] * takes_keys
    return " ".join(["usage: nsa", command, *words])


def _missing(kind: Any, values: Collection[str], positional: Collection[str]) -> list[str]:
    """The arguments that have no default and are not among the values, as they are typed."""
    no_default = dataclasses.MISSING
    names = [
        _option_name(field.name)
        for field in dataclasses.fields(kind)
        if field.default is no_default and field.default_factory is no_default
    ]
    return [name.upper() if name in positional else f"--{name}" for name in names if name not in values]


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


def _positional_values(positional: Mapping[str, Any], words: Sequence[str]) -> tuple[dict[str, Any], list[str]]:
    """The values of the words, and the words that are too many."""
    values: dict[str, Any] = {}
    rest = list(words)
    for name, kind in positional.items():
        taken, rest = (rest, []) if _takes_many(kind) else (rest[:1], rest[1:])
        if taken:
            values[name] = option_value(kind, taken, name.upper())
    return values, rest


def _takes_many(kind: Any) -> bool:
    return getattr(kind, "__origin__", None) is tuple


def _build(kind: Any, values: Mapping[str, Any], prefix: str = "") -> Any:
    """An instance of the dataclass `kind` from values by dotted name."""
    given: dict[str, Any] = {}
    hints = get_type_hints(kind)
    for field in dataclasses.fields(kind):
        name = prefix + _option_name(field.name)
        if name in values:
            given[field.name] = values[name]
        elif dataclasses.is_dataclass(hints[field.name]):
            given[field.name] = _build(hints[field.name], values, f"{name}.")
    try:
        return kind(**given)
    except ValueError as error:  # of a check of its own
        raise OptionError(str(error)) from None
