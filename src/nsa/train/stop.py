"""Requests to stop a run: a signal to any rank, or a file named HALT in the run folder; all ranks stop together.

    with StopRequest(folder.halt, parallel) as stop:
        while not (asked := stop.agreed()):
            train_one_step()
        print(asked.reason, asked.rank)

`nsa halt RUN`, or `touch runs/NAME/HALT`, writes the file; its contents, if any, become the reason. SIGINT and SIGTERM
let the current step finish; a second signal acts as usual.
"""

from __future__ import annotations

import os
import signal
import time
from dataclasses import dataclass
from pathlib import Path
from types import FrameType, TracebackType

import torch

from nsa.train.parallel import Parallel
from nsa.train.run_folder import write_text

SIGNALS = (signal.SIGINT, signal.SIGTERM)
HALT_CODE = 1  # codes of signals follow
FAILURE_CODE = 2 + len(SIGNALS)
MAX_REASON_CHARACTERS = 500


@dataclass(frozen=True)
class Stop:
    """Why all ranks leave the loop after the same step.

    Attributes:
        reason: "SIGTERM", "SIGINT", "HALT" with the file's contents, or that something failed in the background.
        rank: the first rank that was asked.
    """

    reason: str
    rank: int


class StopRequest:
    """Notes the first SIGINT or SIGTERM inside the `with` block, looks for the HALT file, and agrees with other ranks.

    Args:
        halt: the HALT file, which rank 0 looks for.
        parallel: this process among those of the run.

    Attributes:
        signal_name: the signal that this process was sent, or None.
    """

    def __init__(self, halt: Path, parallel: Parallel) -> None:
        self.halt, self.parallel = halt, parallel
        self.signal_name: str | None = None
        self._previous: dict[signal.Signals, signal.Handlers | object] = {}

    def agreed(self, *, failed: bool = False) -> Stop | None:
        """Whether any rank was asked to stop; the same answer on all ranks, which must all ask. One small all-reduce.

        A HALT file is renamed to HALT.old when it is obeyed.

        Args:
            failed: something that this rank does in the background has failed.
        """
        codes = torch.zeros(self.parallel.world_size, dtype=torch.int64)
        codes[self.parallel.rank] = self._code(failed)
        asked = [(code, rank) for rank, code in enumerate(self.parallel.sum(codes).tolist()) if code]
        if not asked:
            return None
        code, rank = asked[0]
        if code == FAILURE_CODE:
            return Stop("a failure in the background", rank)
        if code == HALT_CODE:
            return Stop(self.parallel.broadcast(take_halt(self.halt) if self.parallel.is_main else ""), rank)
        return Stop(SIGNALS[code - HALT_CODE - 1].name, rank)

    def _code(self, failed: bool) -> int:
        if failed:
            return FAILURE_CODE
        if self.signal_name:
            return HALT_CODE + 1 + SIGNALS.index(signal.Signals[self.signal_name])
        return HALT_CODE if self.parallel.is_main and self.halt.exists() else 0

    def __enter__(self) -> StopRequest:
        for number in SIGNALS:
            self._previous[number] = signal.signal(number, self._on_signal)
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self._restore()

    def _on_signal(self, number: int, frame: FrameType | None) -> None:
        self.signal_name = signal.Signals(number).name
        self._restore()

    def _restore(self) -> None:
        while self._previous:
            number, handler = self._previous.popitem()
            signal.signal(number, handler)  # pyright: ignore[reportArgumentType]


def ask_to_halt(halt: Path, reason: str = "") -> None:
    """Write the HALT file of a run; the run stops after its current step with a checkpoint."""
    write_text(halt, reason)


def take_halt(halt: Path) -> str:
    """Put a HALT file aside as HALT.old and return the reason that it gives."""
    text = halt.read_text(encoding="utf-8", errors="replace").strip()[:MAX_REASON_CHARACTERS]
    os.replace(halt, halt.with_name(f"{halt.name}.old"))
    return f"HALT: {text}" if text else "HALT"


def clear_stale_halt(halt: Path) -> str | None:
    """Put aside a HALT file from before a run's start, so that it stops no run that it was not meant for.

    Returns:
        A line about it, or None when there was none.
    """
    if not halt.exists():
        return None
    age_s = time.time() - halt.stat().st_mtime
    take_halt(halt)
    return f"{halt} is from {age_s:.0f} s before this start and was put aside as {halt.name}.old; it stops nothing"
