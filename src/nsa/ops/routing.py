"""Which backend runs: chosen once for each call from device, dtype and shape, and explained on request.

print(routing_report(q, k, v, geometry))          # or json.dumps(routing_report(...).as_dict())
"""

from __future__ import annotations

import importlib.util
import platform
from dataclasses import asdict, dataclass
from typing import Any

import torch
from torch import Tensor

from nsa.geometry import BlockGeometry

BACKENDS = ("reference", "torch", "triton")
FUSED_BACKENDS = ("triton",)  # compute a whole call by one operator; the others stage by stage
STAGE_OPERATORS = ("compressed_attention", "select_blocks", "selected_attention", "window_attention")
STEP_BACKENDS = ("torch",)  # decode single tokens by a function of their own; the others as a chunk of one
TRITON_DTYPES = (torch.float16, torch.bfloat16, torch.float32)
MAX_TRITON_HEAD_SIZE = 256
HAS_TRITON = importlib.util.find_spec("triton") is not None  # looked up, not imported


def choose_backend(backend: str, x: Tensor, *others: Tensor) -> str:
    """The backend for tensors like `x`; "auto" resolves, a name stands or raises.

    Args:
        others: more tensors of the same dtype and device, whose head sizes must fit too.

    Raises:
        ValueError: an unknown name, or a backend that cannot run `x`, with those that can.
    """
    return explain_backend(backend, x, *others)[0]


def explain_backend(backend: str, x: Tensor, *others: Tensor) -> tuple[str, str]:
    """What `choose_backend` chooses, and why.

    Raises:
        ValueError: as `choose_backend`.
    """
    if backend == "auto":
        problem = _why_not_triton(x, *others)
        return ("torch", f"triton cannot run: {problem}") if problem else ("triton", f"{x.dtype} on a CUDA device")
    if backend not in BACKENDS:
        raise ValueError(f"backend {backend!r} is unknown; choose 'auto' or one of {', '.join(map(repr, BACKENDS))}")
    if backend == "triton" and (problem := _why_not_triton(x, *others)):
        raise ValueError(f"backend 'triton' cannot run here: {problem}; use backend='torch' or 'auto'")
    return backend, "asked for"


def operators_of(backend: str) -> tuple[str, ...]:
    """The operators of `nsa.ops.registry` that a whole call runs; none for the reference, which is plain PyTorch."""
    if backend == "reference":
        return ()
    return tuple(f"nsa::{name}" for name in (("attention",) if backend in FUSED_BACKENDS else STAGE_OPERATORS))


@dataclass(frozen=True)
class StageRoute:
    """What runs one stage of the operator.

    Attributes:
        stage: what is computed.
        kernels: names of the kernels, or of the module where PyTorch computes.
        tile: sizes of the main kernel's tile, warps and stages of its pipeline; empty where it has none.
        reason: why these.
    """

    stage: str
    kernels: str
    tile: dict[str, Any]
    reason: str


@dataclass(frozen=True)
class RoutingReport:
    """What `nsa_attention` and its backward run for given tensors: `str()` for people, `as_dict()` for JSON.

    Attributes:
        backend: that the call takes.
        reason: why.
        operators: of torch.library, that a call runs.
        is_fallback: whether a GPU runs something slower than its kernels, which nobody asked for.
        device, versions: where it runs, and on which torch and triton.
        stages: of the operator.
    """

    backend: str
    reason: str
    operators: tuple[str, ...]
    is_fallback: bool
    device: str
    versions: dict[str, str]
    stages: tuple[StageRoute, ...]

    def as_dict(self) -> dict[str, Any]:
        """Plain values."""
        return asdict(self)

    def __str__(self) -> str:
        versions = ", ".join(f"{name} {version}" for name, version in self.versions.items())
        operators = ", ".join(self.operators) or "plain PyTorch"
        lines = [f"{self.backend} ({self.reason}), {operators}, on {self.device}, {versions}"]
        width = max(len(route.stage) for route in self.stages)
        for route in self.stages:
            tile = " ".join(f"{name.lower()}={value}" for name, value in route.tile.items())
            lines.append(f"  {route.stage:<{width}}  {route.kernels}  {tile}\n  {'':<{width}}  because: {route.reason}")
        return "\n".join(lines)


def routing_report(
    q: Tensor, k: Tensor, v: Tensor, geometry: BlockGeometry, *, cu_seqlens: Tensor | None = None, backend: str = "auto"
) -> RoutingReport:
    """Which kernels run for tensors of these shapes, dtype and device; their contents do not matter.

    Raises:
        ValueError: a backend asked for by name cannot run here.
    """
    chosen, reason = explain_backend(backend, q, v)
    versions = {"torch": str(torch.__version__)}
    if chosen == "triton":
        plan = importlib.import_module("nsa.ops.triton.plan").plan_call
        tokens = q.shape[1]
        most = geometry.num_compressed(tokens) if cu_seqlens is None else geometry.max_num_compressed(tokens)
        stages = tuple(
            StageRoute(name, ", ".join(stage.kernels), dict(stage.tile), stage.reason)
            for name, stage in plan(q, k, v, geometry, cu_seqlens, most).stages()
        )
        versions["triton"] = importlib.import_module("triton").__version__
    else:
        module = "nsa.ops.reference" if chosen == "reference" else "nsa.ops.torch_native"
        stages = (StageRoute("all stages", module, {}, "PyTorch's own operators, on any device"),)
    device = torch.cuda.get_device_name(q.device) if q.is_cuda else platform.processor() or platform.machine()
    is_fallback = backend == "auto" and q.device.type == "cuda" and chosen != "triton"
    return RoutingReport(chosen, reason, operators_of(chosen), is_fallback, device, versions, stages)


def _why_not_triton(x: Tensor, *others: Tensor) -> str | None:
    if x.device.type != "cuda":
        return f"it needs a CUDA device of compute capability 8.0 or newer, not {x.device.type!r}"
    if x.dtype not in TRITON_DTYPES:
        return f"it takes fp16, bf16 and fp32, not {x.dtype}"
    widest = max(tensor.shape[-1] for tensor in (x, *others))
    if widest > MAX_TRITON_HEAD_SIZE:
        return f"it takes head sizes up to {MAX_TRITON_HEAD_SIZE}, not {widest}"
    if not HAS_TRITON:
        return "the package triton is not installed"
    capability = torch.cuda.get_device_capability(x.device)
    if capability < (8, 0):
        return f"it needs compute capability 8.0 or newer, not {capability[0]}.{capability[1]}"
    return None
