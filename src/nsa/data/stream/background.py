"""Work on a thread of its own, with its result or its exception handed to whoever waits for it.

The threads are daemons: one that hangs in a read does not keep the process from ending. But the interpreter must not
end while one is inside a library that is no Python: that aborts the process. Whoever starts one ends it before.
"""

from __future__ import annotations

import threading
from collections.abc import Callable
from concurrent.futures import Future
from types import TracebackType
from typing import Any, TypeVar

Result = TypeVar("Result")
JOIN_S = 10.0  # that a thread which was told to end may take; one that hangs in a read takes longer


class HandsOverErrors:
    """A `with` block whose exception, whichever it is, goes to `receive` instead of ending the thread with a print."""

    def __init__(self, receive: Callable[[BaseException], Any]) -> None:
        self._receive = receive

    def __enter__(self) -> None:
        pass

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> bool:
        if error is not None:
            self._receive(error)
        return True


class BackgroundFuture(Future[Result]):
    """The future of work on a thread of its own.

    Attributes:
        thread: where the work is done.
    """

    thread: threading.Thread


def in_background(name: str, work: Callable[[], Result]) -> BackgroundFuture[Result]:
    """Start `work` on a thread called `name`; its result, or its exception, comes from the future's `result()`."""
    future: BackgroundFuture[Result] = BackgroundFuture()

    def run() -> None:
        with HandsOverErrors(future.set_exception):
            future.set_result(work())

    future.thread = threading.Thread(target=run, name=name, daemon=True)
    future.thread.start()
    return future


def join(thread: threading.Thread) -> None:
    """Wait a while for a thread that was told to end, unless it is this one."""
    if thread is not threading.current_thread():
        thread.join(JOIN_S)
