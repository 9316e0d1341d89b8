"""`heartbeat_rank{r}.jsonl`: what a rank is doing, one JSON object a line; read here, written by the trainer.

beats = read_heartbeats(heartbeat_path(run, rank=0))
"""

from __future__ import annotations

import os
import re
from dataclasses import dataclass, field
from pathlib import Path
from typing import IO, Annotated, Literal

from pydantic import ConfigDict, Field, TypeAdapter, ValidationError

from nsa.inspect.statistics import GateStatistics, SelectionStatistics
from nsa.terminal import printable

Phase = Literal["startup", "fetch", "step", "evaluate", "checkpoint", "sample", "finish", "ended"]
"""What the main thread is at; "ended" is in the last line of a process that closed its heartbeat."""

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


def heartbeat_path(run: Path, rank: int) -> Path:
    """Where a rank of a run folder beats."""
    return run / f"heartbeat_rank{rank}.jsonl"


class HeartbeatReader:
    """Reads a heartbeat file bit by bit: each `read` returns the lines that came since the last one.

    Args:
        path: the file; it may appear later.
        last: beats that a read returns at most, the newest ones; what lies before them is not even read.
    """

    def __init__(self, path: Path, *, last: int = MAX_BEATS) -> None:
        self.path, self.last = path, last
        self._offset = 0
        self._line: int | None = 0  # whole lines before the offset; None once some were skipped

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


def stacks_path(run: Path, rank: int) -> Path:
    """Where a rank of a run folder leaves its stacks."""
    return run / f"stacks_rank{rank}.txt"
