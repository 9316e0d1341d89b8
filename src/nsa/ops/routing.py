"""Which backend runs: chosen once for each call from device, dtype and shape, and explained on request."""

from __future__ import annotations

import importlib.util

import torch
from torch import Tensor

from nsa.geometry import BlockGeometry

BACKENDS = ("reference", "torch", "triton")
TRITON_DTYPES = (torch.float16, torch.bfloat16, torch.float32)
MAX_TRITON_HEAD_SIZE = 256
HAS_TRITON = importlib.util.find_spec("triton") is not None  # looked up, not imported


def choose_backend(backend: str, x: Tensor, geometry: BlockGeometry) -> str:
    """The backend for tensors like `x`; "auto" resolves, a name stands or raises.

    Raises:
        ValueError: an unknown name, or a backend that cannot run `x`, with those that can.
    """
    if backend == "auto":
        return explain_backend(x, geometry)[0]
    if backend not in BACKENDS:
        raise ValueError(f"backend {backend!r} is unknown; choose 'auto' or one of {', '.join(map(repr, BACKENDS))}")
    if backend == "triton":
        reason = _why_not_triton(x)
        if reason:
            raise ValueError(f"backend 'triton' cannot run here: {reason}; use backend='torch' or 'auto'")
    return backend


def explain_backend(x: Tensor, geometry: BlockGeometry) -> tuple[str, str]:
    """What "auto" chooses for tensors like `x`, and why."""
    reason = _why_not_triton(x)
    if reason is None:
        return "triton", f"{x.dtype} on a CUDA device"
    return "torch", f"triton cannot run: {reason}"


def _why_not_triton(x: Tensor) -> str | None:
    if x.device.type != "cuda":
        return f"it needs a CUDA device of compute capability 8.0 or newer, not {x.device.type!r}"
    if x.dtype not in TRITON_DTYPES:
        return f"it takes fp16, bf16 and fp32, not {x.dtype}"
    if x.shape[-1] > MAX_TRITON_HEAD_SIZE:
        return f"it takes head sizes up to {MAX_TRITON_HEAD_SIZE}, not {x.shape[-1]}"
    if not HAS_TRITON:
        return "the package triton is not installed"
    capability = torch.cuda.get_device_capability(x.device)
    if capability < (8, 0):
        return f"it needs compute capability 8.0 or newer, not {capability[0]}.{capability[1]}"
    return None
