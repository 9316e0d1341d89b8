"""Whether this machine can train and run NSA models: versions, devices, kernels, disk, memory, the Hub.

    diagnosis = diagnose()
    print(diagnosis.text())
    diagnosis.problems       # what makes the machine unusable; empty on a good one

Kernels are judged by running a small NSA forward and backward pass on each backend that can run, against the reference
in fp64.
"""

from __future__ import annotations

import importlib.util
import json
import platform
import shutil
import sys
import time
from collections.abc import Iterator
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from nsa import BlockGeometry, mean_pool, nsa_attention
from nsa.machine import PACKAGES, cpu_name, num_cpus, package_version, ram_gib
from nsa.ops.routing import choose_backend
from nsa.terminal import redacted
from nsa.units import GIB

PYTHON = (3, 11)
TORCH = (2, 11), (2, 14)  # the first that works and the first that was not tried
NEEDED_PACKAGES = ("numpy", "pydantic", "tyro", "transformers", "safetensors", "tokenizers", "rich")
MIN_DISK_GIB = 1.0
GEOMETRY = BlockGeometry(8, 4, 16, 4, window_size=20)
# Largest error against the reference in fp64, as a share of its largest value.
TOLERANCE = {torch.float32: 1e-3, torch.bfloat16: 6e-2}


@dataclass(frozen=True)
class KernelCheck:
    """One backend on one device in one dtype.

    Attributes:
        relative_error: largest difference from the reference, over the largest value, of the output and the gradients.
        seconds: compilation included.
        problem: why it did not run, or is wrong; None when all is well.
    """

    backend: str
    device: str
    dtype: str
    relative_error: float | None
    seconds: float
    problem: str | None


@dataclass(frozen=True)
class Diagnosis:
    """What `nsa doctor` found.

    Attributes:
        facts: section -> name -> plain value.
        kernels: what was run.
        problems: what makes the machine unusable.
        remarks: what is worth knowing and stops nothing.
    """

    facts: dict[str, dict[str, Any]]
    kernels: tuple[KernelCheck, ...]
    problems: tuple[str, ...]
    remarks: tuple[str, ...]

    def text(self) -> str:
        """Everything, for people."""
        lines = []
        for section, facts in self.facts.items():
            lines += [section, *(f"  {name:<18} {_plain(value)}" for name, value in facts.items())]
        lines += ["kernels", *(f"  {kernel_line(check)}" for check in self.kernels)]
        lines += [f"remark: {text}" for text in self.remarks] + [f"problem: {text}" for text in self.problems]
        return "\n".join([*lines, "unusable" if self.problems else "usable"])

    def json(self) -> str:
        """Everything, for programs."""
        values = {"usable": not self.problems, **self.facts, "kernels": [asdict(check) for check in self.kernels]}
        return json.dumps({**values, "problems": self.problems, "remarks": self.remarks}, indent=2)


def diagnose(folder: Path = Path("."), *, hub_timeout_s: float = 3.0) -> Diagnosis:
    """Look at everything; `folder` is where runs would be written."""
    kernels = tuple(check_kernels())
    disk_gib = shutil.disk_usage(folder).free / GIB
    facts = {
        "versions": _versions(),
        "cpu": {
            "name": cpu_name(),
            "cores": num_cpus(),
            "torch threads": torch.get_num_threads(),
            "memory_gib": round(ram_gib(), 1),
        },
        "gpus": gpus(),
        "disk": {"folder": str(folder.absolute()), "free_gib": round(disk_gib, 1)},
        "processes": processes(),
        "hub": hub(hub_timeout_s),
    }
    problems = [*_version_problems(), *(kernel_line(check) for check in kernels if check.problem)]
    if disk_gib < MIN_DISK_GIB:
        problems.append(f"{disk_gib:.2f} GiB of disk are free at {folder.absolute()}; free at least {MIN_DISK_GIB:g}")
    return Diagnosis(facts, kernels, tuple(problems), tuple(_remarks(facts)))


def check_kernels() -> Iterator[KernelCheck]:
    """Every backend that can run here, on every kind of device, against the reference."""
    devices = [torch.device("cpu")] + ([torch.device("cuda", 0)] if torch.cuda.is_available() else [])
    for device in devices:
        for backend in ("reference", "torch", "triton"):
            try:
                choose_backend(backend, torch.empty(1, device=device))
            except ValueError:
                continue
            for dtype in (torch.float32,) if device.type == "cpu" else (torch.float32, torch.bfloat16):
                yield check_kernel(backend, device, dtype)


def check_kernel(backend: str, device: torch.device, dtype: torch.dtype) -> KernelCheck:
    """A small forward and backward pass, batched and packed, against the reference in fp64 on the CPU."""
    start_s = time.perf_counter()
    names = {"backend": backend, "device": str(device), "dtype": str(dtype).removeprefix("torch.")}
    try:
        error = max(_relative_error(backend, device, dtype, packed) for packed in (False, True))
    except (RuntimeError, ValueError, ImportError) as failure:  # what torch, Triton and its compiler raise
        problem = f"did not run: {type(failure).__name__}: {str(failure).splitlines()[0]}"
        return KernelCheck(**names, relative_error=None, seconds=time.perf_counter() - start_s, problem=problem)
    problem = (
        None if error <= TOLERANCE[dtype] else f"wrong: {error:.1e} from the reference, {TOLERANCE[dtype]:g} at most"
    )
    return KernelCheck(**names, relative_error=error, seconds=time.perf_counter() - start_s, problem=problem)


def kernel_line(check: KernelCheck) -> str:
    """One line for people."""
    result = check.problem or f"right within {check.relative_error:.0e}"
    return f"{check.backend:<9} {check.device:<7} {check.dtype:<9} {result} ({check.seconds:.1f} s)"


def gpus() -> dict[str, Any]:
    """The GPUs and their driver, by torch and, where it is installed, nvidia-ml-py."""
    if not torch.cuda.is_available():
        return {"devices": "none", "built for cuda": torch.version.cuda or "no"}
    facts: dict[str, Any] = {"built for cuda": torch.version.cuda, "driver": driver_version()}
    for index in range(torch.cuda.device_count()):
        properties = torch.cuda.get_device_properties(index)
        free, total = torch.cuda.mem_get_info(index)
        facts[f"cuda:{index}"] = {
            "name": properties.name,
            "capability": f"{properties.major}.{properties.minor}",
            "memory_gib": round(total / GIB, 1),
            "free_gib": round(free / GIB, 1),
            "bf16": torch.cuda.is_bf16_supported(including_emulation=False),
        }
    return facts


def driver_version() -> str:
    """The NVIDIA driver's version, or why it is not known."""
    try:
        import pynvml  # pyright: ignore[reportMissingImports]
    except ModuleNotFoundError:
        return "unknown without the package nvidia-ml-py"
    try:
        pynvml.nvmlInit()
        return pynvml.nvmlSystemGetDriverVersion()
    except pynvml.NVMLError as error:
        return f"unknown: {error}"


def processes() -> dict[str, Any]:
    """What several processes can talk through."""
    import torch.distributed as dist

    if not dist.is_available():
        return {"distributed": "not built into torch"}
    return {"nccl": dist.is_nccl_available(), "gloo": dist.is_gloo_available()}


def hub(timeout_s: float) -> dict[str, Any]:
    """Whether the Hugging Face Hub answers, and who is logged in; no token is shown.

    Args:
        timeout_s: seconds that each of the two questions may take.
    """
    if importlib.util.find_spec("huggingface_hub") is None:
        return {"reachable": "unknown without the package huggingface_hub", "login": "unknown"}
    from huggingface_hub import constants, get_token

    token, offline = get_token(), constants.HF_HUB_OFFLINE
    login = "a token is stored, not checked" if token else "none; public data needs none"
    if offline:
        return {"endpoint": redacted(constants.ENDPOINT), "reachable": "not asked: offline mode is on", "login": login}
    answer, problem = _get(f"{constants.ENDPOINT}/api/whoami-v2", token, timeout_s)
    if answer is not None and token:
        login = f"as {answer['name']}" if "name" in answer else "the stored token is not valid; run `hf auth login`"
    return {"endpoint": redacted(constants.ENDPOINT), "reachable": redacted(problem or "yes"), "login": login}


def _get(url: str, token: str | None, timeout_s: float) -> tuple[dict[str, Any] | None, str | None]:
    """The JSON object at `url`, empty for a refusal, or why there is no answer; by the proxies that downloads take."""
    from huggingface_hub.errors import HTTPError  # pyright: ignore[reportPrivateImportUsage]
    from huggingface_hub.utils import build_hf_headers, get_session

    try:
        answer = get_session().get(url, headers=build_hf_headers(token=token or False), timeout=timeout_s)
    except (HTTPError, OSError) as error:
        return None, f"no: {error or type(error).__name__}"
    if answer.status_code in (401, 403):
        return {}, None
    if answer.is_error:
        return None, f"no: HTTP {answer.status_code}"
    try:
        return answer.json(), None
    except ValueError as error:
        return None, f"no: the answer is not JSON ({error})"


def _relative_error(backend: str, device: torch.device, dtype: torch.dtype, packed: bool) -> float:
    """The largest error of compressed tokens, output and gradients, each over the largest value of its own."""
    generator = torch.Generator().manual_seed(0)
    length, heads, groups, size = 100, 4, 2, 32
    bounds = torch.tensor([0, 23, length], dtype=torch.int32) if packed else None
    shapes = [(1, length, heads, size), (1, length, groups, size), (1, length, groups, size), (1, length, heads, 3)]
    # Both sides get the same rounded inputs, compressed tokens too, so that they choose the same blocks.
    q, k, v, gates = (torch.randn(shape, generator=generator).to(dtype) for shape in shapes)
    pooled = [mean_pool(x.double(), GEOMETRY, bounds, backend="reference") for x in (k, v)]
    inputs = [q, k, v, *(x.to(dtype) for x in pooled), gates]
    there = None if bounds is None else bounds.to(device)
    expected = [pooled[0], *_run("reference", [x.double() for x in inputs], bounds)]
    got = [mean_pool(k.to(device), GEOMETRY, there, backend=backend)]
    got += _run(backend, [x.to(device) for x in inputs], there)
    pairs = zip(expected, (x.cpu().double() for x in got), strict=True)
    return max(((a - b).abs().max() / a.abs().max()).item() for a, b in pairs)


def _run(backend: str, inputs: list[Tensor], cu_seqlens: Tensor | None) -> list[Tensor]:
    """Output and gradients of a small problem."""
    q, k, v, k_cmp, v_cmp, gates = leaves = [x.detach().requires_grad_() for x in inputs]
    out = nsa_attention(q, k, v, k_cmp, v_cmp, gates, GEOMETRY, cu_seqlens=cu_seqlens, backend=backend)
    assert isinstance(out, Tensor)
    out.square().sum().backward()
    return [out.detach(), *(leaf.grad for leaf in leaves if leaf.grad is not None)]


def _versions() -> dict[str, Any]:
    import nsa

    return {
        "nsa": nsa.__version__,
        "python": platform.python_version(),
        **{name: package_version(name) or "not installed" for name in PACKAGES},
        "system": platform.platform(),
    }


def _version_problems() -> Iterator[str]:
    if sys.version_info < PYTHON:
        yield f"Python {platform.python_version()}: {'.'.join(map(str, PYTHON))} or newer is needed"
    least = TORCH[0]
    here = tuple(int(part) for part in torch.__version__.split(".")[:2])
    if here < least:
        yield f"torch {torch.__version__}: at least {least[0]}.{least[1]} is needed; pip install -U torch"
    if missing := [name for name in NEEDED_PACKAGES if importlib.util.find_spec(name) is None]:
        yield f"not installed: {', '.join(missing)}; pip install 'nsa[train]'"


def _remarks(facts: dict[str, dict[str, Any]]) -> Iterator[str]:
    here = tuple(int(part) for part in torch.__version__.split(".")[:2])
    if here >= TORCH[1]:
        yield f"torch {torch.__version__} is newer than any that was tried ({TORCH[1][0]}.{TORCH[1][1] - 1})"
    if not torch.cuda.is_available():
        yield "no GPU: training and decoding run on the CPU (backend torch)"
    if str(facts["hub"]["reachable"]).startswith("no"):
        yield "the Hub cannot be reached: use local data and tokenizers, or what is cached"


def _plain(value: Any) -> str:
    if isinstance(value, bool):
        return "yes" if value else "no"
    if isinstance(value, dict):
        return ", ".join(f"{name} {_plain(entry)}" for name, entry in value.items())
    return str(value)
