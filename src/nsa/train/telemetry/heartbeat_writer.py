"""The heartbeat of a rank: a thread that writes a line every few seconds, also while the main thread hangs.

    with Heartbeat(heartbeat_path(run, rank=0), rank=0, world_size=1, num_steps=1000) as heartbeat:
        heartbeat.update(phase="step")
        heartbeat.update(step=1, loss=5.5)

The file grows with time and not with steps, about 1 KB a line. A thread needs the interpreter: while the main thread
hangs in C code that holds Python's lock, no line comes, and the watch tells that by the silence.
"""

from __future__ import annotations

import os
import socket
import sys
import threading
import time
from collections import Counter, deque
from collections.abc import Sequence
from dataclasses import fields
from pathlib import Path
from types import TracebackType
from typing import Any

import psutil
import torch

from nsa.runs.files import append, open_to_append
from nsa.runs.heartbeat import SCHEMA, Beat
from nsa.runs.host import this_machine
from nsa.train.telemetry.progress import percentiles_ms
from nsa.units import GIB

NUM_WAITS = 256  # newest waits for data whose percentiles a beat holds
REPORTED = frozenset(f.name for f in fields(Beat)) - {"unix_time_s", "progress_age_s", "counters"}
"""The fields of a beat that others tell it; it knows the rest itself."""


class Heartbeat:
    """Writes one rank's beats; a context manager. All methods may be called by any thread and cost microseconds.

    Args:
        path: the file; lines of an earlier process stay.
        rank, world_size: of this process.
        num_steps: optimizer steps of the whole run.
        start_step: optimizer steps done before this process.
        every_s: seconds between lines.
        device: whose memory is reported when it is a CUDA device.
    """

    def __init__(
        self,
        path: Path,
        *,
        rank: int,
        world_size: int,
        num_steps: int,
        start_step: int = 0,
        every_s: float = 5.0,
        device: torch.device | None = None,
    ) -> None:
        self.path, self.every_s, self.device = path, every_s, device
        self._process = psutil.Process()
        self._values: dict[str, Any] = {
            "rank": rank,
            "world_size": world_size,
            "host": socket.gethostname(),
            "pid": self._process.pid,
            "process_start_s": self._process.create_time(),
            "machine": this_machine(),
            "every_s": every_s,
            "phase": "startup",
            "start_step": start_step,
            "step": start_step,
            "num_steps": num_steps,
        }
        self._counters: Counter[str] = Counter()
        self._waits_s: deque[float] = deque(maxlen=NUM_WAITS)
        self._progress_s = time.monotonic()
        self._lock, self._writing = threading.Lock(), threading.Lock()
        self._stopped = threading.Event()
        self._thread = threading.Thread(target=self._beat_on, name="heartbeat", daemon=True)

    def update(self, *, waits_s: Sequence[float] = (), **values: Any) -> None:
        """Report progress and values of `Beat`; `waits_s` are new waits for data in seconds."""
        if not values.keys() <= REPORTED:
            raise TypeError(f"a beat has no {', '.join(sorted(values.keys() - REPORTED))} to report")
        with self._lock:
            self._values.update(values)
            self._waits_s.extend(waits_s)
            self._progress_s = time.monotonic()

    def count(self, name: str, total: int) -> None:
        """Set the counter of something that does not happen in a healthy run; this is no progress."""
        with self._lock:
            self._counters[name] = total

    def __enter__(self) -> Heartbeat:
        self._file = open_to_append(self.path)
        _cut_half_line(self._file)
        self.beat()
        self._thread.start()
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self._stopped.set()
        self._thread.join()
        self._values["phase"] = "ended"
        self.beat()
        os.close(self._file)

    def _beat_on(self) -> None:
        while not self._stopped.wait(self.every_s):
            self.beat()

    def beat(self) -> None:
        """Write a line now; one that does not fit on the disk is taken back, counted, and told on standard error."""
        with self._writing:
            self._write()

    def _write(self) -> None:
        line = SCHEMA.dump_json(self._beat()) + b"\n"
        if (reason := append(self._file, line)) is None:
            return
        with self._lock:
            self._counters["lost_beats"] += 1
        if self._counters["lost_beats"] == 1:
            print(f"{self.path}: a beat could not be written: {reason}; free space there", file=sys.stderr)

    def _beat(self) -> Beat:
        with self._lock:
            values, counters, waits_s = dict(self._values), dict(self._counters), list(self._waits_s)
            age_s = time.monotonic() - self._progress_s
        if waits_s:
            values["fetch_p50_ms"], values["fetch_p95_ms"] = percentiles_ms(waits_s)
        if self.device is not None and self.device.type == "cuda":
            values["gpu_allocated_gib"] = torch.cuda.memory_allocated(self.device) / GIB
            values["gpu_reserved_gib"] = torch.cuda.memory_reserved(self.device) / GIB
        values["host_rss_gib"] = self._process.memory_info().rss / GIB
        return Beat(unix_time_s=time.time(), progress_age_s=age_s, counters=counters, **values)


def _cut_half_line(file: int) -> None:
    """Remove what a killed process left of its last line."""
    size = os.fstat(file).st_size
    tail = os.pread(file, size, 0) if size <= 2**16 else os.pread(file, 2**16, size - 2**16)
    os.ftruncate(file, size - len(tail) + tail.rfind(b"\n") + 1)
