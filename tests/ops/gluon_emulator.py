"""Run Gluon kernels for Hopper on the CPU, with every freedom that the device takes, and find what is wrong with them.

Triton has no interpreter for Gluon. This one runs a kernel's own Python code, plain Triton kernels too, on torch
tensors. The partitions of a program are threads of which one runs at a time; at each synchronisation a seeded schedule
chooses the next. Copies by TMA, gathers and products are pending until the schedule completes them, at the latest when
nobody else can go on.

Independently of the schedule's luck, each access to shared memory is held against all earlier ones that conflict with
it: the partition must *know* of them, by barriers and waits, and of its threads' writes through a fence if TMA or a
product is next. Further errors: barriers with more arrivals or bytes than expected, a phase that passed a waiting
partition, deadlocks, results read before their wait, accesses out of bounds, what another program or partition writes,
and what is still in flight when a program ends.

    with emulate(seed=3):
        hopper_forward(q, k, v, out, lse, ...)  # on CPU tensors
"""

from __future__ import annotations

import itertools
import linecache
import random
import threading
import types
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from typing import Any

import torch
import triton.language as tl
from triton.experimental.gluon import language as gl
from triton.experimental.gluon.language.nvidia import ampere, hopper
from triton.runtime.jit import JITFunction

from ops.gluon_values import (
    Anything,
    EmulationError,
    Language,
    Memory,
    Pointer,
    Scalar,
    Tensor,
    emulated_range,
    raw,
    where_in_kernel,
)

SHARED_BYTES = 227 * 1024
BARRIER_LAYOUT = Anything()


class Stop(BaseException):
    """Ends the thread of a partition after another one failed."""


class Schedule:
    """Who goes on, and when pending operations complete.

    Args:
        seed: of all choices; also of the two below, anew for each program, where they are not given.
        eagerness: how likely a pending operation completes at a synchronisation; 0 is as late as possible, 1 at once.
        order: numbers of partitions; the first that can goes on. Empty for a random one.
    """

    def __init__(self, seed: int, eagerness: float | None = None, order: Sequence[int] | None = None) -> None:
        self.random = random.Random(seed)
        self.given = (eagerness, order)
        self.start_program()

    def start_program(self) -> None:
        eagerness, order = self.given
        self.eagerness = self.random.choice([0.0, 0.05, 0.3, 1.0]) if eagerness is None else eagerness
        if order is None:
            order = self.random.sample(range(8), 8) if self.random.random() < 0.5 else ()
        self.order = order

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

    def __init__(self, run: Callable[[], None], access: int, after: Sequence[Operation] = ()) -> None:
        self.run, self.access, self.after, self.done = run, access, after, False


class Barrier:
    """One mbarrier: a phase ends when all arrivals and all expected bytes have come."""

    def __init__(self, program: Program, name: str) -> None:
        self.program, self.name = program, name
        self.count = self.pending = self.bytes = self.phase = 0
        self.gathered = self.released = 0  # what those who arrived know, in this phase and up to the last one

    def init(self, count: int) -> None:
        if count < 1:
            raise EmulationError(f"{where_in_kernel()}: a barrier for {count} arrivals")
        self.count = self.pending = count
        self.made = self.program.new_access("init of " + self.name, by_threads=True)
        self.program.agent.known |= self.made

    def check(self, known: int, by_engine: bool = False) -> None:
        if self.count == 0 or not known & self.made:
            raise EmulationError(f"{where_in_kernel()}: {self.name} was not initialised before")
        if by_engine and not known & self.made << 1:
            raise EmulationError(f"{where_in_kernel()}: no fence after the initialisation of {self.name}")

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


class Region:
    """The last write and the reads after it of a range of a buffer."""

    def __init__(self, start: int, end: int) -> None:
        self.start, self.end = start, end
        self.write = self.reads = 0


class Buffer:
    """One allocation of shared memory, with NaN in it."""

    def __init__(self, program: Program, name: str, dtype: torch.dtype, shape: list[int]) -> None:
        self.program, self.name = program, name
        self.data = torch.full(shape, float("nan") if dtype.is_floating_point else 123456789, dtype=dtype)
        self.regions: list[Region] = []

    def access(self, start: int, end: int, writes: bool, by_threads: bool) -> int:
        """Record an access by the running partition; raise if one that conflicts may not have ended."""
        program, known = self.program, self.program.agent.known
        what = f"{'writes' if writes else 'reads'} {self.name}"
        access = program.new_access(what, by_threads and writes)
        mine, written = None, False
        for region in self.regions:
            if region.end <= start or end <= region.start:
                continue
            written |= region.write != 0
            unknown = (region.write | (region.reads if writes else 0)) & ~known
            if unknown:
                raise EmulationError(f"race: {program.describe(access)} while {program.describe(unknown)}")
            if not by_threads and region.write & program.by_threads and not known & region.write << 1:
                raise EmulationError(
                    f"no fence between {program.describe(region.write)} and {program.describe(access)}"
                )
            if (region.start, region.end) == (start, end):
                mine = region
        if not writes and not written:
            raise EmulationError(f"{program.describe(access)}, where nothing was written")
        if mine is None:
            mine = Region(start, end)
            self.regions.append(mine)
        if writes:
            self.regions = [r for r in self.regions if r is mine or r.start < start or r.end > end]
            mine.write, mine.reads = access, 0
        else:
            mine.reads |= access
        return access


class SharedMemory:
    """A view of a buffer; `start` and `end` are the range of its elements."""

    def __init__(self, buffer: Buffer, data: torch.Tensor, start: int, end: int) -> None:
        self.buffer, self.data, self.start, self.end = buffer, data, start, end

    @property
    def dtype(self) -> torch.dtype:
        return self.data.dtype

    @property
    def shape(self) -> list[int]:
        return list(self.data.shape)

    def index(self, i: Any) -> SharedMemory:
        i, size = int(i), self.data.shape[0]
        if not 0 <= i < size or not self.data.is_contiguous():
            raise EmulationError(f"{where_in_kernel()}: index {i} of {size} of {self.buffer.name}")
        part = self.data[i]
        start = self.start + i * part.numel()
        return SharedMemory(self.buffer, part, start, start + part.numel())

    def reshape(self, shape: Sequence[int]) -> SharedMemory:
        return SharedMemory(self.buffer, self.data.view([int(n) for n in shape]), self.start, self.end)

    def permute(self, order: Sequence[int]) -> SharedMemory:
        return SharedMemory(self.buffer, self.data.permute(tuple(order)), self.start, self.end)

    def access(self, writes: bool, by_threads: bool) -> int:
        return self.buffer.access(self.start, self.end, writes, by_threads)

    def load(self, layout: Any) -> Tensor:
        program = self.buffer.program
        program.synchronise()
        program.agent.known |= self.access(writes=False, by_threads=True)
        return Tensor(self.data.clone())

    def store(self, value: Tensor) -> None:
        program = self.buffer.program
        program.synchronise()
        if value.shape != self.shape or value.dtype != self.dtype:
            raise EmulationError(f"{where_in_kernel()}: {value.dtype} {value.shape} into {self.dtype} {self.shape}")
        program.agent.known |= self.access(writes=True, by_threads=True)
        self.data.copy_(value.data)


class BarrierArray:
    """Barriers in shared memory, `[number, 1]`."""

    def __init__(self, program: Program, name: str, number: int) -> None:
        self.barriers = [Barrier(program, f"{name}[{i}]") for i in range(number)]

    def index(self, i: Any) -> Barrier:
        if not 0 <= int(i) < len(self.barriers):
            raise EmulationError(f"{where_in_kernel()}: barrier {i} of {len(self.barriers)}")
        return self.barriers[int(i)]


class Descriptor:
    """A tensor map: boxes of a tensor in global memory."""

    def __init__(self, host: Any, writers: dict[int, torch.Tensor]) -> None:
        self.memory = Memory(host.base.as_strided(host.shape, host.strides), writers)
        self.sizes, self.strides = list(host.shape), list(host.strides)
        self.shape = [Scalar(int(n), torch.int32) for n in host.shape]
        self.block_shape, self.dtype, self.layout = list(host.block_shape), host.base.dtype, Anything()
        if max(self.block_shape) > 256 or self.block_shape[-1] * host.base.element_size() % 16:
            raise EmulationError(f"no box of TMA: {self.block_shape} of {self.dtype}")

    def ranges(self, coordinates: Sequence[int]) -> tuple[tuple[slice, ...], tuple[slice, ...]]:
        """What of a box lies in the tensor: ranges of the tensor and of the box."""
        outer, inner = [], []
        for at, box, size in zip(coordinates, self.block_shape, self.sizes, strict=True):
            low, high = min(max(at, 0), size), max(min(at + box, size), 0)
            high = max(low, high)
            outer.append(slice(low, high))
            inner.append(slice(low - at, high - at) if high > low else slice(0, 0))
        return tuple(outer), tuple(inner)

    def check(self, coordinates: Sequence[Any], shared: SharedMemory) -> list[int]:
        at = [int(c) for c in coordinates]
        if len(at) != len(self.sizes) or shared.shape != self.block_shape or shared.dtype != self.dtype:
            box = f"{self.block_shape} of {self.dtype}"
            raise EmulationError(f"{where_in_kernel()}: a box {box} at {at}, not {shared.shape} of {shared.dtype}")
        if at[-1] * self.memory.flat.element_size() % 16:
            raise EmulationError(f"{where_in_kernel()}: the box at {at} does not begin at 16 bytes")
        return at

    def read(self, coordinates: Sequence[int], target: torch.Tensor, me: int) -> None:
        outer, inner = self.ranges(coordinates)
        written = self.memory.writer_map(make=False)
        if written is not None:
            chosen = written.as_strided(self.sizes, self.strides, self.memory.start)[outer]
            self.memory.check_writers(chosen, me, "reads")
        target.zero_()
        target[inner] = self.memory.flat.as_strided(self.sizes, self.strides, self.memory.start)[outer]

    def write(self, coordinates: Sequence[int], source: torch.Tensor, me: int) -> None:
        outer, inner = self.ranges(coordinates)
        written = self.memory.writer_map(make=True)
        chosen = written.as_strided(self.sizes, self.strides, self.memory.start)[outer]
        self.memory.check_writers(chosen, me, "writes")
        chosen.fill_(me)
        self.memory.flat.as_strided(self.sizes, self.strides, self.memory.start)[outer] = source[inner]

    def load(self, coordinates: Sequence[Any]) -> Tensor:
        """As plain Triton loads a box."""
        target = torch.empty(self.block_shape, dtype=self.dtype)
        self.read([int(c) for c in coordinates], target, running().writer())
        return Tensor(target)


class Program:
    """One program of a launch."""

    def __init__(
        self, place: tuple[int, ...], grid: tuple[int, ...], number: int, warps: int, schedule: Schedule
    ) -> None:
        self.place, self.grid, self.number, self.schedule = place, grid, number, schedule
        self.agent = Agent(0, "program", warps, 0)
        self.agents = [self.agent]
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
        schedule = self.schedule
        if self.pending and schedule.eagerness:
            for operation in list(self.pending):
                if schedule.eagerness == 1 or schedule.random.random() < schedule.eagerness:
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
            self.complete(self.schedule.random.choice(self.pending))
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

    def issue(self, run: Callable[[], None], access: int, after: Sequence[Operation] = ()) -> Operation:
        operation = Operation(run, access, after)
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


_running: list[Any] = []  # the program that runs, and its kernel's code


def running() -> Program:
    return _running[0]


def name_of_allocation() -> str:
    """The variable that the kernel gives what is allocated, as far as its source line tells."""
    place = where_in_kernel(_running[1])
    file, line = _running[1].co_filename, int(place.rpartition(":")[2])
    name = linecache.getline(file, line).partition("=")[0].strip()
    return name if name.isidentifier() else place


class Product:
    """The result of an asynchronous product, to be had from `warpgroup_mma_wait`."""

    def __init__(self, shape: list[int], dtype: torch.dtype) -> None:
        self.size, self.number_type, self.data, self.operation = shape, dtype, None, None

    def __getattr__(self, name: str) -> Any:
        raise EmulationError(f"{where_in_kernel()}: '{name}' of a product that was not waited for")


def _refuse(self: Product, *_others: Any) -> Any:
    raise EmulationError(f"{where_in_kernel()}: arithmetic with a product that was not waited for")


for _name in ("add", "radd", "sub", "rsub", "mul", "rmul", "truediv", "rtruediv", "getitem", "lt", "gt", "neg"):
    setattr(Product, f"__{_name}__", _refuse)


def warpgroup_mma(
    a: Any, b: SharedMemory, acc: Any, *, use_acc: Any = True, is_async: bool = False, precision: Any = None
) -> Any:
    program, agent = running(), running().agent
    wanted = acc.size if isinstance(acc, Product) else acc.shape
    number_type = acc.number_type if isinstance(acc, Product) else acc.dtype
    if a.shape[1] != b.shape[0] or [a.shape[0], b.shape[1]] != wanted or a.dtype != b.dtype:
        raise EmulationError(f"{where_in_kernel()}: product of {a.shape} {a.dtype} and {b.shape} {b.dtype} in {wanted}")
    rows = 16 * agent.num_warps
    if agent.num_warps % 4 or wanted[0] % rows or a.shape[1] % 16 or wanted[1] % 8 or number_type != torch.float32:
        raise EmulationError(f"{where_in_kernel()}: {agent.num_warps} warps make no {wanted} of {number_type}")
    access = b.access(writes=False, by_threads=False)
    if isinstance(a, SharedMemory):
        access |= a.access(writes=False, by_threads=False)
    result = Product(wanted, number_type)

    def run() -> None:
        result.data = a.data.float() @ b.data.float()
        if use_acc:
            result.data += acc.data

    after = agent.products[-1:]  # they run in order
    result.operation = program.issue(run, access, after)
    agent.products.append(result.operation)
    return result if is_async else warpgroup_mma_wait(0, deps=[result])


def warpgroup_mma_wait(num_outstanding: int = 0, deps: Sequence[Any] | None = None) -> Any:
    """Of `deps`, what is done becomes a tensor; what may be in flight stays unreadable."""
    if not deps:
        raise EmulationError(f"{where_in_kernel()}: warpgroup_mma_wait without deps")
    program = running()
    program.synchronise()
    program.finish(program.agent.products, num_outstanding)
    left = program.agent.products
    results = [Tensor(x.data) if isinstance(x, Product) and x.operation not in left else x for x in deps]
    return results[0] if len(results) == 1 else tuple(results)


def fence_async_shared(cluster: bool = False) -> None:
    """All writes by threads that this partition knows of come before what engines do next."""
    program = running()
    program.agent.known |= (program.agent.known & program.by_threads) << 1
    program.synchronise()


class MBarrier:
    """`gl...hopper.mbarrier`."""

    @staticmethod
    def MBarrierLayout() -> Anything:
        return BARRIER_LAYOUT

    @staticmethod
    def allocate_mbarrier(batch: int = 1) -> BarrierArray:
        return GluonLanguage.allocate_shared_memory(torch.int64, [batch, 1], BARRIER_LAYOUT)

    @staticmethod
    def init(barrier: Barrier, count: int) -> None:
        barrier.init(int(count))

    @staticmethod
    def expect(barrier: Barrier, num_bytes: Any, pred: Any = True) -> None:
        running().synchronise()
        if pred:
            barrier.expect(int(num_bytes))
            barrier.arrive(1, running().agent.known)

    @staticmethod
    def arrive(barrier: Barrier, *, count: int = 1, pred: Any = True) -> None:
        running().synchronise()
        if pred:
            barrier.arrive(int(count), running().agent.known)

    @staticmethod
    def wait(barrier: Barrier, phase: Any, pred: Any = True) -> None:
        """Go on once the phase of this parity is over: while the present one has the other."""
        program, agent = running(), running().agent
        if not pred:
            return
        barrier.check(agent.known)
        if int(phase) not in (0, 1):
            raise EmulationError(f"{where_in_kernel()}: parity {phase}")
        over = barrier.phase % 2 != int(phase)
        agent.waits = (barrier, int(phase), barrier.phase - over)
        program.synchronise()
        if len(program.agents) == 1 and not agent.ready():
            program.hand_over()
        agent.waits = None
        agent.known |= barrier.released


class Tma:
    """`gl...hopper.tma`."""

    @staticmethod
    def async_copy_global_to_shared(
        desc: Descriptor, coord: Sequence[Any], barrier: Barrier, result: SharedMemory, pred: Any = True
    ) -> None:
        program = running()
        if not pred:
            return
        at = desc.check(coord, result)
        barrier.check(program.agent.known, by_engine=True)
        access = result.access(writes=True, by_threads=False)
        result.data.fill_(float("nan"))  # parts of it may arrive at any time from now on
        writer, place = program.writer(), where_in_kernel()

        def run() -> None:
            desc.read(at, result.data, writer)
            barrier.complete_bytes(result.data.numel() * result.data.element_size(), access, place)

        program.issue(run, access)

    @staticmethod
    def async_copy_shared_to_global(desc: Descriptor, coord: Sequence[Any], src: SharedMemory) -> None:
        program = running()
        at = desc.check(coord, src)
        access = src.access(writes=False, by_threads=False)
        writer = program.writer()
        program.agent.stores.append(program.issue(lambda: desc.write(at, src.data, writer), access))

    @staticmethod
    def store_wait(pendings: int) -> None:
        program = running()
        program.synchronise()
        program.finish(program.agent.stores, int(pendings))


class AsyncCopy:
    """`gl...ampere.async_copy`: each thread copies; to others its writes are those of a thread."""

    @staticmethod
    def async_copy_global_to_shared(smem: SharedMemory, pointer: Pointer, mask: Any = None, **_hints: Any) -> None:
        program = running()
        if smem.shape != pointer.shape or smem.dtype != pointer.memory.dtype:
            raise EmulationError(f"{where_in_kernel()}: {pointer.shape} into {smem.shape}")
        access = smem.access(writes=True, by_threads=True)
        smem.data.fill_(float("nan"))
        values = pointer.memory.load(pointer.offset, mask, 0, program.writer())
        program.agent.copies.append(program.issue(lambda: smem.data.copy_(values), access))

    @staticmethod
    def mbarrier_arrive(barrier: Barrier, increment_count: bool = True) -> None:
        """Every thread arrives when its copies are done."""
        program, agent = running(), running().agent
        barrier.check(agent.known)
        if increment_count:
            raise EmulationError(f"{where_in_kernel()}: increment_count=True is not emulated")
        copies, agent.copies = agent.copies, []
        known = agent.known
        for copy in copies:
            known |= copy.access
        program.issue(lambda: barrier.arrive(32 * agent.num_warps, known), 0, after=copies)


class GluonLanguage(Language):
    """`tl` and `gl`."""

    @staticmethod
    def program_id(axis: int) -> Scalar:
        return Scalar(running().place[axis], torch.int32)

    @staticmethod
    def num_programs(axis: int) -> Scalar:
        return Scalar(running().grid[axis], torch.int32)

    @staticmethod
    def load(pointer: Any, mask: Any = None, other: Any = None, **_hints: Any) -> Any:
        values = pointer.memory.load(pointer.offset, mask, other, running().writer())
        return Tensor(values) if values.dim() else Scalar(values.item(), values.dtype)

    @staticmethod
    def store(pointer: Pointer, value: Any, mask: Any = None, **_hints: Any) -> None:
        pointer.memory.store(pointer.offset, value, mask, running().writer())

    @staticmethod
    def atomic_add(pointer: Pointer, value: Any, mask: Any = None, sem: str = "") -> None:
        """Without the former value, which nobody asks for."""
        index = torch.as_tensor(pointer.offset).reshape(-1)
        values = torch.as_tensor(raw(value)).to(pointer.memory.dtype).broadcast_to(index.shape)
        live = torch.ones_like(index, dtype=torch.bool) if mask is None else raw(mask).reshape(-1)
        pointer.memory.indices(index[live], None)
        pointer.memory.flat.index_add_(0, index[live], values[live])

    @staticmethod
    def debug_barrier() -> None:
        """All threads of a program are one here."""

    @staticmethod
    def allocate_shared_memory(dtype: torch.dtype, shape: Sequence[int], layout: Any) -> Any:
        program, shape = running(), [int(n) for n in shape]
        name = name_of_allocation()
        if layout is BARRIER_LAYOUT:
            barriers = BarrierArray(program, name, shape[0])
            program.barriers.append(barriers)
            return barriers
        buffer = Buffer(program, name, dtype, shape)
        program.shared_bytes += buffer.data.numel() * buffer.data.element_size()
        if program.shared_bytes > SHARED_BYTES:
            raise EmulationError(f"{where_in_kernel()}: {program.shared_bytes} bytes of shared memory")
        return SharedMemory(buffer, buffer.data, 0, buffer.data.numel())

    @staticmethod
    def warp_specialize(
        functions_and_args: Sequence[tuple[Callable, Sequence[Any]]],
        worker_num_warps: Sequence[int],
        worker_num_regs: Sequence[int] | None = None,
    ) -> None:
        program = running()
        workers = len(functions_and_args) - 1
        if len(worker_num_warps) != workers or (worker_num_regs and len(worker_num_regs) != workers):
            raise EmulationError(f"{where_in_kernel()}: numbers of warps and registers for {workers} partitions")
        program.specialize(functions_and_args, [program.agent.num_warps, *worker_num_warps])


LANGUAGE = GluonLanguage()
REPLACEMENTS = [
    (tl, LANGUAGE), (gl, LANGUAGE), (hopper.mbarrier, MBarrier), (hopper.tma, Tma), (ampere.async_copy, AsyncCopy),
    (hopper.fence_async_shared, fence_async_shared), (hopper.warpgroup_mma, warpgroup_mma),
    (hopper.warpgroup_mma_wait, warpgroup_mma_wait),
]  # fmt: skip


class Emulator:
    """Launches kernels as their wrappers ask, one program after another in a random order."""

    def __init__(self, schedule: Schedule) -> None:
        self.schedule = schedule
        self.functions: dict[JITFunction, Callable] = {}
        self.launched: set[str] = set()

    def replace(self, value: Any) -> Any:
        """What a name of a kernel's module stands for in its emulation."""
        if isinstance(value, JITFunction):
            return self.function(value)
        if isinstance(value, tl.constexpr):
            return value.value
        return next((new for old, new in REPLACEMENTS if value is old), value)

    def function(self, kernel: JITFunction) -> Callable:
        """The Python function of a kernel with all that it uses replaced."""
        if kernel not in self.functions:
            names: dict[str, Any] = {"range": emulated_range, "__emulated__": True}
            copy = types.FunctionType(kernel.fn.__code__, names, kernel.fn.__name__, kernel.fn.__defaults__)
            self.functions[kernel] = copy
            used = _names_used(kernel.fn.__code__)
            names.update({k: self.replace(v) for k, v in kernel.fn.__globals__.items() if k in used})
        return self.functions[kernel]

    def launch(self, kernel: JITFunction, arguments: Sequence[Any], grid: Any, options: dict[str, Any]) -> None:
        self.launched.add(kernel.__name__)
        names = [parameter.name for parameter in kernel.params]
        values = dict(zip(names, arguments, strict=False))
        values |= {name: options[name] for name in names if name in options}
        sizes = tuple(grid(values) if callable(grid) else grid)
        sizes += (1,) * (3 - len(sizes))
        function, writers = self.function(kernel), {}
        places = list(itertools.product(*(range(n) for n in sizes)))
        self.schedule.random.shuffle(places)
        constant = {parameter.name for parameter in kernel.params if parameter.is_constexpr}
        emulated = {
            name: getattr(x, "value", x) if name in constant else _argument(x, writers) for name, x in values.items()
        }
        for number, place in enumerate(places):
            self.schedule.start_program()
            program = Program(place, sizes, number, options.get("num_warps", 4), self.schedule)
            _running[:] = [program, kernel.fn.__code__]
            try:
                function(**emulated)
                program.check_end()
            except EmulationError as error:
                raise EmulationError(f"{kernel.__name__}, program {place}: {error}") from error
            finally:
                _running.clear()


def _names_used(code: types.CodeType) -> set[str]:
    nested = [_names_used(c) for c in code.co_consts if isinstance(c, types.CodeType)]
    return set(code.co_names).union(*nested)


def _argument(value: Any, writers: dict[int, torch.Tensor]) -> Any:
    """A kernel's argument as the device has it."""
    if isinstance(value, torch.Tensor):
        return Pointer(Memory(value, writers))
    if hasattr(value, "block_shape"):
        return Descriptor(value, writers)
    if isinstance(value, bool):
        return Scalar(value, torch.bool)
    if isinstance(value, int):
        return Scalar(value, torch.int32 if -(2**31) <= value < 2**31 else torch.int64)
    return Scalar(value, torch.float32)


@contextmanager
def emulate(seed: int = 0, eagerness: float | None = None, order: Sequence[int] | None = None) -> Iterator[Emulator]:
    """Within it, launches of Triton and Gluon kernels run here, on CPU tensors; see `Schedule` for the arguments."""
    emulator, launch = Emulator(Schedule(seed, eagerness, order)), JITFunction.run

    def run(self: JITFunction, *args: Any, grid: Any, warmup: bool, **options: Any) -> None:
        emulator.launch(self, args, grid, options)

    JITFunction.run = run
    try:
        yield emulator
    finally:
        JITFunction.run = launch
