"""Command lines: `--section.key value ...`, with values as YAML writes them.

    words, options = split_options(["c.yaml", "--optim.lr", "1e-3"], {"optim.lr": float})
    option_value(float, options["optim.lr"], "--optim.lr")      # 0.001

An option takes the words up to the next one that begins with two dashes, as many as its type has use for; the others
are words of the command. `--key=value` is the same as `--key value`, a dash inside a name the same as an underscore,
`--no_key` the same as `--key false`, and of an option that is given twice the last one counts.
"""

from __future__ import annotations

import difflib
import math
import re
from collections.abc import Collection, Mapping, Sequence
from pathlib import Path
from types import NoneType, UnionType
from typing import Annotated, Any, Literal, Union, get_args, get_origin

from nsa.config.yaml_file import ConfigError, parse_yaml

YES, NO = ("true", "yes", "on"), ("false", "no", "off")
NONE = ("null", "none", "~")
_INT = re.compile(r"[-+]?[0-9][0-9_]*")


class OptionError(ValueError):
    """A command line that cannot be used; the message names the option and the remedy."""


def split_options(arguments: Sequence[str], kinds: Mapping[str, Any]) -> tuple[list[str], dict[str, list[str]]]:
    """The words of a command line that belong to no option, and the words of each option.

    Args:
        arguments: as typed.
        kinds: name of each option, without the dashes -> its type.

    Raises:
        OptionError: an option is unknown.
    """
    words: list[str] = []
    options: dict[str, list[str]] = {}
    current, name, room = words, "", math.inf
    for argument in arguments:
        if argument.startswith("--") and len(argument) > 2:
            name, equals, value = argument[2:].partition("=")
            name = name.replace("-", "_")
            if name not in kinds and name.startswith("no_") and kinds.get(name[3:]) is bool:
                name, equals, value = name[3:], "=", "false"
            if name not in kinds:
                raise unknown_option(name, kinds)
            current = options[name] = [value] if equals else []
            room = 0 if equals else _room(kinds[name])
        elif current is not words and (len(current) >= room or not _fits(name, kinds[name], argument)):
            words.append(argument)
        else:
            current.append(argument)
    return words, options


def _room(kind: Any) -> float:
    """How many words an option of a type takes at most."""
    if get_origin(kind) is Annotated:
        return _room(get_args(kind)[0])
    if get_origin(kind) in (Union, UnionType):
        return max(_room(inner) for inner in get_args(kind))
    return math.inf if get_origin(kind) is tuple else 1


def _fits(name: str, kind: Any, word: str) -> bool:
    """Whether a word behind an option can be its own: behind a command's flag only true and false are."""
    return kind is not bool or "." in name or word.lower() in YES + NO


def unknown_option(name: str, known: Collection[str]) -> OptionError:
    """The error for an option that is not among the `known` dotted names, with the nearest that is."""
    by_last_part = {key.rpartition(".")[2]: key for key in known}
    near = difflib.get_close_matches(name, known, n=1)
    near = near or [
        by_last_part[last] for last in difflib.get_close_matches(name.rpartition(".")[2], by_last_part, n=1)
    ]
    hint = f"did you mean --{near[0]}?" if near else "--help lists the options"
    return OptionError(f"the option --{_short(name)} is unknown; {hint}")


def option_value(kind: Any, words: Sequence[str], option: str) -> Any:
    """The value of type `kind` that an option's words mean.

    Args:
        kind: bool, int, float, str, Path, a Literal, a dict, a tuple of those, or a union with None or between those.
        words: those behind the option.
        option: its name, for errors.

    Raises:
        OptionError: no words, too many of them, or none of such a type.
    """
    while get_origin(kind) is Annotated:
        kind = get_args(kind)[0]
    if get_origin(kind) in (Union, UnionType):
        return _one_of(get_args(kind), words, option)
    if get_origin(kind) is tuple:
        return _values(get_args(kind), words, option)
    if kind is bool and not words:
        return True
    if len(words) != 1:
        said = f"takes one value, not {len(words)}: {_short(' '.join(words))}" if words else "needs a value"
        raise OptionError(f"{option} {said}")
    return _scalar(kind, words[0], option)


def _one_of(kinds: Sequence[Any], words: Sequence[str], option: str) -> Any:
    if NoneType in kinds and len(words) == 1 and words[0].lower() in NONE:
        return None
    kinds = [kind for kind in kinds if kind is not NoneType]
    for kind in kinds[:-1]:
        try:
            return option_value(kind, words, option)
        except OptionError:
            continue  # the next kind may take it; the last one's error is raised
    return option_value(kinds[-1], words, option)


def _values(kinds: Sequence[Any], words: Sequence[str], option: str) -> tuple[Any, ...]:
    """A tuple's values: the words, or the one list `[a, b]` that YAML writes."""
    if len(words) == 1 and words[0].startswith("[") and words[0].endswith("]"):
        try:
            listed = parse_yaml(words[0], source=option)
        except ConfigError:
            listed = None  # such as the pattern [ab]*[cd]
        if isinstance(listed, list):
            if any(isinstance(item, dict) for item in listed) or not listed:
                return tuple(listed)  # sections, which the config checks
            words = list(map(str, listed))
    if not words:
        raise OptionError(f"{option} needs a value; [] is an empty list")
    if kinds[-1] is Ellipsis:
        return tuple(option_value(kinds[0], [word], option) for word in words)
    if len(words) != len(kinds):
        raise OptionError(f"{option} takes {len(kinds)} values, not {len(words)}: {_short(' '.join(words))}")
    return tuple(option_value(kind, [word], option) for kind, word in zip(kinds, words, strict=True))


def _scalar(kind: Any, word: str, option: str) -> Any:
    if get_origin(kind) is Literal:
        if word not in get_args(kind):
            raise OptionError(f"{option} must be {_choices(get_args(kind))}, not {_short(word)!r}")
        return word
    if kind is bool:
        if word.lower() not in YES + NO:
            raise OptionError(f"{option} must be true or false, not {_short(word)!r}")
        return word.lower() in YES
    if kind is int:
        if not _INT.fullmatch(word) or len(word) > 30:
            raise OptionError(f"{option} must be a whole number (integer), not {_short(word)!r}")
        return int(word)
    if kind is float:
        try:
            number = float(word)
        except ValueError:
            number = math.nan
        if not math.isfinite(number):
            raise OptionError(f"{option} must be a finite number, not {_short(word)!r}")
        return number
    if get_origin(kind) is dict:
        return _mapping(word, option)
    if kind not in (str, Path):
        raise OptionError(f"{option} must be a list of sections, as [{{key: value}}], not {_short(word)!r}")
    if "\0" in word:
        raise OptionError(f"{option} must hold no NUL (zero) character")
    return Path(word) if kind is Path else word


def _mapping(word: str, option: str) -> dict[str, Any]:
    """The keys and values that YAML writes as `{key: value}`."""
    try:
        values = parse_yaml(word, source=option)
    except ConfigError:
        values = None
    if not isinstance(values, dict):
        raise OptionError(f'{option} must be keys with values, as "{{key: value}}", not {_short(word)!r}')
    return values


def _choices(values: Sequence[str]) -> str:
    return " or ".join(filter(None, [", ".join(map(repr, values[:-1])), repr(values[-1])]))


def _short(text: str) -> str:
    return text if len(text) <= 60 else f"{text[:57]}..."
