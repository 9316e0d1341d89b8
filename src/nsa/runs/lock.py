"""One process at a time writes a run folder.

The lock is the operating system's (`flock`) on `run.lock` and on the folder itself, so that it holds though the file is
removed. It ends with the process that holds it, however that dies: a file left behind by a killed run locks nothing.
The file says who holds it.
"""

from __future__ import annotations

import errno
import fcntl
import json
import os
import socket
import time
import weakref
from collections.abc import Callable
from pathlib import Path
from typing import Any

from nsa.runs.files import open_to_append
from nsa.terminal import printable

MAX_BYTES = 1000  # of the lock file: more is no holder


class RunLock:
    """The lock of one run folder.

    Args:
        path: the lock file, in the folder.
    """

    def __init__(self, path: Path) -> None:
        self.path = path
        self._file: int | None = None
        self._release: Callable[[], object] = _nothing

    def acquire(self) -> str | None:
        """Take the lock, until `close`, or the end of this object or of this process.

        Returns:
            A line about a lock that a process left behind without an orderly end, or None.

        Raises:
            ValueError: another process holds it; the message says which one. Or the file is a link or no file.
        """
        assert self._file is None, self.path
        self._file = open_to_append(self.path)
        folder = os.open(self.path.parent, os.O_RDONLY | os.O_DIRECTORY | os.O_CLOEXEC)
        self._release = weakref.finalize(self, _close, self._file, folder)
        try:
            self._take(self._file, folder)
        except ValueError:
            self._give_back()
            raise
        left = self._holder() if os.fstat(self._file).st_size else None
        holder = {"pid": os.getpid(), "host": socket.gethostname(), "unix_time_s": time.time()}
        os.ftruncate(self._file, 0)
        os.write(self._file, json.dumps(holder).encode())
        return left and f"{self.path.parent} was left by {left}, which has ended without saying so"

    def moved(self, folder: Path) -> RunLock:
        """This lock, whose folder has got another name."""
        self.path = folder / self.path.name
        return self

    def since_ns(self) -> int:
        """When the lock was taken, by the clock of the disk that it lies on."""
        assert self._file is not None, self.path
        return os.fstat(self._file).st_mtime_ns

    def is_held(self) -> bool:
        """Whether a process holds the lock, as far as this machine can tell."""
        file = os.open(self.path.parent, os.O_RDONLY | os.O_DIRECTORY | os.O_CLOEXEC)
        try:
            return not _flock(file)
        finally:
            os.close(file)

    def close(self) -> None:
        """Give the lock back and empty the file; nothing happens when it is not held."""
        if self._file is not None:
            os.ftruncate(self._file, 0)
            self._give_back()

    def _take(self, file: int, folder: int) -> None:
        try:
            free = _flock(file)
        except OSError as error:
            raise ValueError(f"{self.path} cannot be locked: {error}; put the run on a disk with locks") from error
        if not (free and _flock_where_possible(folder)):
            raise ValueError(
                f"{self.path.parent} is in use by {self._holder()}; wait for its end, or stop it with: "
                f"nsa halt {self.path.parent}"
            )

    def _holder(self) -> str:
        assert self._file is not None
        try:
            values: dict[str, Any] = json.loads(os.pread(self._file, MAX_BYTES, 0))
            since_s = time.time() - values["unix_time_s"]
            return printable(f"process {values['pid']} on {values['host']}, started {since_s:.0f} s ago")
        except (ValueError, KeyError, TypeError):
            return "another process"

    def _give_back(self) -> None:
        self._release()
        self._file = None


def _close(*descriptors: int) -> None:
    for descriptor in descriptors:
        os.close(descriptor)


def _nothing() -> None:
    """What a lock that is not held gives back."""


def _flock(descriptor: int) -> bool:
    """Take a lock without waiting; False when somebody else holds it."""
    try:
        fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except OSError as error:
        if error.errno in (errno.EWOULDBLOCK, errno.EACCES):
            return False
        raise
    return True


def _flock_where_possible(folder: int) -> bool:
    """The same for a folder, which some network disks cannot lock: the file's lock is then all there is."""
    try:
        return _flock(folder)
    except OSError:
        return True
