"""Requests to stop a run: a signal to any rank, or a file named HALT in the run folder; all ranks stop together.

    with StopRequest(folder.halt, parallel) as stop:
        while not (asked := stop.agreed()):
            train_one_step()
        print(asked.reason, asked.rank)

`nsa halt RUN`, or `touch runs/NAME/HALT`, writes the file; its contents, if any, become the reason. SIGINT, SIGTERM and
SIGHUP let the current step finish; a second signal acts as usual, but a second SIGHUP, which a lost terminal sends too,
does nothing. What is ignored when the run starts, as SIGHUP is under nohup, stays ignored.
"""

from __future__ import annotations

import signal
from dataclasses import dataclass
from pathlib import Path
from types import FrameType, TracebackType

import torch

from nsa.runs.halt import is_asked, take_halt
from nsa.train.parallel import Parallel

SIGNALS = (signal.SIGINT, signal.SIGTERM, signal.SIGHUP)
HALT_CODE = 1  # codes of signals follow
FAILURE_CODE = 2 + len(SIGNALS)


@dataclass(frozen=True)
class Stop:
    """Why all ranks leave the loop after the same step.

    Attributes:
        reason: the signal's name, "HALT" with the file's contents, or that something failed in the background.
        rank: the first rank that was asked.
    """

    reason: str
    rank: int


class StopRequest:
    """Notes the first signal inside the `with` block, looks for the HALT file, and agrees with other ranks.

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
        return HALT_CODE if self.parallel.is_main and is_asked(self.halt) else 0

    def __enter__(self) -> StopRequest:
        for number in SIGNALS:
            if signal.getsignal(number) is signal.SIG_IGN:
                continue
            self._previous[number] = signal.signal(number, self._on_signal)
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self._restore()

    def _on_signal(self, number: int, frame: FrameType | None) -> None:
        self.signal_name = self.signal_name or signal.Signals(number).name
        self._restore(keep=(signal.SIGHUP,))

    def _restore(self, keep: tuple[signal.Signals, ...] = ()) -> None:
        for number in self._previous.keys() - set(keep):
            signal.signal(number, self._previous.pop(number))  # pyright: ignore[reportArgumentType]
