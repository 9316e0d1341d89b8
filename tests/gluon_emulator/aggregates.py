"""Triton's aggregates in the emulator: classes with typed fields, which `__init__` sets for good, and jitted methods.

They are made by `triton.language.core._aggregate`. Its methods are given copies: assigning to a field does not compile,
and is an error here.
"""

from __future__ import annotations

import inspect
import types
from collections.abc import Callable
from typing import Any, ClassVar

import triton.language as tl
from triton.experimental.gluon import language as gl
from triton.experimental.gluon.language.nvidia import hopper
from triton.runtime.jit import JITCallable

from gluon_emulator.machine import Barrier, BarrierArray
from gluon_emulator.memory import Pointer
from gluon_emulator.places import EmulationError, where_in_kernel
from gluon_emulator.shared_memory import Descriptor, SharedMemory
from gluon_emulator.values import Constant, Value

KINDS: dict[Any, tuple[type, ...]] = {
    gl.shared_memory_descriptor: (SharedMemory, BarrierArray, Barrier),
    hopper.tma.tensor_descriptor: (Descriptor,),
    tl.tensor: (Value, Pointer, int, float),  # `step = 0` is a tensor on the device and a number here
}


class Aggregate:
    """Base of all emulated aggregates."""

    fields: ClassVar[dict[str, Any]]
    of: ClassVar[Any]
    _sealed = False

    def __setattr__(self, name: str, value: Any) -> None:
        what = f"{where_in_kernel()}: '{name}' of {type(self).__name__}"
        if name not in self.fields:
            raise EmulationError(f"{what} is not among its fields")
        if self._sealed:
            raise EmulationError(f"{what} is set after its making")
        if not is_of_kind(value, self.fields[name]):
            raise EmulationError(f"{what} is declared as {self.fields[name]}, not {type(value).__name__}")
        object.__setattr__(self, name, value)


def is_of_kind(value: Any, declared: Any) -> bool:
    """Whether a field that is declared so can hold an emulated value."""
    if isinstance(declared, types.UnionType):
        return any(is_of_kind(value, one) for one in declared.__args__)
    if declared is tl.constexpr:
        return not isinstance(value, (Value, Pointer, SharedMemory, BarrierArray, Barrier, Descriptor, Aggregate))
    if declared in KINDS:
        return isinstance(value, KINDS[declared]) and not isinstance(value, Constant)
    if getattr(declared, "__triton_aggregate__", False):
        return isinstance(value, Aggregate) and type(value).of is declared
    raise EmulationError(f"a field of {declared} is not emulated (no file with aggregates may postpone annotations)")


def emulated_aggregate(aggregate: Any) -> type[Aggregate]:
    """The class that stands for one of Triton's aggregates, as yet without methods, which may make more of its kind."""
    original = _original(aggregate)
    return type(original.__name__, (Aggregate,), {"fields": original.__annotations__, "of": aggregate})


def add_methods(emulated: type[Aggregate], function: Callable[[JITCallable], Callable]) -> None:
    """Give an emulated aggregate its methods; `function` makes them of jitted and constexpr functions."""
    original = _original(emulated.of)
    for name, member in inspect.getmembers(original, lambda member: isinstance(member, JITCallable)):
        setattr(emulated, name, function(member))
    if not isinstance(original.__init__, JITCallable):
        raise EmulationError(f"{original.__name__} needs an __init__ that is a gluon.constexpr_function")
    initialise = emulated.__init__

    def init(self: Aggregate, *args: Any, **options: Any) -> None:
        initialise(self, *args, **options)
        missing = [name for name in self.fields if not hasattr(self, name)]
        if missing:
            raise EmulationError(f"{where_in_kernel()}: {original.__name__} is made without {', '.join(missing)}")
        object.__setattr__(self, "_sealed", True)

    emulated.__init__ = init


def _original(aggregate: Any) -> type:
    """The class as it is written, which Triton keeps in a closure alone."""
    return inspect.getclosurevars(aggregate.__new__).nonlocals["cls"]
