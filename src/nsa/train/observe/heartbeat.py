"""`heartbeat_rank{r}.jsonl`: what a rank is doing, one JSON object a line, also while its main thread hangs.

    with Heartbeat(heartbeat_path(run, rank=0), rank=0, world_size=1, num_steps=1000) as heartbeat:
        heartbeat.update(phase="step")
        heartbeat.update(step=1, loss=5.5)
    beats = read_heartbeats(heartbeat_path(run, rank=0))

A background thread writes a line every `every_s` seconds, so that the file grows with time and not with steps (about
1 KB a line). A thread needs the interpreter: while the main thread hangs in C code that holds Python's lock, no line
comes, and the watch tells that by the silence.
"""

from __future__ import annotations

import os
import re
import socket
import sys
import threading
import time
from collections import Counter, deque
from collections.abc import Sequence
from dataclasses import dataclass, field, fields
from pathlib import Path
from types import TracebackType
from typing import IO, Annotated, Any, Literal

import psutil
import torch
from pydantic import ConfigDict, Field, TypeAdapter, ValidationError

from nsa.inspect import GateStatistics, SelectionStatistics
from nsa.terminal import printable
from nsa.train.observe.machine import this_machine
from nsa.train.observe.progress import percentiles_ms
from nsa.train.run_files import append, open_to_append

Phase = Literal["startup", "fetch", "step", "evaluate", "checkpoint", "sample", "finish", "ended"]
"""What the main thread is at; "ended" is in the last line of a process that closed its heartbeat."""

GIB = 2**30
NUM_WAITS = 256  # newest waits for data whose percentiles a beat holds
LINE_BYTES = 2048  # more than a line has
MAX_BEATS = 17_280  # newest beats of a file that are read: a day's at one in 5 s

# What a line may hold, whoever wrote it: numbers that can be compared, shown and counted up to.
Count = Annotated[int, Field(ge=0, lt=2**63)]
Seconds = Annotated[float, Field(ge=0, le=1e12, allow_inf_nan=False)]
Rate = Annotated[float, Field(ge=0, le=1e18, allow_inf_nan=False)]
Name = Annotated[str, Field(max_length=300)]


@dataclass(frozen=True)
class Beat:
    """One line of a heartbeat file. Values are those of the newest step; None where there is none yet.

    Attributes:
        unix_time_s: when the line was written.
        rank, world_size: of the process, and how many there are.
        host, pid, process_start_s: where it runs, its number there, and the Unix time of its start.
        machine: the running system, as `this_machine` names it, in which the number holds; None where it has no name.
        every_s: seconds between two beats; None in beats of earlier versions.
        phase: what the main thread is at.
        progress_age_s: seconds since the main thread last reported anything.
        start_step, step, num_steps: optimizer steps done when the process began, done now, and to do in all.
        loss: nats per token.
        grad_norm: global norm before clipping.
        lr: learning rate.
        tokens_per_s: of all ranks together.
        mfu: model FLOP utilisation in 0..1.
        step_s: seconds of the step.
        fetch_p50_ms, fetch_p95_ms: median and 95th percentile of the newest waits for data.
        gpu_allocated_gib, gpu_reserved_gib: memory that torch holds in tensors, and from the device; None on a CPU.
        host_rss_gib: memory of the process on the host.
        gate, selection: statistics of all NSA layers together.
        worst_gate_layer, worst_gate: the layer whose gates have the least entropy, and its statistics.
        counters: what does not happen in a healthy run, by name.
    """

    __pydantic_config__ = ConfigDict(ser_json_inf_nan="strings", extra="ignore")

    unix_time_s: Seconds
    rank: Count
    world_size: Annotated[int, Field(ge=1, le=2**20)]
    host: Name
    pid: Annotated[int, Field(ge=1, lt=2**31)]
    process_start_s: Seconds
    phase: Phase
    progress_age_s: Seconds
    start_step: Count
    step: Count
    num_steps: Count
    machine: Name | None = None
    every_s: Seconds | None = None
    loss: float | None = None
    grad_norm: float | None = None
    lr: float | None = None
    tokens_per_s: Rate | None = None
    mfu: Rate | None = None
    step_s: Seconds | None = None
    fetch_p50_ms: Rate | None = None
    fetch_p95_ms: Rate | None = None
    gpu_allocated_gib: Rate | None = None
    gpu_reserved_gib: Rate | None = None
    host_rss_gib: Rate | None = None
    gate: GateStatistics | None = None
    selection: SelectionStatistics | None = None
    worst_gate_layer: int | None = None
    worst_gate: GateStatistics | None = None
    counters: Annotated[dict[Name, Count], Field(max_length=100)] = field(default_factory=dict)


SCHEMA = TypeAdapter(Beat)
FILE_NAME = re.compile(r"heartbeat_rank(0|[1-9][0-9]{0,5})\.jsonl")
REPORTED = frozenset(f.name for f in fields(Beat)) - {"unix_time_s", "progress_age_s", "counters"}


def heartbeat_path(run: Path, rank: int) -> Path:
    """Where a rank of a run folder beats."""
    return run / f"heartbeat_rank{rank}.jsonl"


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


class HeartbeatReader:
    """Reads a heartbeat file bit by bit: each `read` returns the lines that came since the last one.

    Args:
        path: the file; it may appear later.
        last: beats that a read returns at most, the newest ones; what lies before them is not even read.
    """

    def __init__(self, path: Path, *, last: int = MAX_BEATS) -> None:
        self.path, self.last = path, last
        self._offset = 0
        self._line: int | None = 0  # whole lines before the offset; None once some were passed over

    def read(self) -> list[Beat]:
        """New beats, oldest first; a last line without its newline waits for the next read.

        Raises:
            ValueError: this is no file, or a line is no beat; file, line and field are named.
        """
        if not self.path.exists():
            return []
        if not self.path.is_file():
            raise ValueError(f"{self.path} is no file; remove it, or give the folder of another run")
        with self.path.open("rb") as file:
            lines = self._whole_lines(file)
        beats = []
        for line in lines:
            self._line = None if self._line is None else self._line + 1
            beats.append(self._parse(line))
        return beats

    def _whole_lines(self, file: IO[bytes]) -> list[bytes]:
        size, limit = os.fstat(file.fileno()).st_size, self.last * LINE_BYTES
        if size < self._offset:  # another file took its place
            self._offset, self._line = 0, 0
        skipped = size - self._offset > limit
        file.seek(size - limit if skipped else self._offset)
        text = file.read(limit)
        end = text.rfind(b"\n") + 1
        begin = text.find(b"\n") + 1 if skipped else 0
        if skipped and begin == end:
            raise ValueError(f"{self.path} has no line within its last {limit:,} bytes; this is no heartbeat")
        self._offset = file.tell() - len(text) + end
        lines = text[begin:end].splitlines()
        if skipped or len(lines) > self.last:
            self._line = None
        return lines[-self.last :]

    def _parse(self, line: bytes) -> Beat:
        try:
            return SCHEMA.validate_json(line)
        except ValidationError as error:
            first = error.errors(include_input=False, include_url=False)[0]
            number = f"line {self._line}" if self._line is not None else "near its end"
            where = printable(".".join(map(str, first["loc"]))[:100]) or "the line"
            raise ValueError(
                f"{self.path}, {number}: {where}: {first['msg']}; take the damaged line out, or move the file away"
            ) from None


def read_heartbeats(path: Path) -> list[Beat]:
    """The newest `MAX_BEATS` beats of a file, oldest first.

    Raises:
        ValueError: the file is missing, or a line is no beat.
    """
    if not path.exists():
        raise ValueError(f"{path} is missing; is this a run folder?")
    return HeartbeatReader(path).read()


def heartbeat_files(run: Path) -> dict[int, Path]:
    """The heartbeat files of a run folder by rank."""
    found = (FILE_NAME.fullmatch(path.name) for path in run.glob("heartbeat_rank*.jsonl"))
    return {rank: heartbeat_path(run, rank) for rank in sorted(int(name[1]) for name in found if name)}


def _cut_half_line(file: int) -> None:
    """Remove what a killed process left of its last line."""
    size = os.fstat(file).st_size
    tail = os.pread(file, size, 0) if size <= 2**16 else os.pread(file, 2**16, size - 2**16)
    os.ftruncate(file, size - len(tail) + tail.rfind(b"\n") + 1)
