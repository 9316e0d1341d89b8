"""Which backend runs: chosen once for each call from device, dtype and shape, and explained on request."""

from __future__ import annotations

from torch import Tensor

from nsa.geometry import BlockGeometry

BACKENDS = ("reference", "torch", "triton")


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
    return "this version has no Triton kernels yet"
