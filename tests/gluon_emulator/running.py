"""Which program runs, and how its kernel names what it allocates."""

from __future__ import annotations

import ast
import functools
import sys
import types
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from gluon_emulator.machine import Program
from gluon_emulator.places import where_in_kernel

_running: list[tuple[Program, types.CodeType]] = []  # one at most, with its kernel's code


def running() -> Program:
    return _running[0][0]


@contextmanager
def run_in(program: Program, code: types.CodeType) -> Iterator[None]:
    """Within it, what kernels call belongs to this program of a kernel with this code."""
    _running[:] = [(program, code)]
    try:
        yield
    finally:
        _running.clear()


def name_of_allocation() -> str:
    """What the kernel and the functions that it called name what is allocated, as in `k_pipe.full`."""
    kernel, names, frame = _running[0][1], [], sys._getframe(1)
    while frame is not None:
        if frame.f_globals.get("__emulated__"):
            names.append(name_of_result(frame.f_code.co_filename, frame.f_lineno, frame.f_code is kernel))
        if frame.f_code is kernel:
            break
        frame = frame.f_back
    return ".".join(name for name in reversed(names) if name) or where_in_kernel(kernel)


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
