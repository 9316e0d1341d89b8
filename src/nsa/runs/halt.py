"""The file HALT in a run folder, which asks the run to stop: writing it, obeying it, and putting a stale one aside.

    ask_to_halt(Path("runs/NAME/HALT"), "the disk is needed")

`touch` or `mkdir` do as well: whatever has this name stops the run, and what a file holds is the reason.
"""

from __future__ import annotations

import os
import stat
import time
from pathlib import Path

from nsa.runs.files import put_aside
from nsa.runs.folder import write_text
from nsa.terminal import printable

MAX_REASON_CHARACTERS = 500


def ask_to_halt(halt: Path, reason: str = "") -> None:
    """Write the HALT file of a run; the run stops after its current step with a checkpoint."""
    if halt.is_dir() and not halt.is_symlink():
        return  # it asks already
    write_text(halt, reason)


def is_asked(halt: Path) -> bool:
    """Whether there is something called HALT."""
    return os.path.lexists(halt)


def take_halt(halt: Path) -> str:
    """Put HALT aside as HALT.old and return the reason that it gives; only a file can give one."""
    text = printable(_contents(halt)).strip()
    old = halt.with_name(f"{halt.name}.old")
    if os.path.lexists(old) and (_is_folder(old) or _is_folder(halt)):
        put_aside(old, "old_")
    os.replace(halt, old)
    return f"HALT: {text}" if text else "HALT"


def clear_stale_halt(halt: Path, since_ns: int) -> str | None:
    """Put aside a HALT from before a run's start, so that it stops no run that it was not meant for.

    Args:
        halt: the file.
        since_ns: when this process took the run's lock, by the clock of the same disk (`RunLock.since_ns`).

    Returns:
        A line about it, or None when there was none, or a newer one, which the run obeys.
    """
    if not is_asked(halt) or halt.lstat().st_mtime_ns >= since_ns:
        return None
    age_s = time.time() - halt.lstat().st_mtime
    take_halt(halt)
    return f"{halt} is from {age_s:.0f} s before now, before this start, and was put aside as {halt.name}.old"


def _contents(halt: Path) -> str:
    if not stat.S_ISREG(halt.lstat().st_mode):
        return ""
    # Nothing that takes the file's place in between is followed or waited for.
    descriptor = os.open(halt, os.O_RDONLY | os.O_NOFOLLOW | os.O_NONBLOCK)
    try:
        return os.read(descriptor, 4 * MAX_REASON_CHARACTERS).decode("utf-8", "replace")[:MAX_REASON_CHARACTERS]
    finally:
        os.close(descriptor)


def _is_folder(path: Path) -> bool:
    return stat.S_ISDIR(path.lstat().st_mode)
