"""The folder of a run that a command was given to read."""

from __future__ import annotations

from pathlib import Path

from nsa.train.run_folder import RunFolder


def open_run_folder(path: Path) -> RunFolder:
    """A run's folder, whatever state the run is in.

    Raises:
        ValueError: there is nothing at this place, or something that is no run folder.
    """
    if not path.exists():
        raise ValueError(f"there is no {path}; give the folder of a run, such as runs/NAME")
    if not path.is_dir():
        raise ValueError(f"{path} is a file; give the folder of a run, such as {path.parent}")
    folder = RunFolder(path)
    if not folder.status_json.is_file():
        raise ValueError(f"{path} is no run folder: it holds no status.json; give one such as runs/NAME")
    return folder
