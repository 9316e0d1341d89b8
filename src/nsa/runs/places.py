"""The folder of a run that a command was given to read, and the place of what it writes."""

from __future__ import annotations

from pathlib import Path

from nsa.runs.folder import RunFolder


def check_place(path: Path, option: str) -> None:
    """Refuse a place for results that lies under a file or is no file itself, before any work is done for them.

    Args:
        path: of a file that is to be written; what is missing above it will be made.
        option: of the command, which is to be given something else.
    """
    if path.exists() and not path.is_file():
        raise ValueError(f"{path} is no file; give {option} another name")
    above = next(parent for parent in (path.parent, *path.parent.parents) if parent.exists())
    if not above.is_dir():
        raise ValueError(f"{path} cannot be written, as {above} is a file; give {option} another name")


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
