"""`stacks_rank{r}.txt`: the Python stacks of all threads, appended whenever the process receives SIGUSR1.

    with stacks_on_signal(stacks_path(run, rank=0)):
        train()
    # elsewhere: kill -USR1 PID

The handler is C code of `faulthandler`, which needs neither the interpreter nor its lock: it also answers when Python
hangs in C.
"""

from __future__ import annotations

import faulthandler
import os
import signal
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from nsa.runs.files import open_to_append


@contextmanager
def stacks_on_signal(path: Path) -> Iterator[None]:
    """Append the stacks of all threads to `path` at every SIGUSR1 inside the block.

    Behind it the signal does what it did before; but where that would end the process it is ignored from then on, as a
    request may come late.
    """
    before = signal.getsignal(signal.SIGUSR1)
    with os.fdopen(open_to_append(path), "ab") as file:
        faulthandler.register(signal.SIGUSR1, file=file, all_threads=True)
        try:
            yield
        finally:
            faulthandler.unregister(signal.SIGUSR1)
            signal.signal(signal.SIGUSR1, signal.SIG_IGN if before in (signal.SIG_DFL, None) else before)
