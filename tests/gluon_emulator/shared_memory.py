"""Shared memory as kernels see it, and the boxes that TMA copies to and from it."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch

from gluon_emulator.machine import Buffer, Range
from gluon_emulator.memory import Memory
from gluon_emulator.places import EmulationError, where_in_kernel
from gluon_emulator.running import running
from gluon_emulator.values import Anything, Scalar, Tensor


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
        written = self.memory.known_writers()
        if written is not None:
            chosen = written.as_strided(self.sizes, self.strides, self.memory.start)[outer]
            self.memory.check_writers(chosen, me, "reads")
        target.zero_()
        target[inner] = self.memory.flat.as_strided(self.sizes, self.strides, self.memory.start)[outer]

    def write(self, coordinates: Sequence[int], source: torch.Tensor, me: int) -> None:
        outer, inner = self.ranges(coordinates)
        written = self.memory.writers_to_be()
        chosen = written.as_strided(self.sizes, self.strides, self.memory.start)[outer]
        self.memory.check_writers(chosen, me, "writes")
        chosen.fill_(me)
        self.memory.flat.as_strided(self.sizes, self.strides, self.memory.start)[outer] = source[inner]

    def load(self, coordinates: Sequence[Any]) -> Tensor:
        """As plain Triton loads a box."""
        target = torch.empty(self.block_shape, dtype=self.dtype)
        self.read([int(c) for c in coordinates], target, running().writer())
        return Tensor(target)
