"""The routing report: which implementation runs each stage of a run's NSA layers, and why.

for route in routes(config.model, device, config.train.precision):
    print(route)
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Literal

import torch

from nsa.config.run import ModelSection
from nsa.ops.routing import explain_backend

ATTENTION_STAGES = ("compressed attention", "choice of blocks", "selected attention", "window attention", "gated sum")


@dataclass(frozen=True)
class Route:
    """One stage.

    Attributes:
        stage: what is computed.
        backend: what computes it.
        reason: why that.
        device, dtype, head_dim: of its inputs.
        is_fallback: whether a GPU runs something slower than its kernels.
    """

    stage: str
    backend: str
    reason: str
    device: str
    dtype: str
    head_dim: int
    is_fallback: bool

    def __str__(self) -> str:
        return f"{self.stage}: {self.backend} ({self.reason})"


def routes(model: ModelSection, device: torch.device, precision: Literal["fp32", "bf16"]) -> list[Route]:
    """The stages of an NSA layer in a training step; none for a model without such layers.

    Raises:
        ValueError: the backend that the config names cannot run here.
    """
    if "nsa" not in model.layer_types:
        return []
    key_size, value_size = model.head_sizes
    # The operator is one call, so that its widest head decides.
    sizes = dict.fromkeys(ATTENTION_STAGES, max(key_size, value_size))
    if model.compression == "mean":
        sizes = {"mean of keys": key_size, "mean of values": value_size, **sizes}
    return [_route(stage, size, model, device, precision) for stage, size in sizes.items()]


def describe_routes(found: Sequence[Route]) -> str:
    """One backend and its reason where all stages share it, else stage by stage."""
    if not found:
        return "no NSA layer"
    if len({(route.backend, route.reason) for route in found}) == 1:
        return f"{found[0].backend}, {found[0].reason}"
    return "; ".join(map(str, found))


def _route(stage: str, size: int, model: ModelSection, device: torch.device, precision: str) -> Route:
    dtype = torch.bfloat16 if precision == "bf16" else torch.float32
    probe = torch.empty(1, size, dtype=dtype, device=device)
    backend, reason = explain_backend(model.attention_backend, probe)
    is_fallback = model.attention_backend == "auto" and device.type == "cuda" and backend != "triton"
    return Route(stage, backend, reason, str(device), str(dtype).removeprefix("torch."), size, is_fallback)
