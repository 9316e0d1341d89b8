"""Scalars and tensors of an emulated kernel.

Integers behave as on the device: `//` and `%` truncate, and what does not fit its type is an error.
"""

from __future__ import annotations

import operator
import struct
from collections.abc import Callable, Iterator, Sequence
from typing import Any

import torch

from gluon_emulator.places import EmulationError, where_in_kernel

INT_LIMITS = {torch.int8: 2**7, torch.int16: 2**15, torch.int32: 2**31, torch.int64: 2**63}
COMPARISONS = {"<", "<=", ">", ">=", "==", "!="}
POISON = 123456789  # in lanes of integers that were not loaded


def truncating_quotient(a: int, b: int) -> int:
    quotient = abs(a) // abs(b)
    return quotient if (a < 0) == (b < 0) else -quotient


PYTHON_OPERATORS: dict[str, Callable] = {
    "+": operator.add, "-": operator.sub, "*": operator.mul, "/": operator.truediv, "//": truncating_quotient,
    "%": lambda a, b: a - b * truncating_quotient(a, b), "&": operator.and_, "|": operator.or_, "^": operator.xor,
    "<<": operator.lshift, ">>": operator.rshift, "<": operator.lt, "<=": operator.le, ">": operator.gt,
    ">=": operator.ge, "==": operator.eq, "!=": operator.ne, "min": min, "max": max,
}  # fmt: skip
TORCH_OPERATORS: dict[str, Callable] = {
    **PYTHON_OPERATORS, "//": lambda a, b: torch.div(a, b, rounding_mode="trunc"), "%": torch.fmod,
    "min": lambda a, b: torch.minimum(*_both_tensors(a, b)), "max": lambda a, b: torch.maximum(*_both_tensors(a, b)),
}  # fmt: skip


def _both_tensors(a: Any, b: Any) -> tuple[torch.Tensor, torch.Tensor]:
    if not isinstance(a, torch.Tensor):
        return torch.tensor(a, dtype=b.dtype), b
    return a, b if isinstance(b, torch.Tensor) else torch.tensor(b, dtype=a.dtype)


def common_dtype(a: Any, b: Any) -> torch.dtype:
    """The type of a result; literals take the other operand's type where they can."""
    if isinstance(a, Value) and isinstance(b, Value):
        return a.dtype if a.dtype == b.dtype else torch.promote_types(a.dtype, b.dtype)
    value, literal = (a, b) if isinstance(a, Value) else (b, a)
    if isinstance(literal, float):
        return value.dtype if value.dtype.is_floating_point else torch.float32
    if isinstance(literal, bool) or value.dtype != torch.bool:
        return value.dtype
    return torch.int32


def check_range(low: int, high: int, dtype: torch.dtype) -> None:
    limit = INT_LIMITS.get(dtype)
    if limit is not None and not -limit <= low <= high < limit:
        raise EmulationError(f"{where_in_kernel()}: {low} to {high} does not fit {dtype}")


def operate(symbol: str, a: Any, b: Any) -> Any:
    """`a symbol b` where at least one is a Value."""
    if not all(isinstance(x, (Value, int, float)) for x in (a, b)):
        return NotImplemented
    dtype = common_dtype(a, b)
    if symbol == "/" and not dtype.is_floating_point:
        dtype = torch.float32
    if isinstance(a, Tensor) or isinstance(b, Tensor):
        return _operate_on_tensors(symbol, a, b, dtype)
    result = PYTHON_OPERATORS[symbol](raw(a), raw(b))
    return Scalar(result, torch.bool if symbol in COMPARISONS else dtype)


def _operate_on_tensors(symbol: str, a: Any, b: Any, dtype: torch.dtype) -> Tensor:
    narrow = dtype in INT_LIMITS and dtype != torch.int64 and symbol in "+-*"
    wide = torch.int64 if narrow else dtype
    x, y = (v.data.to(wide) if isinstance(v, Tensor) else raw(v) for v in (a, b))
    result = TORCH_OPERATORS[symbol](x, y)
    if narrow and result.numel():
        low, high = result.aminmax()
        check_range(int(low), int(high), dtype)
        result = result.to(dtype)
    return Tensor(result)


def raw(x: Any) -> Any:
    """The number, torch tensor or list behind an emulated value."""
    if isinstance(x, Scalar):
        return x.value
    return x.data if isinstance(x, Tensor) else x


class Value:
    """A scalar or a tensor."""

    __hash__ = None  # pyright: ignore[reportAssignmentType]

    @property
    def dtype(self) -> torch.dtype:
        raise NotImplementedError

    def __neg__(self) -> Any:
        return operate("-", 0, self)


def _add_operators() -> None:
    names = {
        "+": "add", "-": "sub", "*": "mul", "/": "truediv", "//": "floordiv", "%": "mod", "&": "and", "|": "or",
        "^": "xor", "<<": "lshift", ">>": "rshift", "<": "lt", "<=": "le", ">": "gt", ">=": "ge", "==": "eq",
        "!=": "ne",
    }  # fmt: skip
    for symbol, name in names.items():
        setattr(Value, f"__{name}__", lambda self, other, symbol=symbol: operate(symbol, self, other))
        if symbol not in COMPARISONS:
            setattr(Value, f"__r{name}__", lambda self, other, symbol=symbol: operate(symbol, other, self))


_add_operators()


class Scalar(Value):
    """One number of the device."""

    __slots__ = ("number_type", "value")

    def __init__(self, value: Any, dtype: torch.dtype) -> None:
        if dtype == torch.float32:
            value = struct.unpack("f", struct.pack("f", value))[0]
        elif dtype in INT_LIMITS:
            check_range(value, value, dtype)
        self.value, self.number_type = value, dtype

    @property
    def dtype(self) -> torch.dtype:
        return self.number_type

    def to(self, dtype: torch.dtype) -> Scalar:
        return Scalar(float(self.value) if dtype.is_floating_point else int(self.value), dtype)

    def __bool__(self) -> bool:
        return bool(self.value)

    def __index__(self) -> int:
        return operator.index(self.value)

    def __repr__(self) -> str:
        return f"{self.value}"


class Tensor(Value):
    """A block of numbers in registers."""

    __slots__ = ("data",)

    def __init__(self, data: torch.Tensor) -> None:
        self.data = data

    @property
    def dtype(self) -> torch.dtype:
        return self.data.dtype

    @property
    def shape(self) -> list[int]:
        return list(self.data.shape)

    def to(self, dtype: torch.dtype, bitcast: bool = False) -> Tensor:
        if bitcast:
            return Tensor(self.data.view(dtype))
        if dtype in INT_LIMITS and self.data.numel():
            low, high = self.data.aminmax()
            check_range(int(low), int(high), dtype)
        return Tensor(self.data.to(dtype))

    @property
    def type(self) -> Anything:
        """Of which only the layout is asked for."""
        return Anything()

    def reshape(self, shape: Sequence[int]) -> Tensor:
        return Tensor(self.data.reshape([int(n) for n in shape]))

    def __getitem__(self, index: Any) -> Tensor:
        return Tensor(self.data[index])

    def __invert__(self) -> Tensor:
        return Tensor(~self.data)

    def __bool__(self) -> bool:
        raise EmulationError(f"{where_in_kernel()}: a tensor is no condition")


class Constant(int):
    """An argument of 1, of which Triton makes a constant unless it is told not to specialise it."""


class Anything:
    """A layout: may be made, and means nothing."""

    def __call__(self, *_args: Any, **_options: Any) -> Anything:
        return self

    def __getattr__(self, _name: str) -> Anything:
        return self


def emulated_range(*bounds: Any, **_options: Any) -> Iterator[Scalar]:
    for i in range(*(int(x) for x in bounds)):
        yield Scalar(i, torch.int32)


def wrap(data: torch.Tensor) -> Value:
    return Tensor(data) if data.dim() else Scalar(data.item(), data.dtype)
