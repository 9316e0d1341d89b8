"""Standard output and standard error of a run, which outlive whoever reads them.

    with lasting_output():
        print("step 1")     # the reader may be gone, the terminal closed, the log's disk full: the run continues

What cannot be written is dropped, and said once on the other stream. What the stream cannot encode is written as
escapes.
"""

from __future__ import annotations

import errno
import os
import sys
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager, redirect_stderr, redirect_stdout
from typing import Any, TextIO

MAY_PASS = (errno.ENOSPC, errno.EDQUOT, errno.EAGAIN)  # a disk may get room again; a reader does not come back


class LastingOutput:
    """A text stream whose `write` and `flush` never fail for what happened to its other end.

    Args:
        stream: where the text goes.
        name: of the stream, in what is said about it.
        other: where a loss is said.
    """

    def __init__(self, stream: TextIO, name: str, other: TextIO | None) -> None:
        self._stream, self._name, self._other = stream, name, other
        self._told = False

    def write(self, text: str) -> int:
        """Write as much as there is somebody to take it."""
        try:
            self._stream.write(text)
        except UnicodeEncodeError as error:
            return self.write(text.encode(error.encoding, "backslashreplace").decode(error.encoding))
        except OSError as error:
            self._lost(error)
        return len(text)

    def flush(self) -> None:
        """Hand on what was written."""
        try:
            self._stream.flush()
        except OSError as error:
            self._lost(error)

    def close_quietly(self) -> None:
        """Hand on the rest, so that nothing is left for the interpreter's end to fail with."""
        try:
            self._stream.flush()
        except OSError:
            self._drop()

    def __getattr__(self, name: str) -> Any:
        return getattr(self._stream, name)

    def _lost(self, error: OSError) -> None:
        if error.errno not in MAY_PASS:
            self._drop()
        if not self._told and self._other is not None:
            self._told = True
            lasting = LastingOutput(self._other, "", None)
            lasting.write(f"{self._name} cannot be written: {error.strerror or error}; the run continues\n")
            lasting.flush()

    def _drop(self) -> None:
        """Let the stream end nowhere from here on."""
        try:
            descriptor = self._stream.fileno()
        except OSError:
            return  # of no file: there is nothing to redirect
        nowhere = os.open(os.devnull, os.O_WRONLY)
        os.dup2(nowhere, descriptor)
        os.close(nowhere)


@contextmanager
def lasting_output() -> Iterator[None]:
    """Let standard output and standard error of this process last as long as the block."""
    out, err = sys.stdout, sys.stderr
    with ExitStack() as stack:
        if out is not None:
            lasting = LastingOutput(out, "standard output", err)
            stack.callback(lasting.close_quietly)
            stack.enter_context(redirect_stdout(lasting))  # pyright: ignore[reportArgumentType]
        if err is not None:
            lasting = LastingOutput(err, "standard error", out)
            stack.callback(lasting.close_quietly)
            stack.enter_context(redirect_stderr(lasting))  # pyright: ignore[reportArgumentType]
        yield
