"""`tl` and `gl` in the emulator, and what else takes the place of Triton's names.

Layouts are ignored; compiling ahead of time checks those. What is not here stops with "is not emulated".
"""

from __future__ import annotations

import builtins
from collections.abc import Callable, Iterable, Sequence
from typing import Any

import torch
import triton.language as tl
from triton.experimental.gluon import language as gl
from triton.experimental.gluon.language.nvidia import ampere, hopper

from gluon_emulator.hopper import (
    BARRIER_LAYOUT,
    AsyncCopy,
    MBarrier,
    Tma,
    fence_async_shared,
    warpgroup_mma,
    warpgroup_mma_wait,
)
from gluon_emulator.machine import BarrierArray, Buffer, Range
from gluon_emulator.memory import Pointer
from gluon_emulator.places import EmulationError, where_in_kernel
from gluon_emulator.running import name_of_allocation, running
from gluon_emulator.shared_memory import SharedMemory
from gluon_emulator.values import Anything, Scalar, Tensor, Value, common_dtype, emulated_range, operate, raw, wrap

SHARED_BYTES = 227 * 1024


def _elementwise(function: Callable[[torch.Tensor], torch.Tensor]) -> Callable[[Any], Any]:
    def apply(x: Any) -> Any:
        if isinstance(x, Tensor):
            return Tensor(function(x.data))
        return wrap(function(torch.tensor(raw(x), dtype=torch.float32)))

    return staticmethod(apply)


class Language:
    """`tl` and `gl`."""

    constexpr = staticmethod(lambda x: x)
    int1, int8, int16, int32, int64 = torch.bool, torch.int8, torch.int16, torch.int32, torch.int64
    uint32 = torch.int64  # wide enough; what is negative there becomes no place in memory here
    float16, bfloat16, float32, float64 = torch.float16, torch.bfloat16, torch.float32, torch.float64
    range = staticmethod(emulated_range)
    BlockedLayout = DistributedLinearLayout = SliceLayout = DotOperandLayout = NVMMADistributedLayout = (
        NVMMASharedLayout
    ) = SwizzledSharedLayout = Anything()
    exp, exp2, log, log2 = (_elementwise(f) for f in (torch.exp, torch.exp2, torch.log, torch.log2))
    sqrt, abs = _elementwise(torch.sqrt), _elementwise(torch.abs)

    def __getattr__(self, name: str) -> Any:
        raise EmulationError(f"{where_in_kernel()}: '{name}' is not emulated")

    @property
    def math(self) -> Language:
        return self

    @staticmethod
    def static_range(*bounds: Any) -> Iterable[int]:
        return builtins.range(*(int(x) for x in bounds))

    @staticmethod
    def arange(start: int, end: int, layout: Any = None) -> Tensor:
        if (end - start) & (end - start - 1):
            raise EmulationError(f"{where_in_kernel()}: {end - start} is no power of two")
        return Tensor(torch.arange(start, end, dtype=torch.int32))

    @staticmethod
    def full(shape: Sequence[int], value: Any, dtype: torch.dtype, layout: Any = None) -> Tensor:
        return Tensor(torch.full([int(n) for n in shape], raw(value), dtype=dtype))

    @staticmethod
    def zeros(shape: Sequence[int], dtype: torch.dtype, layout: Any = None) -> Tensor:
        return Language.full(shape, 0, dtype)

    @staticmethod
    def convert_layout(x: Any, layout: Any, assert_trivial: bool = False) -> Any:
        return x

    @staticmethod
    def minimum(a: Any, b: Any) -> Any:
        return operate("min", a, b) if isinstance(a, Value) or isinstance(b, Value) else min(a, b)

    @staticmethod
    def maximum(a: Any, b: Any) -> Any:
        return operate("max", a, b) if isinstance(a, Value) or isinstance(b, Value) else max(a, b)

    @staticmethod
    def cdiv(a: Any, b: Any) -> Any:
        return (a + (b - 1)) // b

    @staticmethod
    def where(condition: Any, a: Any, b: Any) -> Any:
        if not any(isinstance(x, Tensor) for x in (condition, a, b)):
            chosen = a if condition else b
            if not isinstance(a, Value) and not isinstance(b, Value):
                return Scalar(chosen, torch.float32 if isinstance(chosen, float) else torch.int32)
            return Scalar(raw(chosen), common_dtype(a, b))
        if isinstance(a, Value) or isinstance(b, Value):
            dtype = common_dtype(a, b)
        else:
            dtype = torch.float32 if isinstance(a, float) or isinstance(b, float) else torch.int32
        a, b = (torch.as_tensor(raw(x)).to(dtype) for x in (a, b))
        return Tensor(torch.where(torch.as_tensor(raw(condition)), a, b))

    @staticmethod
    def max(x: Tensor, axis: int, keep_dims: bool = False) -> Value:
        return wrap(x.data.amax(axis, keepdim=keep_dims))

    @staticmethod
    def min(x: Tensor, axis: int, keep_dims: bool = False) -> Value:
        return wrap(x.data.amin(axis, keepdim=keep_dims))

    @staticmethod
    def sum(x: Tensor, axis: int) -> Value:
        return wrap(x.data.sum(axis, dtype=torch.int32 if x.dtype == torch.bool else x.dtype))

    @staticmethod
    def cumsum(x: Tensor, axis: int) -> Tensor:
        return Tensor(x.data.cumsum(axis, dtype=x.dtype))

    @staticmethod
    def sort(x: Tensor, descending: bool = False) -> Tensor:
        return Tensor(x.data.sort(-1, descending=descending).values)

    @staticmethod
    def reshape(x: Tensor, *shape: Any) -> Tensor:
        return x.reshape(shape[0] if isinstance(shape[0], (list, tuple)) else shape)

    @staticmethod
    def split(x: Tensor) -> tuple[Tensor, Tensor]:
        first, second = x.data.unbind(-1)
        return Tensor(first), Tensor(second)

    @staticmethod
    def multiple_of(x: Tensor, values: Sequence[int]) -> Tensor:
        return x

    @staticmethod
    def trans(x: Tensor) -> Tensor:
        return Tensor(x.data.mT)

    @staticmethod
    def dot(a: Tensor, b: Tensor, acc: Tensor | None = None, input_precision: str = "") -> Tensor:
        if a.dtype != b.dtype:
            raise EmulationError(f"{where_in_kernel()}: a product of {a.dtype} and {b.dtype}")
        product = a.data.float() @ b.data.float()
        return Tensor(product if acc is None else acc.data + product)

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


LANGUAGE = Language()
REPLACEMENTS = [
    (tl, LANGUAGE), (gl, LANGUAGE), (hopper.mbarrier, MBarrier), (hopper.tma, Tma), (ampere.async_copy, AsyncCopy),
    (hopper.fence_async_shared, fence_async_shared), (hopper.warpgroup_mma, warpgroup_mma),
    (hopper.warpgroup_mma_wait, warpgroup_mma_wait),
    *(
        (function, replacement)
        for module, name, replacement in (
            (hopper.tma, "async_copy_global_to_shared", Tma.async_copy_global_to_shared),
            (hopper.tma, "async_load", Tma.async_copy_global_to_shared),
            (hopper.tma, "async_copy_shared_to_global", Tma.async_copy_shared_to_global),
            (hopper.tma, "async_store", Tma.async_copy_shared_to_global),
            (ampere.async_copy, "async_copy_global_to_shared", AsyncCopy.async_copy_global_to_shared),
            (ampere.async_copy, "async_load", AsyncCopy.async_copy_global_to_shared),
        )
        if (function := getattr(module, name, None)) is not None
    ),
]  # fmt: skip
