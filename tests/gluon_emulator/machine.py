"""What an emulated program consists of: partitions, barriers, shared memory, and what is in flight.

Each access to shared memory gets two bits of an unbounded integer: that it happened, and, for those by threads, that a
fence followed. A partition's `known` holds the bits of all that happened before what it does next. Barriers and waits
hand them on, so that two accesses are in order if and only if the later one's partition knows of the earlier one.
"""

from __future__ import annotations

import itertools
import random
import threading
from collections.abc import Callable, Sequence
from typing import Any, NamedTuple

import torch

from gluon_emulator.places import EmulationError, where_in_kernel
from gluon_emulator.values import POISON


class Stop(BaseException):
    """Ends the thread of a partition after another one failed."""


class Schedule:
    """Who goes on, and when pending operations complete.

    Args:
        seed: of all choices; also of the two below, anew for each program, where they are not given.
        eagerness: how likely a pending operation completes at a synchronisation; 0 is as late as possible, 1 at once.
        order: numbers of partitions; the first that can goes on. Empty for a random one.

    Without a given eagerness, some programs also have stragglers: operations that wait until nothing else can be done.
    """

    def __init__(self, seed: int, eagerness: float | None = None, order: Sequence[int] | None = None) -> None:
        self.random = random.Random(seed)
        self.given = (eagerness, order)
        self.start_program()

    def start_program(self) -> None:
        eagerness, order = self.given
        self.stragglers = 0.0
        if eagerness is None:
            eagerness = self.random.choice([0.0, 0.05, 0.3, 1.0])
            self.stragglers = self.random.choice([0.0, 0.0, 0.1, 0.3])
        if order is None:
            order = self.random.sample(range(8), 8) if self.random.random() < 0.5 else ()
        self.eagerness, self.order = eagerness, order

    def straggles(self) -> bool:
        return self.stragglers > 0 and self.random.random() < self.stragglers

    def completes(self, operation: Operation) -> bool:
        """Whether a pending operation completes at a synchronisation."""
        if operation.straggles or self.eagerness == 0:
            return False
        return self.eagerness == 1 or self.random.random() < self.eagerness

    def choose_operation(self, pending: list[Operation]) -> Operation:
        """Which operation completes when no partition can go on."""
        return self.random.choice([x for x in pending if not x.straggles] or pending)

    def choose(self, ready: list[Agent]) -> Agent:
        if len(ready) == 1:
            return ready[0]
        if self.order:
            return min(ready, key=lambda agent: self.order.index(agent.number))
        return self.random.choice(ready)


class Agent:
    """A partition, or the whole program outside `warp_specialize`.

    `known` has a bit for each access that happened before what this partition does next, and one for each access by
    threads that a fence followed.
    """

    def __init__(self, number: int, name: str, num_warps: int, known: int) -> None:
        self.number, self.name, self.num_warps, self.known = number, name, num_warps, known
        self.products: list[Operation] = []
        self.stores: list[Operation] = []
        self.copies: list[Operation] = []
        self.groups: list[list[Operation]] = []  # of copies
        self.turn = threading.Lock()
        self.turn.acquire()
        self.waits: tuple[Barrier, int, int] | None = None  # barrier, parity, the phase that must be over
        self.joins: list[Agent] = []
        self.done = False

    def ready(self) -> bool:
        if self.done or not all(agent.done for agent in self.joins):
            return False
        return self.waits is None or self.waits[0].phase % 2 != self.waits[1]


class Operation:
    """Something that completes at some time after it was issued, once everything in `after` has."""

    def __init__(self, run: Callable[[], object], access: int, after: Sequence[Operation], straggles: bool) -> None:
        self.run, self.access, self.after, self.straggles, self.done = run, access, after, straggles, False


class Barrier:
    """One mbarrier: a phase ends when all arrivals and all expected bytes have come."""

    def __init__(self, program: Program, name: str) -> None:
        self.program, self.name = program, name
        self.count = self.pending = self.bytes = self.phase = 0
        self.valid = True
        self.gathered = self.released = 0  # what those who arrived know, in this phase and up to the last one

    def init(self, count: int) -> None:
        if count < 1:
            raise EmulationError(f"{where_in_kernel()}: a barrier for {count} arrivals")
        self.count = self.pending = count
        self.made = self.program.new_access("init of " + self.name, by_threads=True)
        self.program.agent.known |= self.made

    def check(self, known: int, by_engine: bool = False) -> None:
        if self.count == 0 or not self.valid or not known & self.made:
            raise EmulationError(f"{where_in_kernel()}: {self.name} was not initialised before, or invalidated")
        if by_engine and not known & self.made << 1:
            raise EmulationError(f"{where_in_kernel()}: no fence after the initialisation of {self.name}")

    def invalidate(self, known: int) -> None:
        self.check(known)
        self.valid = False

    def arrive(self, count: int, known: int) -> None:
        self.check(known)
        self.pending -= count
        self.gathered |= known
        if self.pending < 0:
            raise EmulationError(f"{where_in_kernel()}: more than {self.count} arrivals in a phase of {self.name}")
        self.flip()

    def expect(self, num_bytes: int) -> None:
        self.bytes += num_bytes

    def complete_bytes(self, num_bytes: int, access: int, place: str) -> None:
        self.bytes -= num_bytes
        self.gathered |= access
        if self.bytes < 0:
            raise EmulationError(f"{place}: {-self.bytes} bytes more than {self.name} expects")
        self.flip()

    def flip(self) -> None:
        if self.pending or self.bytes:
            return
        self.phase += 1
        self.pending = self.count
        self.released |= self.gathered
        self.gathered = 0
        for agent in self.program.agents:
            if agent.waits is not None and agent.waits[0] is self and self.phase - agent.waits[2] > 1:
                raise EmulationError(f"a phase of {self.name} passed while {agent.name} waited for the one before")

    def __str__(self) -> str:
        return (
            f"{self.name} (phase {self.phase}, {self.pending} of {self.count} arrivals and {self.bytes} bytes to come)"
        )


class Range(NamedTuple):
    """Elements `start` to `end` of a buffer; of rows of `width` elements only the columns `low` to `high`."""

    start: int
    end: int
    width: int = 1
    low: int = 0
    high: int = 1

    def meets(self, other: Range) -> bool:
        if self.end <= other.start or other.end <= self.start:
            return False
        return self.width != other.width or (self.low < other.high and other.low < self.high)

    def holds(self, other: Range) -> bool:
        inside = self.start <= other.start and other.end <= self.end
        return inside and (
            self.width == 1 or (self.width == other.width and self.low <= other.low < other.high <= self.high)
        )


class Region:
    """The last write and the reads after it of a range of a buffer."""

    def __init__(self, where: Range) -> None:
        self.where = where
        self.write = self.reads = 0


class Buffer:
    """One allocation of shared memory, with NaN in it."""

    def __init__(self, program: Program, name: str, dtype: torch.dtype, shape: list[int]) -> None:
        self.program, self.name = program, name
        self.data = torch.full(shape, float("nan") if dtype.is_floating_point else POISON, dtype=dtype)
        self.regions: dict[Range, Region] = {}

    def access(self, where: Range, writes: bool, by_threads: bool) -> int:
        """Record an access by the running partition; raise if one that conflicts may not have ended."""
        program, known = self.program, self.program.agent.known
        access = program.new_access(f"{'writes' if writes else 'reads'} {self.name}", by_threads)
        written = False
        for region in self.regions.values():
            if not region.where.meets(where):
                continue
            written |= region.write != 0
            before = region.write | (region.reads if writes else 0)
            unknown = before & ~known
            if unknown:
                raise EmulationError(f"race: {program.describe(access)} while {program.describe(unknown)}")
            # A thread's read, too, may come after the write of an engine that waits for no fence.
            unfenced = before & program.by_threads & ~(known >> 1)
            if not by_threads and unfenced:
                raise EmulationError(f"no fence between {program.describe(unfenced)} and {program.describe(access)}")
        if not writes and not written:
            raise EmulationError(f"{program.describe(access)}, where nothing was written")
        if writes:
            self.regions = {r: region for r, region in self.regions.items() if not where.holds(r)}
        mine = self.regions.setdefault(where, Region(where))
        if writes:
            mine.write = access
        else:
            mine.reads |= access
        return access


class BarrierArray:
    """Barriers in shared memory, `[number, 1]`."""

    def __init__(self, program: Program, name: str, number: int) -> None:
        self.barriers = [Barrier(program, f"{name}[{i}]") for i in range(number)]

    def index(self, i: Any) -> Barrier:
        if not 0 <= int(i) < len(self.barriers):
            raise EmulationError(f"{where_in_kernel()}: barrier {i} of {len(self.barriers)}")
        return self.barriers[int(i)]


class Program:
    """One program of a launch."""

    def __init__(
        self, place: tuple[int, ...], grid: tuple[int, ...], number: int, warps: int, schedule: Schedule
    ) -> None:
        self.place, self.grid, self.number, self.schedule = place, grid, number, schedule
        self.agent = Agent(0, "program", warps, 0)
        self.agents = [self.agent]
        self.specialized = False
        self.pending: list[Operation] = []
        self.barriers: list[BarrierArray] = []
        self.accesses: list[tuple[str, str, str]] = []
        self.by_threads = self.by_engines = 0
        self.shared_bytes = 0
        self.error: BaseException | None = None

    def writer(self) -> int:
        return 1 + self.number * 16 + self.agent.number

    # What happened before what.

    def new_access(self, what: str, by_threads: bool) -> int:
        access = 1 << 2 * len(self.accesses)
        self.accesses.append((self.agent.name, what, where_in_kernel()))
        if by_threads:
            self.by_threads |= access
        return access

    def describe(self, accesses: int) -> str:
        agent, what, place = self.accesses[((accesses & -accesses).bit_length() - 1) // 2]
        return f"{agent} {what} at {place}"

    # Who goes on.

    def synchronise(self) -> None:
        """Let pending operations complete and other partitions run."""
        for operation in [x for x in self.pending if self.schedule.completes(x)]:
            self.complete(operation)
        if len(self.agents) > 1:
            self.hand_over()

    def hand_over(self) -> None:
        """Return when the running partition may go on, after others perhaps; at once if it has ended."""
        me = self.agent
        while not (ready := [agent for agent in self.agents if agent.ready()]):
            if not self.pending:
                waiting = [f"{a.name} waits for {a.waits[0]}, parity {a.waits[1]}" for a in self.agents if a.waits]
                raise EmulationError("deadlock: " + "; ".join(waiting))
            self.complete(self.schedule.choose_operation(self.pending))
        chosen = self.schedule.choose(ready)
        if chosen is not me:
            self.agent = chosen
            chosen.turn.release()
            if not me.done:
                me.turn.acquire()
        if self.error is not None and me.number:
            raise Stop

    def complete(self, operation: Operation) -> None:
        if operation.done:
            return
        operation.done = True
        for other in operation.after:
            self.complete(other)
        self.pending.remove(operation)
        operation.run()

    def issue(self, run: Callable[[], object], access: int, after: Sequence[Operation] = ()) -> Operation:
        operation = Operation(run, access, after, self.schedule.straggles())
        self.by_engines |= access
        self.pending.append(operation)
        self.synchronise()
        return operation

    def finish(self, operations: list[Operation], left: int) -> None:
        """Wait for all but the last `left` of this partition's operations."""
        num_done = max(len(operations) - left, 0)
        for operation in operations[:num_done]:
            self.complete(operation)
            self.agent.known |= operation.access
        del operations[:num_done]

    # Partitions.

    def specialize(self, work: Sequence[tuple[Callable, Sequence[Any]]], warps: Sequence[int]) -> None:
        parent = self.agent
        if parent.number:
            raise EmulationError(f"{where_in_kernel()}: a partition starts partitions")
        self.specialized = True
        names = [function.__name__ for function, _ in work]
        for number, name in enumerate(names, 1):
            name = f"{name} ({number})" if names.count(name) > 1 else name
            self.agents.append(Agent(number, name, warps[number - 1], parent.known))
        parent.joins = self.agents[1:]
        threads = [
            threading.Thread(target=self.run_partition, args=(agent, *job), daemon=True)
            for agent, job in zip(parent.joins, work, strict=True)
        ]
        for thread in threads:
            thread.start()
        try:
            self.hand_over()
        finally:
            error = self.error
            self.error = error or Stop()
            for agent, thread in zip(parent.joins, threads, strict=True):
                if not agent.done:
                    agent.turn.release()
                thread.join()
        if error is not None:
            raise error
        self.error = None
        for agent in parent.joins:
            parent.known |= agent.known
        self.agents, parent.joins = [parent], []

    def run_partition(self, agent: Agent, function: Callable, arguments: Sequence[Any]) -> None:
        agent.turn.acquire()
        try:
            if self.error is not None:
                return
            function(*arguments)
            agent.done = True
            self.hand_over()
        except Stop:
            pass
        except BaseException as error:  # noqa: BLE001  (it is raised again by the thread that joins this one)
            self.error = error
            agent.done = True
            self.agent = self.agents[0]
            self.agent.turn.release()

    def check_end(self) -> None:
        lost = self.by_engines & ~self.agent.known
        if lost:
            raise EmulationError(f"the program ends before it knows that {self.describe(lost)}")
        for barrier in itertools.chain.from_iterable(array.barriers for array in self.barriers):
            if barrier.count == 0 or barrier.pending != barrier.count or barrier.bytes:
                raise EmulationError(f"the program ends within a phase of {barrier}")
            # Partitions keep what they are given; else the compiler reuses the place of a barrier after its last use.
            if barrier.valid and not self.specialized:
                raise EmulationError(f"the program ends without invalidating {barrier}")
