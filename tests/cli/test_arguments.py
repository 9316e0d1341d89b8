"""The arguments of all commands: words, options and flags in any order, with values as YAML writes them."""

from __future__ import annotations

from dataclasses import dataclass, field
from pathlib import Path

import pytest
import tyro

from nsa.cli.arguments import parse, parse_with_overrides
from nsa.config.options import OptionError


@dataclass(frozen=True)
class Bounds:
    """A part of the arguments."""

    wait_s: float = 1.0
    """Seconds."""


@dataclass(frozen=True)
class Arguments:
    """All kinds of arguments."""

    folder: tyro.conf.Positional[Path]
    """A folder."""
    once: bool = False
    """A flag."""
    halt: bool = True
    """A flag that is on."""
    sizes: tuple[int, ...] = (1,)
    """Several numbers."""
    layer: int | None = 3
    """A number or none."""
    bounds: Bounds = field(default_factory=Bounds)
    """A part."""


@pytest.mark.parametrize(
    ("line", "expected"),
    [
        ("a", Arguments(Path("a"))),
        ("--once a", Arguments(Path("a"), once=True)),
        ("a --once --no_halt", Arguments(Path("a"), once=True, halt=False)),
        ("--once false a --halt False", Arguments(Path("a"), halt=False)),
        ("--layer null a", Arguments(Path("a"), layer=None)),
        ("--layer 4 a", Arguments(Path("a"), layer=4)),
        ("a --sizes 1 2 --once", Arguments(Path("a"), once=True, sizes=(1, 2))),
        ("a --sizes=[1,2]", Arguments(Path("a"), sizes=(1, 2))),
        ("a --bounds.wait_s 1e-3", Arguments(Path("a"), bounds=Bounds(1e-3))),
        ("a --bounds.wait-s=2 --bounds.wait_s=3", Arguments(Path("a"), bounds=Bounds(3.0))),
    ],
)
def test_arguments_may_stand_in_any_order(line: str, expected: Arguments) -> None:
    assert parse(Arguments, "try", line.split()) == expected


def test_keys_of_a_config_are_told_from_the_command_s_own_options() -> None:
    line = ["--train.steps", "3", "a", "--once", "--data.paths", "x", "y", "--train.compile", "true"]
    given, overrides = parse_with_overrides(Arguments, "try", line)
    assert given == Arguments(Path("a"), once=True)
    assert overrides == ["--train.steps", "3", "--data.paths", "x", "y", "--train.compile", "true"]
    with pytest.raises(OptionError, match=r"--train\.steps is unknown"):
        parse(Arguments, "try", line)


def test_help_shows_the_docstrings(capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit) as ended:
        parse(Arguments, "try", ["a", "--help"])
    assert not ended.value.code
    out = capsys.readouterr().out
    assert "usage: nsa try" in out
    assert "Several numbers." in out
