"""Prefill benchmark: the operator forward and backward at growing length, against dense causal attention.

    nsa bench prefill --lengths 1024 8192 --out prefill_cpu.csv

NSA is the whole operator; mean pooling of keys and values is included unless `--no_pool`. Dense is
`scaled_dot_product_attention` with keys and values already repeated for all query heads, its best case. The two take
turns; on a GPU their kernels count, not the launches, which the host makes ahead as in training, and each runs once
untimed before it is timed, so that clocks are those under its own load. Peak memory is what a forward and backward
needs beyond its inputs, measured in a process of its own (on the CPU from the kernel's high-water mark). `--alike 64`
averages queries and keys over neighbouring tokens, so that neighbours choose alike, as in trained models. Beside the
CSV goes a picture of the times and of how many times faster NSA is.

CSV columns: `length` tokens; `nsa_forward_ms`, `nsa_backward_ms`, `nsa_total_ms` and likewise `dense_`; `speedup` is
dense total over NSA total; `nsa_peak_gib`, `dense_peak_gib`; then forward and backward of each stage alone. What was
not measured is nan.
"""

from __future__ import annotations

import multiprocessing
import re
from collections.abc import Callable, Sequence
from concurrent.futures import ProcessPoolExecutor
from contextlib import nullcontext
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from torch.nn.attention import SDPBackend, sdpa_kernel

from nsa.bench import prefill_picture
from nsa.bench.protocol import Steps, median_ms
from nsa.bench.settings import PrefillBench
from nsa.device import choose_device, keep_freed_memory
from nsa.geometry import BlockGeometry
from nsa.machine import device_name
from nsa.ops.api import (
    compressed_attention,
    mean_pool,
    nsa_attention,
    select_blocks,
    selected_attention,
    window_attention,
)
from nsa.units import GIB

DENSE_BACKENDS = {
    "flash": SDPBackend.FLASH_ATTENTION,
    "cudnn": SDPBackend.CUDNN_ATTENTION,
    "efficient": SDPBackend.EFFICIENT_ATTENTION,
    "math": SDPBackend.MATH,
}
WARMUP_LENGTH = 256


@dataclass(frozen=True)
class PrefillRow:
    """One line of the CSV; its fields are the columns, nan where not measured."""

    length: int
    nsa_forward_ms: float
    nsa_backward_ms: float
    nsa_total_ms: float
    dense_forward_ms: float = float("nan")
    dense_backward_ms: float = float("nan")
    dense_total_ms: float = float("nan")
    speedup: float = float("nan")
    nsa_peak_gib: float = float("nan")
    dense_peak_gib: float = float("nan")
    pool_forward_ms: float = float("nan")
    pool_backward_ms: float = float("nan")
    cmp_forward_ms: float = float("nan")
    cmp_backward_ms: float = float("nan")
    select_forward_ms: float = float("nan")
    slc_forward_ms: float = float("nan")
    slc_backward_ms: float = float("nan")
    win_forward_ms: float = float("nan")
    win_backward_ms: float = float("nan")


def measure_prefill(bench: PrefillBench) -> list[PrefillRow]:
    """Run the benchmark, one row for each length.

    Raises:
        ValueError: no lengths, a size below 1, or sizes that the operator refuses.
    """
    sizes = (*bench.lengths, bench.batch, bench.num_heads, bench.num_kv_heads, bench.head_dim, bench.value_head_dim)
    if not bench.lengths or min(*sizes, bench.alike) < 1:
        raise ValueError(f"lengths, sizes and alike must be at least 1, not {[*sizes, bench.alike]}")
    return [_measure(bench, length) for length in bench.lengths]


def _measure(bench: PrefillBench, length: int) -> PrefillRow:
    device = choose_device(bench.device)
    if device.type == "cpu":
        keep_freed_memory()  # as the trainer does
    candidates: dict[str, Steps] = {"nsa": nsa_steps(bench, length)}
    if bench.dense:
        candidates["dense"] = dense_steps(bench, length)
    values = median_ms(candidates, device, bench.warmup, bench.repeats, ahead=True)
    columns = {f"{name}_ms": value for name, value in values.items()}
    if bench.dense:
        columns["speedup"] = values["dense_total"] / values["nsa_total"]
    if bench.stages:
        stage_values = median_ms(stage_steps(bench, length), device, bench.warmup, bench.repeats, ahead=True)
        columns |= {f"{name}_ms": ms for name, ms in stage_values.items() if not name.endswith("_total")}
    del candidates
    if bench.memory:
        columns |= {
            f"{kind}_peak_gib": peak_gib(bench, length, kind)
            for kind in ("nsa", "dense")
            if bench.dense or kind == "nsa"
        }
    return PrefillRow(length, **columns)


def forward_and_backward(forward: Callable[[], Tensor | tuple[Tensor, ...]], inputs: list[Tensor]) -> Steps:
    """Steps "forward" and "backward" of the first output, under a fixed random gradient."""
    state: dict[str, Tensor] = {}

    def run_forward() -> None:
        result = forward()
        state["out"] = result[0] if isinstance(result, tuple) else result

    def run_backward() -> None:
        out = state.pop("out")
        if "gradient" not in state:
            state["gradient"] = torch.randn_like(out)
        torch.autograd.grad(out, inputs, state["gradient"])

    return {"forward": run_forward, "backward": run_backward}


def nsa_steps(bench: PrefillBench, length: int) -> Steps:
    """The whole operator on random tensors."""
    q, k, v, gates = _inputs(bench, length)
    geometry, backend = BlockGeometry(*bench.geometry), bench.backend

    def pooled() -> tuple[Tensor, Tensor]:
        return mean_pool(k, geometry, backend=backend), mean_pool(v, geometry, backend=backend)

    given = () if bench.pool else tuple(x.detach().requires_grad_() for x in pooled())

    def forward() -> Any:
        k_cmp, v_cmp = given or pooled()
        return nsa_attention(q, k, v, k_cmp, v_cmp, gates, geometry, backend=backend)

    return forward_and_backward(forward, [q, k, v, gates, *given])


def dense_steps(bench: PrefillBench, length: int) -> Steps:
    """Causal `scaled_dot_product_attention` on random tensors in its own layout, all heads with their own keys."""
    shape = (bench.batch, bench.num_heads, length)
    q, k, v = (_random(bench, *shape, size) for size in (bench.head_dim, bench.head_dim, bench.value_head_dim))

    def forward() -> Tensor:
        chosen = nullcontext() if bench.dense_backend == "auto" else sdpa_kernel(DENSE_BACKENDS[bench.dense_backend])
        with chosen:
            return torch.nn.functional.scaled_dot_product_attention(q, k, v, is_causal=True)

    return forward_and_backward(forward, [q, k, v])


def stage_steps(bench: PrefillBench, length: int) -> dict[str, Steps]:
    """Each stage alone, on what the stages before it give."""
    q, k, v, _ = _inputs(bench, length)
    geometry, backend = BlockGeometry(*bench.geometry), bench.backend
    k_cmp, v_cmp = (mean_pool(x.detach(), geometry, backend=backend).requires_grad_() for x in (k, v))
    with torch.no_grad():
        _, lse = compressed_attention(q, k_cmp, v_cmp, geometry, backend=backend)
        blocks = select_blocks(q, k_cmp, lse, geometry, backend=backend)
    return {
        "pool": forward_and_backward(partial(mean_pool, k, geometry, backend=backend), [k]),
        "cmp": forward_and_backward(
            partial(compressed_attention, q, k_cmp, v_cmp, geometry, backend=backend), [q, k_cmp, v_cmp]
        ),
        "select": {"forward": partial(select_blocks, q, k_cmp, lse, geometry, backend=backend)},
        "slc": forward_and_backward(partial(selected_attention, q, k, v, blocks, geometry, backend=backend), [q, k, v]),
        "win": forward_and_backward(partial(window_attention, q, k, v, geometry, backend=backend), [q, k, v]),
    }


def peak_gib(bench: PrefillBench, length: int, kind: str) -> float:
    """Peak memory of one forward and backward beyond the inputs, in GiB, measured in a fresh process."""
    context = multiprocessing.get_context("spawn")
    with ProcessPoolExecutor(max_workers=1, mp_context=context) as pool:
        return pool.submit(_peak_gib_here, bench, length, kind).result()


def _peak_gib_here(bench: PrefillBench, length: int, kind: str) -> float:
    make = nsa_steps if kind == "nsa" else dense_steps
    for run in make(bench, min(length, WARMUP_LENGTH)).values():
        run()
    steps, device = make(bench, length), choose_device(bench.device)
    if device.type == "cuda":
        torch.cuda.reset_peak_memory_stats(device)
        before = torch.cuda.memory_allocated(device)
    else:
        # 5 resets the high-water mark of the resident set (man 5 proc).
        Path("/proc/self/clear_refs").write_text("5")
        before = _resident_bytes("VmRSS")
    for run in steps.values():
        run()
    after = torch.cuda.max_memory_allocated(device) if device.type == "cuda" else _resident_bytes("VmHWM")
    return (after - before) / GIB


def _resident_bytes(field: str) -> int:
    found = re.search(rf"^{field}:\s+(\d+) kB$", Path("/proc/self/status").read_text(), re.MULTILINE)
    assert found is not None
    return 1024 * int(found[1])


def _inputs(bench: PrefillBench, length: int) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """q, k, v and gates of NSA."""
    shape = (bench.batch, length)
    return (
        _neighbours(_random(bench, *shape, bench.num_heads, bench.head_dim), bench.alike),
        _neighbours(_random(bench, *shape, bench.num_kv_heads, bench.head_dim), bench.alike),
        _random(bench, *shape, bench.num_kv_heads, bench.value_head_dim),
        _random(bench, *shape, bench.num_heads, 3),
    )


def _neighbours(x: Tensor, count: int) -> Tensor:
    """The mean of each token's vector and the `count` - 1 before it, at its old variance."""
    if count == 1:
        return x
    sums = x.detach().double().cumsum(1)
    sums[:, count:] -= sums[:, :-count].clone()
    return (sums / count**0.5).to(x.dtype).requires_grad_()


def draw(rows: Sequence[PrefillRow], bench: PrefillBench, path: Path) -> None:
    """Write the picture of what this machine has measured, as PNG."""
    prefill_picture.draw(rows, bench, path, device=device_name(choose_device(bench.device)))


def _random(bench: PrefillBench, *shape: int) -> Tensor:
    return torch.randn(
        *shape, dtype=getattr(torch, bench.dtype), device=choose_device(bench.device), requires_grad=True
    )
