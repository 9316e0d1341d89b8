"""What Hopper does asynchronously: barriers, TMA, gathers and products."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch

from gluon_emulator.machine import Barrier, Operation
from gluon_emulator.memory import Pointer
from gluon_emulator.places import EmulationError, where_in_kernel
from gluon_emulator.running import running
from gluon_emulator.shared_memory import Descriptor, SharedMemory
from gluon_emulator.values import POISON, Anything, Tensor

BARRIER_LAYOUT = Anything()


class Product:
    """The result of an asynchronous product, to be had from `warpgroup_mma_wait`; `data` once it is there."""

    data: torch.Tensor
    operation: Operation

    def __init__(self, shape: list[int], dtype: torch.dtype) -> None:
        self.size, self.number_type = shape, dtype

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
