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
        dense_forward_sm90(q, k, v, out, lse, ...)  # on CPU tensors
"""

from __future__ import annotations

import itertools
import types
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from typing import Any

import torch
import triton.language as tl
from triton.runtime.jit import JITCallable, JITFunction

from gluon_emulator.aggregates import Aggregate, add_methods, emulated_aggregate
from gluon_emulator.language import REPLACEMENTS
from gluon_emulator.machine import Program, Schedule
from gluon_emulator.memory import Memory, Pointer
from gluon_emulator.places import EmulationError
from gluon_emulator.running import run_in
from gluon_emulator.shared_memory import Descriptor
from gluon_emulator.values import Constant, Scalar, emulated_range


class Emulator:
    """Launches kernels as their wrappers ask, one program after another in a random order."""

    def __init__(self, schedule: Schedule) -> None:
        self.schedule = schedule
        self.functions: dict[JITCallable, Callable] = {}
        self.aggregates: dict[type, type[Aggregate]] = {}
        self.launched: set[str] = set()

    def replace(self, value: Any) -> Any:
        """What a name of a kernel's module stands for in its emulation."""
        if isinstance(value, JITCallable):
            return self.function(value)
        if getattr(value, "__triton_aggregate__", False) and isinstance(value, type):
            return self.aggregate(value)
        if isinstance(value, tl.constexpr):
            return value.value
        return next((new for old, new in REPLACEMENTS if value is old), value)

    def function(self, kernel: JITCallable) -> Callable:
        """The Python function of a kernel, or of what it calls, with all that it uses replaced."""
        if kernel not in self.functions:
            names: dict[str, Any] = {"range": emulated_range, "__emulated__": True}
            copy = types.FunctionType(kernel.fn.__code__, names, kernel.fn.__name__, kernel.fn.__defaults__)
            self.functions[kernel] = copy
            used = _names_used(kernel.fn.__code__)
            names.update({k: self.replace(v) for k, v in kernel.fn.__globals__.items() if k in used})
        return self.functions[kernel]

    def aggregate(self, aggregate: type) -> type[Aggregate]:
        if aggregate not in self.aggregates:
            self.aggregates[aggregate] = emulated_aggregate(aggregate)
            add_methods(self.aggregates[aggregate], self.function)
        return self.aggregates[aggregate]

    def launch(self, kernel: JITFunction, arguments: Sequence[Any], grid: Any, options: dict[str, Any]) -> None:
        self.launched.add(kernel.__name__)
        names = [parameter.name for parameter in kernel.params]
        values = dict(zip(names, arguments, strict=False))
        values |= {name: options[name] for name in names if name in options}
        asked: Any = grid(values) if callable(grid) else grid
        sizes = (*asked, 1, 1)[:3]
        function, writers = self.function(kernel), {}
        places = list(itertools.product(*(range(n) for n in sizes)))
        self.schedule.random.shuffle(places)
        emulated = {
            parameter.name: _argument(values[parameter.name], parameter, writers)
            for parameter in kernel.params
            if parameter.name in values
        }
        for number, place in enumerate(places):
            self.schedule.start_program()
            program = Program(place, sizes, number, options.get("num_warps", 4), self.schedule)
            try:
                with run_in(program, kernel.fn.__code__):
                    function(**emulated)
                    program.check_end()
            except EmulationError as error:
                raise EmulationError(f"{kernel.__name__}, program {place}: {error}") from error


def _names_used(code: types.CodeType) -> set[str]:
    nested = [_names_used(c) for c in code.co_consts if isinstance(c, types.CodeType)]
    return set(code.co_names).union(*nested)


def _argument(value: Any, parameter: Any, writers: dict[int, torch.Tensor]) -> Any:
    """A kernel's argument as the device has it."""
    if parameter.is_constexpr:
        return getattr(value, "value", value)
    if isinstance(value, torch.Tensor):
        return Pointer(Memory(value, writers))
    if hasattr(value, "block_shape"):
        return Descriptor(value, writers)
    if isinstance(value, bool):
        return Scalar(value, torch.bool)
    if isinstance(value, int):
        if value == 1 and not parameter.do_not_specialize:
            return Constant(1)
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
