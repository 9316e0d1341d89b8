"""The machine that a run is meant for: this one, or one of a short table of devices.

>>> machine_named("h200").memory_gib
139.8
"""

from __future__ import annotations

import os
import re
from dataclasses import dataclass
from typing import Literal

import torch

from nsa.ops.routing import HAS_TRITON
from nsa.train.flops import peak_flops
from nsa.train.observe.environment import cpu_name

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
