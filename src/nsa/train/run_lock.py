"""One process at a time writes a run folder.

The lock is the operating system's (`flock`) on `run.lock`: it ends with the process that holds it, however that dies,
so that a file left behind by a killed run locks nothing. The file says who holds it.
"""

from __future__ import annotations

import errno
import fcntl
import json
import os
import socket
import time
from pathlib import Path
from typing import IO, Any


class RunLock:
    """The lock of one run folder.

    Args:
        path: the lock file.
    """

    def __init__(self, path: Path) -> None:
        self.path = path
        self._file: IO[str] | None = None

    def acquire(self) -> str | None:
        """Take the lock, until `close` or the end of this process.

        Returns:
            A line about a lock that a process left behind without an orderly end, or None.

        Raises:
            ValueError: another process holds it; the message says which one.
        """
        assert self._file is None, self.path
        file = self.path.open("a+", encoding="utf-8")
        try:
            fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except OSError as error:
            holder = self._holder(file)
            file.close()
            if error.errno not in (errno.EWOULDBLOCK, errno.EACCES):
                raise ValueError(f"{self.path} cannot be locked: {error}; put the run on a disk with locks") from error
            raise ValueError(
                f"{self.path.parent} is in use by {holder}; wait for its end, or stop it with: "
                f"nsa halt {self.path.parent}"
            ) from None
        left = self._holder(file) if file.tell() else None
        file.truncate(0)
        json.dump({"pid": os.getpid(), "host": socket.gethostname(), "unix_time_s": time.time()}, file)
        file.flush()
        self._file = file
        return left and f"{self.path.parent} was left by {left}, which has ended without saying so"

    def close(self) -> None:
        """Give the lock back and empty the file; nothing happens when it is not held."""
        if self._file is not None:
            self._file.truncate(0)
            self._file.close()
            self._file = None

    @staticmethod
    def _holder(file: IO[str]) -> str:
        file.seek(0)
        try:
            values: dict[str, Any] = json.load(file)
            since_s = time.time() - values["unix_time_s"]
            return f"process {values['pid']} on {values['host']}, started {since_s:.0f} s ago"
        except (ValueError, KeyError, TypeError):
            return "another process"
