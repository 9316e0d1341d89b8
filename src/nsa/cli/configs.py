"""`nsa configs [NAME]`: the configs that come with the package, or the text of one, to begin an own config from."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import tyro

from nsa.cli import EXIT_DONE
from nsa.cli.arguments import parse
from nsa.config.options import OptionError
from nsa.config.packaged import FOLDER, config_names


@dataclass(frozen=True)
class ConfigsArguments:
    """List the configs of the package, which `nsa train NAME` takes, or print one: nsa configs NAME > my.yaml."""

    name: tyro.conf.Positional[str | None] = None
    """The config to print; a list of them all unless given."""


def main(arguments: Sequence[str]) -> int:
    """Run the command and return its exit code."""
    given = parse(ConfigsArguments, "configs", arguments)
    names = config_names()
    if given.name is None:
        width = max(map(len, names), default=0)
        print("\n".join(f"{name:<{width}}  {_first_comment(name)}" for name in names))
        return EXIT_DONE
    if given.name not in names:
        raise OptionError(f"the package has no config {given.name[:60]!r}; it has {', '.join(names)}")
    print((FOLDER / f"{given.name}.yaml").read_text(encoding="utf-8"), end="")
    return EXIT_DONE


def _first_comment(name: str) -> str:
    line = (FOLDER / f"{name}.yaml").read_text(encoding="utf-8").partition("\n")[0]
    return line.removeprefix("#").strip(" ,:")
