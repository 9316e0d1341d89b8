"""Units of what is shown: bytes in a GiB, and seconds in words."""

from __future__ import annotations

GIB = 2**30


def duration(seconds: float) -> str:
    """Minutes and seconds as 4:05, or hours, minutes and seconds as 1:04:05."""
    minutes, rest = divmod(round(seconds), 60)
    hours, minutes = divmod(minutes, 60)
    return f"{hours}:{minutes:02}:{rest:02}" if hours else f"{minutes}:{rest:02}"
