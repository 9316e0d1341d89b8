"""What Gluon kernels for Hopper call, in the emulator: shared memory, barriers, TMA, gathers, products, `gl` and `tl`.

Layouts are ignored; compiling ahead of time checks those. What is not here stops with "is not emulated".
"""

from __future__ import annotations

import ast
import functools
import sys
import types
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch
import triton.language as tl
from triton.experimental.gluon import language as gl
from triton.experimental.gluon.language.nvidia import ampere, hopper

from gluon_emulator.machine import Barrier, BarrierArray, Buffer, Program, Range
from gluon_emulator.values import (
    POISON,
    Anything,
    EmulationError,
    Language,
    Memory,
    Pointer,
    Scalar,
    Tensor,
    raw,
    where_in_kernel,
)

SHARED_BYTES = 227 * 1024
BARRIER_LAYOUT = Anything()

_running: list[Any] = []  # the program that runs, and its kernel's code


def running() -> Program:
    return _running[0]


@contextmanager
def run_in(program: Program, code: types.CodeType) -> Iterator[None]:
    """Within it, what kernels call belongs to this program of a kernel with this code."""
    _running[:] = [program, code]
    try:
        yield
    finally:
        _running.clear()


def name_of_allocation() -> str:
    """What the kernel and the functions that it called name what is allocated, as in `k_pipe.full`."""
    names, frame = [], sys._getframe(1)
    while frame is not None:
        if frame.f_globals.get("__emulated__"):
            names.append(name_of_result(frame.f_code.co_filename, frame.f_lineno, frame.f_code is _running[1]))
        if frame.f_code is _running[1]:
            break
        frame = frame.f_back
    return ".".join(name for name in reversed(names) if name) or where_in_kernel(_running[1])


@functools.cache
def name_of_result(file: str, line: int, in_kernel: bool) -> str:
    """The variable that a line assigns to; none in a function that returns it, since its caller has a name for it."""
    inside = [x for x in statements(file) if x.lineno <= line <= (x.end_lineno or 0)]
    statement = inside[-1]
    if not isinstance(statement, ast.Assign) or not isinstance(statement.targets[0], ast.Name):
        return ""
    name = statement.targets[0].id
    function = next(x for x in reversed(inside) if isinstance(x, ast.FunctionDef))
    returns = [x.value for x in ast.walk(function) if isinstance(x, ast.Return)]
    returned = any(isinstance(x, ast.Name) and x.id == name for x in returns)
    return "" if returned and not in_kernel else name


@functools.cache
def statements(file: str) -> list[ast.stmt]:
    """All of a file, the outer before the inner."""
    return [x for x in ast.walk(ast.parse(Path(file).read_text())) if isinstance(x, ast.stmt)]


class SharedMemory:
    """A view of a buffer."""

    def __init__(self, buffer: Buffer, data: torch.Tensor, where: Range) -> None:
        self.buffer, self.data, self.where = buffer, data, where

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
        start = self.where.start + i * part.numel()
        return SharedMemory(self.buffer, part, Range(start, start + part.numel()))

    def reshape(self, shape: Sequence[int]) -> SharedMemory:
        return SharedMemory(self.buffer, self.data.view([int(n) for n in shape]), self.where)

    def permute(self, order: Sequence[int]) -> SharedMemory:
        return SharedMemory(self.buffer, self.data.permute(tuple(order)), self.where)

    def access(self, writes: bool, by_threads: bool) -> int:
        return self.buffer.access(self.where, writes, by_threads)

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


class Product:
    """The result of an asynchronous product, to be had from `warpgroup_mma_wait`."""

    def __init__(self, shape: list[int], dtype: torch.dtype) -> None:
        self.size, self.number_type, self.data, self.operation = shape, dtype, None, None

    def __getattr__(self, name: str) -> Any:
        raise EmulationError(f"{where_in_kernel()}: '{name}' of a product that was not waited for")


def _refuse(self: Product, *_others: Any) -> Any:
    raise EmulationError(f"{where_in_kernel()}: arithmetic with a product that was not waited for")


for _name in ("add", "radd", "sub", "rsub", "mul", "rmul", "truediv", "rtruediv", "getitem", "len", "lt", "gt", "neg"):
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
    """All accesses by threads that this partition knows of come before what engines do next."""
    program = running()
    program.agent.known |= (program.agent.known & program.by_threads) << 1
    program.synchronise()


class MBarrier:
    """`gl...hopper.mbarrier`."""

    @staticmethod
    def MBarrierLayout() -> Anything:
        return BARRIER_LAYOUT

    @staticmethod
    def init(barrier: Barrier, count: int) -> None:
        barrier.init(int(count))

    @staticmethod
    def invalidate(barrier: Barrier) -> None:
        running().synchronise()
        barrier.invalidate(running().agent.known)

    @staticmethod
    def expect(barrier: Barrier, num_bytes: Any, pred: Any = True) -> None:
        """One thread arrives, without a word for what others of its partition wrote."""
        program = running()
        program.synchronise()
        if pred:
            barrier.check(program.agent.known)
            barrier.expect(int(num_bytes))
            barrier.arrive(1, barrier.made)

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
    def store_wait(pending: int) -> None:
        program = running()
        program.synchronise()
        program.finish(program.agent.stores, int(pending))


class AsyncCopy:
    """`gl...ampere.async_copy`: each thread copies; to others its writes are those of a thread."""

    @staticmethod
    def async_copy_global_to_shared(smem: SharedMemory, pointer: Pointer, mask: Any = None, **_hints: Any) -> None:
        program = running()
        if smem.shape != pointer.shape or smem.dtype != pointer.memory.dtype:
            raise EmulationError(f"{where_in_kernel()}: {pointer.shape} into {smem.shape}")
        access = smem.access(writes=True, by_threads=True)
        smem.data.fill_(float("nan") if smem.dtype.is_floating_point else POISON)
        values = pointer.memory.load(pointer.offset, mask, 0, program.writer())
        program.agent.copies.append(program.issue(lambda: smem.data.copy_(values), access))

    @staticmethod
    def mbarrier_arrive(barrier: Barrier, increment_count: bool = True) -> None:
        """Every thread arrives when its copies are done; its arrival stands for them alone, not for other writes."""
        program, agent = running(), running().agent
        barrier.check(agent.known)
        if increment_count:
            raise EmulationError(f"{where_in_kernel()}: increment_count=True is not emulated")
        copies, agent.copies = agent.copies, []
        known = barrier.made
        for copy in copies:
            known |= copy.access
        program.issue(lambda: barrier.arrive(32 * agent.num_warps, known), 0, after=copies)

    @staticmethod
    def commit_group() -> None:
        agent = running().agent
        agent.groups.append(agent.copies)
        agent.copies = []

    @staticmethod
    def wait_group(num_outstanding: int = 0) -> None:
        program, groups = running(), running().agent.groups
        program.synchronise()
        while len(groups) > num_outstanding:
            program.finish(groups.pop(0), 0)


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
        return SharedMemory(buffer, buffer.data, Range(0, buffer.data.numel()))

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
