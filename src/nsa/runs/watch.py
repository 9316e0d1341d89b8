"""A watch over a run from another process, on this or another machine that shares its folder.

    watch = Watch(Path("runs/NAME"), Thresholds())
    look = watch.look()       # reads status and beats, judges them; changes nothing
    done = watch.act(look)    # escalates: say it, ask for stacks, halt the run

Stacks can be asked for on the run's own machine only; HALT works wherever the folder is shared.

Clocks of two machines differ. So how long a rank has been silent is counted from when this watch saw its last beat, by
this machine's steady clock; times in the beats are compared among themselves only.
"""

from __future__ import annotations

import os
import signal
import socket
import time
from collections import deque
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import psutil

from nsa.runs.folder import RunFolder
from nsa.runs.halt import ask_to_halt
from nsa.runs.health import Finding, Process, judge
from nsa.runs.heartbeat import MAX_BEATS, Beat, HeartbeatReader, heartbeat_files, heartbeat_path, stacks_path
from nsa.runs.host import this_machine
from nsa.runs.places import open_run_folder
from nsa.runs.thresholds import Thresholds

MIN_BEATS = 200  # of each rank that are kept and judged, however many share `MAX_BEATS`
START_TOLERANCE_S = 2.0  # a beat may lie so long before the newest process's start, and still be of this run
CLOCK_TOLERANCE_S = 30.0  # clocks that differ by more are told of
USUAL_BEAT_S = 5.0  # between beats, where they do not say
NO_RANK = -1
MAX_NAMED = 8  # ranks that one message names


@dataclass(frozen=True)
class Look:
    """A run at one moment.

    Attributes:
        run: its folder.
        unix_time_s: when it was looked at.
        monotonic_s: the same by a clock that is never set; only differences mean something.
        status: the contents of `status.json`.
        beats: the newest beat of each rank.
        silence_s: seconds since that beat came, as far as the watch can tell; less than there were if it came before
            the watch began.
        processes: whether the process of each rank is there.
        findings: what is not healthy.
    """

    run: Path
    unix_time_s: float
    monotonic_s: float
    status: dict[str, Any]
    beats: dict[int, Beat] = field(default_factory=dict)
    silence_s: dict[int, float] = field(default_factory=dict)
    processes: dict[int, Process] = field(default_factory=dict)
    findings: list[Finding] = field(default_factory=list)

    @property
    def running(self) -> bool:
        """Whether the run says that it is running."""
        return self.status["state"] == "running"

    @property
    def alarms(self) -> list[Finding]:
        """The findings that are more than a remark."""
        return [finding for finding in self.findings if finding.level != "warn"]


class Watch:
    """Looks at a run again and again, and escalates what lasts: it says so, asks for stacks, halts the run.

    Args:
        run: the run's folder.
        thresholds: what is healthy, and how long a finding lasts before each step.
        halt: whether it may halt the run.
        clock: Unix time in seconds.
        monotonic: seconds of a clock that is never set.

    Attributes:
        halted_s: when this watch halted the run by the clock that is never set, or None.
    """

    def __init__(
        self,
        run: Path,
        thresholds: Thresholds,
        *,
        halt: bool = True,
        clock: Callable[[], float] = time.time,
        monotonic: Callable[[], float] = time.monotonic,
    ) -> None:
        self.folder, self.thresholds, self.halt = RunFolder(run), thresholds, halt
        self._clock, self._monotonic = clock, monotonic
        self.halted_s: float | None = None
        self._began_s = monotonic()
        self._readers: dict[int, HeartbeatReader] = {}
        self._beats: dict[int, deque[Beat]] = {}
        self._seen_s: dict[int, float] = {}
        self._live: set[int] = set()  # ranks of which a beat came while this watch looked on
        self._since_s: dict[tuple[str, int], float] = {}
        self._dumped: set[tuple[str, int]] = set()
        self._told_of_clocks = False

    def look(self) -> Look:
        """Read and judge; nothing is changed.

        Raises:
            ValueError: this is no run folder, or a heartbeat file is damaged.
        """
        status = open_run_folder(self.folder.path).read_status()
        look = Look(self.folder.path, self._clock(), self._monotonic(), status)
        self._read(look.monotonic_s)
        for rank in self._ranks():
            last = self._beats[rank][-1]
            look.beats[rank] = last
            look.processes[rank] = process_of(look.run, last)
            look.silence_s[rank] = look.monotonic_s - self._seen_s[rank]
            if look.processes[rank] == "gone":  # on this machine, so by this machine's clock
                look.silence_s[rank] = max(look.silence_s[rank], look.unix_time_s - last.unix_time_s)
        for rank, last in look.beats.items():
            now_s = last.unix_time_s + look.silence_s[rank] if look.running else None
            found = judge(self._beats[rank], self.thresholds, now_s=now_s, process=look.processes[rank])
            look.findings.extend(found)
        look.findings.extend(self._lost(look))
        return look

    def look_once(self, sleep: Callable[[float], object] = time.sleep) -> Look:
        """A look that need not be followed by others: where the last beat seems old, it waits for the next one.

        An old beat of another machine may only come from a clock that goes wrong; one that does not come cannot.
        """
        look = self.look()
        waits_s = max((last.every_s or USUAL_BEAT_S for last in look.beats.values()), default=USUAL_BEAT_S)
        until_s = look.monotonic_s + min(self.thresholds.silent_s, 3 * waits_s + 1)
        while self._doubtful(look) and look.monotonic_s < until_s:
            sleep(0.5)
            look = self.look()
        doubtful = self._doubtful(look)
        if not doubtful:
            return look
        for rank, age_s in doubtful.items():
            if rank == NO_RANK:
                self._began_s = min(self._began_s, look.monotonic_s - age_s)
            else:
                self._seen_s[rank] = min(self._seen_s[rank], look.monotonic_s - age_s)
        return self.look()

    def act(self, look: Look) -> list[str]:
        """Escalate each finding by how long it has lasted; returns what was done, in words."""
        if not look.running:
            return []
        found = {(finding.name, finding.rank): finding for finding in look.findings}
        new = {key: look.monotonic_s for key in found if key not in self._since_s}
        self._since_s = {key: since_s for key, since_s in self._since_s.items() if key in found} | new
        self._dumped &= found.keys()
        done = [f"{'warning' if found[key].level == 'warn' else 'alarm'}: {found[key]}" for key in new]
        for key, finding in found.items():
            lasted_s = look.monotonic_s - self._since_s[key]
            if finding.level == "warn":
                continue
            if lasted_s >= self.thresholds.stacks_after_s and key not in self._dumped:
                self._dumped.add(key)
                done += [f"stacks: {ask_for_stacks(look.run, beat)}" for beat in look.beats.values()]
            if finding.level == "halt" and self.halt and lasted_s >= self.thresholds.halt_after_s:
                done += self._write_halt(look, finding)
        return done + self._clocks(look)

    def gave_up(self, look: Look) -> str | None:
        """Why there is no use in watching any longer, although the run says that it is running; or None."""
        if not look.running or not look.beats:
            return None
        # A process that has just closed its heartbeat is about to write the final status.
        gone = [
            look.processes[rank] == "gone" and (last.phase != "ended" or look.silence_s[rank] > START_TOLERANCE_S)
            for rank, last in look.beats.items()
        ]
        if all(gone) and self.folder.read_status()["state"] == "running":
            return "all processes of the run are gone, and nothing says how it ended; `nsa resume` it"
        waited_s = 0.0 if self.halted_s is None else look.monotonic_s - self.halted_s
        if waited_s > self.thresholds.halt_wait_s:
            who = _listed([f"{last.pid} on {last.host}" for last in look.beats.values()])
            return (
                f"the run did not end within {waited_s:.0f} s of HALT; kill its processes ({who}) and `nsa resume` it"
            )
        return None

    def _read(self, now_s: float) -> None:
        """Take in what came since the last look."""
        files = heartbeat_files(self.folder.path)
        kept = max(MIN_BEATS, MAX_BEATS // max(1, len(files)))
        for rank, path in files.items():
            reader = self._readers.setdefault(rank, HeartbeatReader(path, last=kept))
            new = reader.read()
            if strange := next((beat.rank for beat in new if beat.rank != rank), None):
                raise ValueError(f"{path} holds a beat of rank {strange}; it is another rank's file: move it away")
            if new:
                if rank in self._seen_s:
                    self._live.add(rank)
                self._seen_s[rank] = now_s
                self._beats.setdefault(rank, deque(maxlen=kept)).extend(new)

    def _ranks(self) -> list[int]:
        """Ranks that have beaten since the newest process started; what an earlier process left does not count."""
        last = {rank: beats[-1] for rank, beats in self._beats.items()}
        start_s = max((beat.process_start_s for beat in last.values()), default=0.0)
        return [
            rank for rank, beat in last.items() if rank in self._live or beat.unix_time_s >= start_s - START_TOLERANCE_S
        ]

    def _doubtful(self, look: Look) -> dict[int, float]:
        """Ranks of a running run whose last beat seems old, or to come, and how old; `NO_RANK` for one without any."""
        if not look.running:
            return {}
        if not look.beats:
            age_s = look.unix_time_s - look.status["unix_time_s"]
            return {NO_RANK: age_s} if abs(age_s) > self.thresholds.silent_s else {}
        ages_s = {rank: look.unix_time_s - self._last_sign_s(rank) for rank in look.beats.keys() - self._live}
        return {
            rank: age_s
            for rank, age_s in ages_s.items()
            if abs(age_s) > self.thresholds.silent_s and look.processes[rank] != "gone"
        }

    def _last_sign_s(self, rank: int) -> float:
        """When a rank beat last by its own clock, or by that of the file's disk if that is earlier."""
        return min(self._beats[rank][-1].unix_time_s, heartbeat_path(self.folder.path, rank).stat().st_mtime)

    def _lost(self, look: Look) -> list[Finding]:
        """Ranks that never beat, and a run whose processes have all ended without a word."""
        newest = max(look.beats.values(), key=lambda beat: beat.process_start_s, default=None)
        waited_s = look.monotonic_s - self._began_s
        if newest is not None:
            waited_s = newest.unix_time_s + look.silence_s[newest.rank] - newest.process_start_s
        limit_s = self.thresholds.silent_s
        if not look.running or waited_s <= limit_s:
            return []
        message = f"no beat {waited_s:.0f} s after the start (at most {limit_s:g})"
        remedy = "Look at the output of that rank; a run without all its ranks only waits: end it and `nsa resume`"
        missing = [rank for rank in range(newest.world_size if newest else 1) if rank not in look.beats]
        if len(missing) > MAX_NAMED:
            message += f", nor of {len(missing) - MAX_NAMED} ranks more"
        found = [Finding("silent", "halt", rank, look.status["step"], message, remedy) for rank in missing[:MAX_NAMED]]
        ended = all(beat.phase == "ended" for beat in look.beats.values())
        if look.beats and ended and min(look.silence_s.values()) > limit_s:
            message, remedy = "all processes have ended while status.json says running", "Look at the run's output"
            found.append(Finding("run", "halt", 0, look.status["step"], message, f"{remedy}, then `nsa resume`"))
        return found

    def _clocks(self, look: Look) -> list[str]:
        """A remark, once, about the clock of a machine whose beats come in time but are dated otherwise."""
        for rank in self._live & look.beats.keys():
            last, ahead_s = look.beats[rank], look.beats[rank].unix_time_s - look.unix_time_s
            if look.silence_s[rank] == 0 and abs(ahead_s) > CLOCK_TOLERANCE_S and not self._told_of_clocks:
                self._told_of_clocks = True
                side = "ahead of" if ahead_s > 0 else "behind"
                return [
                    f"note: the clock of {last.host} is {abs(ahead_s):.0f} s {side} this machine's; that is no harm"
                ]
        return []

    def _write_halt(self, look: Look, finding: Finding) -> list[str]:
        if self.halted_s is not None:
            return []
        try:
            ask_to_halt(self.folder.halt, f"nsa watch: {finding}")
        except OSError as error:
            return [f"halt: {self.folder.halt} cannot be written ({error.strerror}); stop the run on its own machine"]
        self.halted_s = look.monotonic_s
        return [f"halt: wrote {self.folder.halt}; the run ends with a checkpoint after its current step"]


def process_of(run: Path, beat: Beat) -> Process:
    """Whether the process that wrote a beat is there; "unknown" where this machine or user cannot tell.

    The process is known by its hold on the heartbeat file: it has that open for writing from its first beat to its
    last. A number alone can be another process's by now, or be made up by whoever wrote the file.
    """
    if beat.host != socket.gethostname() or (beat.machine or this_machine()) != this_machine():
        return "unknown"
    try:
        process = psutil.Process(beat.pid)
        held = [Path(file.path) for file in process.open_files() if getattr(file, "mode", "a") != "r"]
    except (psutil.NoSuchProcess, psutil.ZombieProcess):
        return "gone"
    except psutil.AccessDenied:
        return "unknown"
    path = heartbeat_path(run, beat.rank)
    return "alive" if any(file.name == path.name and path.samefile(file) for file in held) else "gone"


def ask_for_stacks(run: Path, beat: Beat) -> str:
    """Send SIGUSR1 to a rank's process, where that is the right one; returns what was done, in words."""
    state = process_of(run, beat)
    if state == "alive" and beat.phase != "ended":
        try:
            os.kill(beat.pid, signal.SIGUSR1)
        except OSError as error:  # it has just ended, or is not ours to signal
            return f"rank {beat.rank}: process {beat.pid} cannot be asked: {error.strerror}"
        return f"rank {beat.rank} (process {beat.pid}) writes its stacks to {stacks_path(run, beat.rank)}"
    if state == "unknown":
        return f"rank {beat.rank}: ask on {beat.host} with `kill -USR1 {beat.pid}`; this is {socket.gethostname()}"
    return f"rank {beat.rank}: process {beat.pid} is gone"


def _listed(names: Sequence[str]) -> str:
    rest = f" and {len(names) - MAX_NAMED} more" if len(names) > MAX_NAMED else ""
    return ", ".join(names[:MAX_NAMED]) + rest
