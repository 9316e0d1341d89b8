"""The configs that come with the package: `configs/` of the repository, found by name from any folder."""

from __future__ import annotations

import difflib
import os
from pathlib import Path

from nsa.config.yaml_file import ConfigError

FOLDER = Path(__file__).parents[1] / "configs"


def config_names() -> list[str]:
    """Names of the configs of the package."""
    return sorted(path.stem for path in FOLDER.glob("*.yaml"))


def find_config(path: str | Path) -> Path:
    """The file at `path`, or else the package's config of that name.

    Raises:
        ConfigError: there is neither.
    """
    path, names = Path(path), config_names()
    if os.path.isfile(path):
        return path
    if str(path) in names:
        return FOLDER / f"{path}.yaml"
    if os.path.isdir(path):
        raise ConfigError(f"{path} is a folder; give a YAML file, such as those in configs/")
    if os.path.exists(path):
        raise ConfigError(f"{path} is no regular file; give a YAML file, such as those in configs/")
    near = difflib.get_close_matches(path.stem, names, n=1)
    hint = f"did you mean {near[0]}, a config of the package?" if near else "`nsa configs` lists those of the package"
    raise ConfigError(f"there is no config file {str(path)[:200]}; give a YAML file, such as those in configs/; {hint}")
