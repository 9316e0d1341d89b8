"""Scalars, tensors and pointers of an emulated kernel, and the functions of `tl` and `gl` that work on them.

Integers behave as on the device: `//` and `%` truncate, and what does not fit its type is an error. Lanes of a load
that are masked off hold NaN or a large number. Layouts mean nothing here; compiling checks them.
"""

from __future__ import annotations

import math
import operator
import struct
import sys
from collections.abc import Callable, Iterator, Sequence
from typing import Any

import torch

INT_LIMITS = {torch.int8: 2**7, torch.int16: 2**15, torch.int32: 2**31, torch.int64: 2**63}
COMPARISONS = {"<", "<=", ">", ">=", "==", "!="}
POISON = 123456789  # in lanes of integers that were not loaded


class EmulationError(Exception):
    """What would be wrong, or might be, on the device."""


def where_in_kernel(code: Any = None) -> str:
    """File and line of the innermost frame outside the emulator, or of the one that runs `code`."""
    frame = sys._getframe(1)
    while frame.f_back is not None:
        inside = frame.f_globals.get("__emulated__")
        if inside and (code is None or frame.f_code is code):
            break
        frame = frame.f_back
    return f"{frame.f_code.co_filename.rpartition('/')[2]}:{frame.f_lineno}"


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
    """`a symbol b` where at least one is a Value or a Pointer."""
    if isinstance(a, Pointer) or isinstance(b, Pointer):
        pointer, offset = (a, b) if isinstance(a, Pointer) else (b, a)
        if isinstance(offset, Pointer) or symbol not in "+-" or (symbol == "-" and pointer is b):
            raise EmulationError(f"{where_in_kernel()}: '{symbol}' of a pointer is not emulated")
        return pointer.shifted(offset if symbol == "+" else -offset)
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


class Operators:
    """The operators that Values and Pointers share."""

    __hash__ = None


def _add_operators() -> None:
    names = {
        "+": "add", "-": "sub", "*": "mul", "/": "truediv", "//": "floordiv", "%": "mod", "&": "and", "|": "or",
        "^": "xor", "<<": "lshift", ">>": "rshift", "<": "lt", "<=": "le", ">": "gt", ">=": "ge", "==": "eq",
        "!=": "ne",
    }  # fmt: skip
    for symbol, name in names.items():
        setattr(Operators, f"__{name}__", lambda self, other, symbol=symbol: operate(symbol, self, other))
        if symbol not in COMPARISONS:
            setattr(Operators, f"__r{name}__", lambda self, other, symbol=symbol: operate(symbol, other, self))
    Operators.__neg__ = lambda self: operate("-", 0, self)


_add_operators()


class Value(Operators):
    """A scalar or a tensor."""

    dtype: torch.dtype


class Scalar(Value):
    """One number of the device."""

    __slots__ = ("dtype", "value")

    def __init__(self, value: Any, dtype: torch.dtype) -> None:
        if dtype == torch.float32:
            value = struct.unpack("f", struct.pack("f", value))[0]
        elif dtype in INT_LIMITS:
            check_range(value, value, dtype)
        self.value, self.dtype = value, dtype

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

    def writer_map(self, make: bool) -> torch.Tensor | None:
        """For each element of the storage 0 or who wrote it; None while nobody did."""
        key = self.storage.data_ptr()
        if make and key not in self.writers:
            self.writers[key] = torch.zeros(self.storage.nbytes() // self.flat.element_size(), dtype=torch.int32)
        return self.writers.get(key)

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
        written = self.writer_map(make=False)
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
        written = self.writer_map(make=True)
        if not shared:
            place = index + self.start
            self.check_writers(written[place], me, "writes")
            written[place] = me
        self.flat[index] = values


class Pointer(Operators):
    """One address or a block of them."""

    def __init__(self, memory: Memory, offset: Any = 0) -> None:
        self.memory, self.offset = memory, offset

    @property
    def dtype(self) -> PointerType:
        return PointerType(self.memory.dtype)

    @property
    def shape(self) -> list[int]:
        return list(self.offset.shape) if isinstance(self.offset, torch.Tensor) else []

    def shifted(self, by: Any) -> Pointer:
        by = raw(by)
        return Pointer(self.memory, self.offset + (by.long() if isinstance(by, torch.Tensor) else by))

    def __getitem__(self, index: Any) -> Pointer:
        return Pointer(self.memory, torch.as_tensor(self.offset)[index])


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


def _elementwise(function: Callable[[torch.Tensor], torch.Tensor]) -> Callable[[Any], Any]:
    def apply(x: Any) -> Any:
        if isinstance(x, Tensor):
            return Tensor(function(x.data))
        return wrap(function(torch.tensor(raw(x), dtype=torch.float32)))

    return staticmethod(apply)


class Language:
    """`tl` and `gl`: what does not touch shared memory."""

    constexpr = staticmethod(lambda x: x)
    int1, int8, int16, int32, int64 = torch.bool, torch.int8, torch.int16, torch.int32, torch.int64
    uint32 = torch.int64  # wide enough; what is negative there becomes no place in memory here
    float16, bfloat16, float32, float64 = torch.float16, torch.bfloat16, torch.float32, torch.float64
    range = staticmethod(emulated_range)
    static_range = staticmethod(lambda *bounds: range(*(int(x) for x in bounds)))
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
