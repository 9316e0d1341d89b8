"""What a device may be called, without asking whether it is here (`nsa.device` does)."""

from __future__ import annotations

import re

_DEVICE = re.compile(r"auto|cpu|cuda(:[0-9]{1,4})?")


def check_device_name(name: str) -> None:
    """Refuse a name that is no device of ours.

    Raises:
        ValueError: it is none of "auto", "cpu", "cuda" and "cuda:N".
    """
    if not _DEVICE.fullmatch(name):
        raise ValueError(f'the device {name[:60]!r} is unknown; use "auto", "cpu", "cuda" or "cuda:N"')
