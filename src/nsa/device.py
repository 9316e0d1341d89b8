"""Where a run computes, by which algorithms, and what becomes of freed memory."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import torch

from nsa.config.device_name import check_device_name


def choose_device(name: str) -> torch.device:
    """The device of a name; "auto" is CUDA where there is one, else the CPU.

    CUDA without a number is the device that this process has taken (`torch.cuda.set_device`), with its number.

    Raises:
        ValueError: no such device here.
    """
    check_device_name(name)
    if name == "auto":
        name = "cuda" if torch.cuda.is_available() else "cpu"
    device = torch.device(name)
    if device.type == "cuda" and (device.index or 0) >= torch.cuda.device_count():
        raise ValueError(f"the device {name!r} is not here: {torch.cuda.device_count()} CUDA devices; use auto or cpu")
    if device.type == "cuda" and device.index is None:
        return torch.device("cuda", torch.cuda.current_device())
    return device


def keep_freed_memory() -> None:
    """Make glibc serve the process's temporaries of up to 31 MiB from memory that it keeps.

    Fresh pages for each tile of attention on the CPU cost about 5% of a training step. Freeing one large untouched
    block raises the allocator's thresholds; other allocators are not affected. The trainer calls this; a loop of your
    own may do so once.
    """
    torch.empty(31 << 20, dtype=torch.uint8)


@contextmanager
def deterministic_algorithms(enabled: bool) -> Iterator[None]:
    """Allow deterministic algorithms only inside the block, when `enabled`; then put the setting back."""
    memory: Any = torch.utils.deterministic
    before, fill = torch.are_deterministic_algorithms_enabled(), memory.fill_uninitialized_memory
    torch.use_deterministic_algorithms(enabled or before)
    memory.fill_uninitialized_memory = False  # it costs a write of every new tensor
    try:
        yield
    finally:
        torch.use_deterministic_algorithms(before)
        memory.fill_uninitialized_memory = fill
