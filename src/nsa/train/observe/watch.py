"""A watch over a run from another process, on this or another machine that shares its folder.

    watch = Watch(Path("runs/NAME"), Thresholds())
    look = watch.look()       # reads status and beats, judges them; changes nothing
    done = watch.act(look)    # the ladder: say it, ask for stacks, halt the run

Stacks can be asked for on the run's own machine only; HALT works wherever the folder is shared.
"""

from __future__ import annotations

import math
import os
import signal
import socket
import time
from collections import deque
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import psutil

from nsa.train.halt import ask_to_halt
from nsa.train.observe.health import Finding, Process, judge
from nsa.train.observe.heartbeat import Beat, HeartbeatReader, heartbeat_files
from nsa.train.observe.stacks import stacks_path
from nsa.train.observe.thresholds import Thresholds
from nsa.train.run_folder import RunFolder

MAX_BEATS = 17_280  # of each rank that are kept and judged: a day's at one in 5 s
START_TOLERANCE_S = 2.0  # two readings of a process's start may differ by this


@dataclass(frozen=True)
class Look:
    """A run at one moment.

    Attributes:
        run: its folder.
        unix_time_s: when it was looked at.
        status: the contents of `status.json`.
        beats: the newest beat of each rank.
        findings: what is not healthy.
    """

    run: Path
    unix_time_s: float
    status: dict[str, Any]
    beats: dict[int, Beat] = field(default_factory=dict)
    findings: list[Finding] = field(default_factory=list)

    @property
    def running(self) -> bool:
        """Whether the run says that it goes on."""
        return self.status["state"] == "running"

    @property
    def alarms(self) -> list[Finding]:
        """The findings that are more than a remark."""
        return [finding for finding in self.findings if finding.level != "warn"]


class Watch:
    """Looks at a run again and again, and climbs the ladder for what lasts.

    Args:
        run: the run's folder.
        thresholds: what is healthy, and how long a finding lasts before each rung.
        halt: whether the last rung may be climbed.
        clock: Unix time in seconds.

    Attributes:
        halted_s: when this watch halted the run, or None.
    """

    def __init__(
        self, run: Path, thresholds: Thresholds, *, halt: bool = True, clock: Callable[[], float] = time.time
    ) -> None:
        self.folder, self.thresholds, self.halt, self._clock = RunFolder(run), thresholds, halt, clock
        self.halted_s: float | None = None
        self._readers: dict[int, HeartbeatReader] = {}
        self._beats: dict[int, deque[Beat]] = {}
        self._since_s: dict[tuple[str, int], float] = {}
        self._dumped: set[tuple[str, int]] = set()

    def look(self) -> Look:
        """Read and judge; nothing is changed.

        Raises:
            ValueError: this is no run folder, or a heartbeat file is damaged.
        """
        if not self.folder.status_json.is_file():
            raise ValueError(f"{self.folder.path} is no run folder: it holds no status.json")
        now_s, status = self._clock(), self.folder.read_status()
        for rank, path in heartbeat_files(self.folder.path).items():
            reader = self._readers.setdefault(rank, HeartbeatReader(path))
            self._beats.setdefault(rank, deque(maxlen=MAX_BEATS)).extend(reader.read())
        ranks = self._ranks()
        look = Look(self.folder.path, now_s, status, {rank: self._beats[rank][-1] for rank in ranks})
        living_s = now_s if look.running else None
        for rank, last in look.beats.items():
            look.findings.extend(judge(self._beats[rank], self.thresholds, now_s=living_s, process=process_of(last)))
        look.findings.extend(self._lost(look))
        return look

    def act(self, look: Look) -> list[str]:
        """Climb the ladder for each finding as far as it has lasted; returns what was done, in words."""
        if not look.running:
            return []
        found = {(finding.name, finding.rank): finding for finding in look.findings}
        new = {key: look.unix_time_s for key in found if key not in self._since_s}
        self._since_s = {key: since_s for key, since_s in self._since_s.items() if key in found} | new
        self._dumped &= found.keys()
        done = [f"{'warning' if found[key].level == 'warn' else 'alarm'}: {found[key]}" for key in new]
        for key, finding in found.items():
            lasted_s = look.unix_time_s - self._since_s[key]
            if finding.level == "warn":
                continue
            if lasted_s >= self.thresholds.stacks_after_s and key not in self._dumped:
                self._dumped.add(key)
                done += [f"stacks: {ask_for_stacks(look.run, beat)}" for beat in look.beats.values()]
            if finding.level == "halt" and self.halt and lasted_s >= self.thresholds.halt_after_s:
                done += self._write_halt(look, finding)
        return done

    def gave_up(self, look: Look) -> str | None:
        """Why there is no use in watching any longer, although the run says that it goes on; or None."""
        if not look.running or not look.beats:
            return None
        if all(process_of(last) == "gone" for last in look.beats.values()):
            return "all processes of the run are gone, and nothing says how it ended; `nsa resume` it"
        waited_s = 0.0 if self.halted_s is None else look.unix_time_s - self.halted_s
        if waited_s > self.thresholds.halt_wait_s:
            who = ", ".join(f"{last.pid} on {last.host}" for last in look.beats.values())
            return (
                f"the run did not end within {waited_s:.0f} s of HALT; kill its processes ({who}) and `nsa resume` it"
            )
        return None

    def _ranks(self) -> list[int]:
        """Ranks that have beaten since the newest process started; what an earlier process left does not count."""
        last = {rank: beats[-1] for rank, beats in self._beats.items() if beats}
        start_s = max((beat.process_start_s for beat in last.values()), default=0.0)
        return [rank for rank, beat in last.items() if beat.unix_time_s >= start_s - START_TOLERANCE_S]

    def _lost(self, look: Look) -> list[Finding]:
        """Ranks that never beat, and a run whose processes have all ended without a word."""
        newest = max(look.beats.values(), key=lambda beat: beat.process_start_s, default=None)
        start_s = look.status["unix_time_s"] if newest is None else newest.process_start_s
        missing = [rank for rank in range(newest.world_size if newest else 1) if rank not in look.beats]
        if not look.running or look.unix_time_s - start_s <= self.thresholds.silent_s:
            return []
        message = f"no beat {look.unix_time_s - start_s:.0f} s after the start (at most {self.thresholds.silent_s:g})"
        remedy = "Look at the output of that rank; a run without all its ranks only waits: end it and `nsa resume`"
        found = [Finding("silent", "halt", rank, look.status["step"], message, remedy) for rank in missing]
        quiet_s = look.unix_time_s - max((beat.unix_time_s for beat in look.beats.values()), default=math.inf)
        if all(beat.phase == "ended" for beat in look.beats.values()) and quiet_s > self.thresholds.silent_s:
            message, remedy = "all processes have ended while status.json says running", "Look at the run's output"
            found.append(Finding("run", "halt", 0, look.status["step"], message, f"{remedy}, then `nsa resume`"))
        return found

    def _write_halt(self, look: Look, finding: Finding) -> list[str]:
        if self.halted_s is not None:
            return []
        self.halted_s = look.unix_time_s
        ask_to_halt(self.folder.halt, f"nsa watch: {finding}")
        return [f"halt: wrote {self.folder.halt}; the run ends with a checkpoint after its current step"]


def process_of(beat: Beat) -> Process:
    """Whether the process that wrote a beat is there; "unknown" for one of another machine."""
    if beat.host != socket.gethostname():
        return "unknown"
    try:
        process = psutil.Process(beat.pid)
        same = abs(process.create_time() - beat.process_start_s) < START_TOLERANCE_S
        return "alive" if same and process.status() != psutil.STATUS_ZOMBIE else "gone"
    except psutil.NoSuchProcess:
        return "gone"


def ask_for_stacks(run: Path, beat: Beat) -> str:
    """Send SIGUSR1 to a rank's process, where that is the right one; returns what was done, in words."""
    state = process_of(beat)
    if state == "alive" and beat.phase != "ended":
        os.kill(beat.pid, signal.SIGUSR1)
        return f"rank {beat.rank} (process {beat.pid}) writes its stacks to {stacks_path(run, beat.rank)}"
    if state == "unknown":
        return f"rank {beat.rank}: ask on {beat.host} with `kill -USR1 {beat.pid}`; this is {socket.gethostname()}"
    return f"rank {beat.rank}: process {beat.pid} is gone"
