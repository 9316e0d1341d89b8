"""Lines about long work on standard error, so that a run which reads or waits does not look dead.

progress = Progress("reading corpus.jsonl", total=size_bytes)
progress.reached(done_bytes)      # says a line at most every ten seconds
"""

from __future__ import annotations

import sys
import time
from collections.abc import Callable

EVERY_S = 10.0


def say(message: str) -> None:
    """Print a line on standard error."""
    print(f"nsa data: {message}", file=sys.stderr, flush=True)


class Progress:
    """Says how far a piece of work has come, every `every_s` seconds.

    Args:
        what: the work.
        total: its end, in any unit; 0 where it is not known.
        notify: takes the lines.
        every_s: seconds between lines.
    """

    def __init__(
        self, what: str, total: float, *, notify: Callable[[str], None] = say, every_s: float = EVERY_S
    ) -> None:
        self._what, self._total, self._notify, self._every_s = what, total, notify, every_s
        self._start_s = self._said_s = time.monotonic()

    def reached(self, done: float) -> None:
        """Report the place that the work has come to."""
        now_s = time.monotonic()
        if now_s - self._said_s >= self._every_s:
            self._said_s = now_s
            share = f"{done / self._total:.0%}" if self._total else f"{done:,.0f}"
            self._notify(f"{self._what}: {share} after {now_s - self._start_s:.0f} s")
