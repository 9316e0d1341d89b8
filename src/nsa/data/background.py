"""Work on a thread of its own, with its result or its exception handed to whoever waits for it.

The threads are daemons: one that hangs in a read does not keep the process from ending.
"""

from __future__ import annotations

import threading
from collections.abc import Callable
from concurrent.futures import Future
from types import TracebackType
from typing import Any, TypeVar

Result = TypeVar("Result")


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


def in_background(name: str, work: Callable[[], Result]) -> Future[Result]:
    """Start `work` on a thread called `name`; its result, or its exception, comes from the future's `result()`."""
    future: Future[Result] = Future()

    def run() -> None:
        with HandsOverErrors(future.set_exception):
            future.set_result(work())

    threading.Thread(target=run, name=name, daemon=True).start()
    return future
