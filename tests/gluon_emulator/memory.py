"""Global memory: the tensors that a kernel was given, who wrote them, and pointers to them.

Lanes of a load that are masked off hold NaN or a large number.
"""

from __future__ import annotations

import math
from typing import Any

import torch

from gluon_emulator.places import EmulationError, where_in_kernel
from gluon_emulator.values import POISON, raw


class PointerType:
    def __init__(self, element_ty: torch.dtype) -> None:
        self.element_ty = element_ty


class Memory:
    """The elements of a tensor that a kernel was given, and who wrote them in this launch.

    A launch's programs and their partitions run in no order: none may write what another wrote, or read it.
    """

    def __init__(self, tensor: torch.Tensor, writers: dict[int, torch.Tensor]) -> None:
        extent = 1 + sum((n - 1) * s for n, s in zip(tensor.shape, tensor.stride(), strict=True))
        self.start = tensor.storage_offset()
        self.flat = tensor.as_strided((extent if tensor.numel() else 0,), (1,), self.start)
        self.dtype, self.size = tensor.dtype, self.flat.numel()
        self.storage = tensor.untyped_storage()
        self.writers = writers

    def known_writers(self) -> torch.Tensor | None:
        """For each element of the storage 0 or who wrote it; None while nobody did."""
        return self.writers.get(self.storage.data_ptr())

    def writers_to_be(self) -> torch.Tensor:
        """The same, to be written to."""
        key = self.storage.data_ptr()
        if key not in self.writers:
            self.writers[key] = torch.zeros(self.storage.nbytes() // self.flat.element_size(), dtype=torch.int32)
        return self.writers[key]

    def check_writers(self, chosen: torch.Tensor, me: int, what: str) -> None:
        if bool(((chosen != 0) & (chosen != me)).any()):
            raise EmulationError(f"{where_in_kernel()}: {what} what another program or partition writes")

    def indices(self, offset: Any, mask: Any) -> torch.Tensor:
        """Checked offsets of the live lanes; those of other lanes are 0."""
        index = torch.as_tensor(offset)
        if mask is not None:
            index = torch.where(torch.as_tensor(raw(mask)), index, 0)
        if index.numel():
            low, high = (int(x) for x in index.aminmax())
            alive = mask is None or bool(torch.as_tensor(raw(mask)).any())
            if alive and not 0 <= low <= high < self.size:
                raise EmulationError(f"{where_in_kernel()}: elements {low} to {high} of {self.size}")
        return index

    def load(self, offset: Any, mask: Any, other: Any, me: int) -> torch.Tensor:
        index = self.indices(offset, mask)
        live = None if mask is None else torch.as_tensor(raw(mask)).broadcast_to(index.shape)
        if self.size == 0:
            values = torch.zeros(index.shape, dtype=self.dtype)
        else:
            values = self.flat[index]
        written = self.known_writers()
        if written is not None:
            chosen = written[index + self.start]
            self.check_writers(chosen if live is None else chosen[live], me, "reads")
        if live is None:
            return values
        if other is None:
            other = math.nan if self.dtype.is_floating_point else POISON
        return torch.where(live, values, torch.as_tensor(raw(other)).to(self.dtype))

    def store(self, offset: Any, values: Any, mask: Any, me: int, shared: bool = False) -> None:
        """Write live lanes; `shared` elements (of atomics) may be written by all."""
        index = self.indices(offset, mask)
        shape = torch.broadcast_shapes(index.shape, torch.as_tensor(raw(values)).shape)
        index = index.broadcast_to(shape)
        values = torch.as_tensor(raw(values)).to(self.dtype).broadcast_to(shape)
        if mask is not None:
            live = torch.as_tensor(raw(mask)).broadcast_to(shape)
            index, values = index[live], values[live]
        if index.numel() == 0:
            return
        written = self.writers_to_be()
        if not shared:
            place = index + self.start
            self.check_writers(written[place], me, "writes")
            written[place] = me
        self.flat[index] = values


class Pointer:
    """One address or a block of them."""

    def __init__(self, memory: Memory, offset: Any = 0) -> None:
        self.memory, self.offset = memory, offset

    @property
    def dtype(self) -> PointerType:
        return PointerType(self.memory.dtype)

    @property
    def shape(self) -> list[int]:
        return list(self.offset.shape) if isinstance(self.offset, torch.Tensor) else []

    def __add__(self, by: Any) -> Pointer:
        by = raw(by)
        return Pointer(self.memory, self.offset + (by.long() if isinstance(by, torch.Tensor) else by))

    __radd__ = __add__

    def __sub__(self, by: Any) -> Pointer:
        return self + -by

    def __getitem__(self, index: Any) -> Pointer:
        return Pointer(self.memory, torch.as_tensor(self.offset)[index])
