"""Compile kernels for a GPU that is not here."""

from __future__ import annotations

from typing import Any

import torch
from triton.backends.compiler import GPUTarget
from triton.runtime import driver
from triton.runtime.jit import JITFunction


class NoGpuDriver:
    """As much of a Triton driver as compiling asks for."""

    def __init__(self, architecture: int) -> None:
        self.architecture = architecture

    def get_current_target(self) -> GPUTarget:
        return GPUTarget("cuda", self.architecture, 32)

    def get_current_device(self) -> int:
        return 0

    def get_current_stream(self, device: int = 0) -> int:
        return 0

    def get_active_torch_device(self) -> torch.device:
        return torch.device("cpu")


def compile_launches(architecture: int) -> list[tuple[str, Any]]:
    """Make every later launch compile its kernel instead, and collect name and kernel in the list."""
    kernels: list[tuple[str, Any]] = []
    driver.set_active(NoGpuDriver(architecture))
    launch = JITFunction.run

    def run(self: JITFunction, *args: Any, grid: Any, warmup: bool, **options: Any) -> None:
        kernels.append((self.__name__, launch(self, *args, grid=grid, warmup=True, **options)))

    JITFunction.run = run
    return kernels
