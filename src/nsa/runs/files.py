"""Files of a run folder that may come from somebody else: nothing is written through a link, nothing hangs in a pipe.

check_run_files(Path("runs/NAME"))               # before anything in it is written
descriptor = open_to_append(Path("runs/NAME/training.csv"))
"""

from __future__ import annotations

import os
import stat
from contextlib import suppress
from pathlib import Path

FOLDERS = ("checkpoints", "profile", "samples", "tb")
FILE_ENDINGS = frozenset({".csv", ".json", ".jsonl", ".lock", ".md", ".png", ".txt", ".yaml"})
LATEST = "latest"  # the one link that a run makes itself, in `checkpoints`
HALT = "HALT"  # `nsa.runs.halt` takes what has this name, whatever it is


def check_run_files(run: Path) -> None:
    """Look at all that a run may write to.

    Raises:
        ValueError: something is a link, or no file or no folder where one belongs; it is named and left as it is.
    """
    for path in run.iterdir():
        if path.name.startswith(HALT):
            continue
        _refuse_link(path)
        if path.name in FOLDERS:
            _expect_folder(path)
            for entry in path.iterdir():
                if entry.name != LATEST:
                    _refuse_link(entry)
        elif path.suffix in FILE_ENDINGS:
            expect_file(path)
    for path in (run / FOLDERS[0]).glob("step_*"):
        _expect_folder(path)
    latest = run / FOLDERS[0] / LATEST
    if os.path.lexists(latest) and not latest.is_symlink():
        raise ValueError(f"{latest} must be a link to the newest checkpoint; remove it, the next checkpoint makes one")


def expect_file(path: Path) -> None:
    """Raise `ValueError` for a link, a folder, a pipe or a device under a file's name."""
    mode = path.lstat().st_mode
    _refuse_link(path)
    if not stat.S_ISREG(mode):
        kind = "a folder" if stat.S_ISDIR(mode) else "a pipe or a device"
        raise ValueError(f"{path} is {kind} where a file belongs; move it away")


def open_to_append(path: Path, flags: int = 0) -> int:
    """The descriptor of a file for reading and appending, which is made when missing; never another file's.

    Raises:
        ValueError: the path is a link, or no file.
    """
    if os.path.lexists(path):
        expect_file(path)
    flags |= os.O_RDWR | os.O_CREAT | os.O_APPEND | os.O_NOFOLLOW | os.O_CLOEXEC
    return os.open(path, flags, 0o666)


def append(descriptor: int, data: bytes) -> str | None:
    """Append to a file, all of it or nothing, and return why it was not possible, or None."""
    size = os.fstat(descriptor).st_size
    try:
        if os.write(descriptor, data) == len(data):
            return None
        reason = "the disk is full"
    except OSError as error:
        reason = error.strerror or str(error)
    with suppress(OSError):
        os.ftruncate(descriptor, size)
    return reason


def put_aside(path: Path, prefix: str) -> Path:
    """Give a file or folder a name beside it that is free: the prefix, its own name, and a number if need be."""
    target, number = path.with_name(prefix + path.name), 2
    while os.path.lexists(target):
        target, number = path.with_name(f"{prefix}{path.name}_{number}"), number + 1
    os.rename(path, target)
    return target


def _refuse_link(path: Path) -> None:
    if path.is_symlink():
        raise ValueError(
            f"{path} is a link to {os.readlink(path)}, and a run writes into its own folder alone; move what it "
            f"points to here, or remove it"
        )


def _expect_folder(path: Path) -> None:
    if not path.is_dir():
        raise ValueError(f"{path} must be a folder; move that file away")
