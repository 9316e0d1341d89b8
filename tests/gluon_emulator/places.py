"""Errors of the emulator, and where in a kernel they arise."""

from __future__ import annotations

import sys
from types import CodeType


class EmulationError(Exception):
    """What would be wrong, or might be, on the device."""


def where_in_kernel(code: CodeType | None = None) -> str:
    """File and line of the innermost frame outside the emulator, or of the one that runs `code`."""
    frame = sys._getframe(1)
    while frame.f_back is not None:
        inside = frame.f_globals.get("__emulated__")
        if inside and (code is None or frame.f_code is code):
            break
        frame = frame.f_back
    return f"{frame.f_code.co_filename.rpartition('/')[2]}:{frame.f_lineno}"
