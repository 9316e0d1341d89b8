"""Compile every Triton kernel for a GPU that is not here, as its wrapper would launch it; prints one JSON line each.

    PYTHONPATH=src python tests/ops/triton_compile.py 90 bfloat16 16 128 0  # architecture, dtype, G, head size, packed

The wrappers run on CPU tensors; a launch compiles its kernel for the architecture and does not run it.
"""

from __future__ import annotations

import json
import sys
from dataclasses import replace
from typing import Any

import torch
from triton.backends.compiler import GPUTarget
from triton.runtime import driver
from triton.runtime.jit import JITFunction

from nsa.geometry import BlockGeometry
from nsa.ops import triton as backend
from nsa.ops.paged import PagedView
from nsa.ops.triton.gpu import Device
from nsa.ops.triton.plan import Shapes, make_plan
from nsa.ops.triton.tiles import choice_tile


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


def compile_only(architecture: int) -> list[tuple[str, Any]]:
    """Make every launch compile its kernel instead, and collect name and kernel."""
    kernels: list[tuple[str, Any]] = []
    driver.set_active(NoGpuDriver(architecture))
    launch = JITFunction.run

    def run(self: JITFunction, *args: Any, grid: Any, warmup: bool, **options: Any) -> None:
        kernels.append((self.__name__, launch(self, *args, grid=grid, warmup=True, **options)))

    JITFunction.run = run
    return kernels


def launch_all(architecture: int, dtype: torch.dtype, group_size: int, head_dim: int, packed: bool) -> None:
    """Values have the size of keys, 128 at most."""
    geometry, T = BlockGeometry(), 2048
    q = torch.zeros(1, T, group_size, head_dim, dtype=dtype)
    k = torch.zeros(1, T, 1, head_dim, dtype=dtype)
    v = torch.zeros(1, T, 1, min(head_dim, 128), dtype=dtype)
    cu = torch.tensor([0, 100, T], dtype=torch.int32) if packed else None
    N = geometry.num_compressed(T)
    sizes = (1, T, group_size, 1, head_dim, v.shape[3], dtype, geometry, 2 if packed else 1, N)
    shared_memory = 232448 if architecture >= 90 else 101376
    device = Device(divmod(architecture, 10), shared_memory, num_multiprocessors=1, total_memory=2**40)
    plan = make_plan(Shapes(*sizes), device)
    tail = (cu, geometry.as_tuple())
    k_cmp, v_cmp = (backend.mean_pool_forward(x, *tail, geometry.num_compressed(T)) for x in (k, v))
    backend.mean_pool_backward(k_cmp, *tail, T)
    out, lse = backend.compressed_attention_forward(q, k_cmp, v_cmp, *tail, 0, 1.0, plan=plan)
    backend.compressed_attention_backward(out, lse, q, k_cmp, v_cmp, out, lse, *tail, 0, 1.0, plan=plan)
    blocks = backend.select_blocks_forward(q, k_cmp, lse, *tail, 0, 1.0, plan=plan)
    in_chunks = choice_tile(geometry, geometry.num_select_blocks(T), whole=0)  # as for more blocks
    plan = replace(plan, topk=replace(plan.topk, choice=replace(plan.topk.choice, tile=in_chunks)))
    backend.select_blocks_forward(q, k_cmp, lse, *tail, 0, 1.0, plan=plan)
    out, lse = backend.selected_attention_forward(q, k, v, blocks, *tail, 0, 1.0, plan=plan)
    backend.selected_attention_backward(out, lse, q, k, v, out, lse, blocks, *tail, 0, 1.0, plan=plan)
    out, lse = backend.window_attention_forward(q, k, v, *tail, 0, 0, 1.0, plan=plan)
    backend.window_attention_backward(out, lse, q, k, v, out, lse, *tail, 0, 0, 1.0, plan=plan)
    tensors = (q, k, v, k_cmp, v_cmp, k, v, q[..., :3].contiguous())
    whole = (cu, geometry.as_tuple(), 1.0)
    for unions in (False, True):
        plan = make_plan(Shapes(*sizes), device, unions)
        out, *saved = backend.attention_forward(*tensors, *whole, plan=plan)
        backend.attention_backward(out, *tensors, *saved, *whole, plan=plan)
    if packed:
        launch_decode(q[:, :1], k, v, geometry)


def launch_decode(q: torch.Tensor, k: torch.Tensor, v: torch.Tensor, geometry: BlockGeometry) -> None:
    """A step of one query and one of eight, with and without a ring for the window; Hopper launches early."""
    page, each = geometry.select_block_size, geometry.strides_per_select
    pages = [x.reshape(-1, 1, page, x.shape[3]) for x in (k, v)]
    compressed = [x[:, :, :each].contiguous() for x in pages]
    rings = [x[:, : geometry.window_size + 8].transpose(1, 2).contiguous() for x in (k, v)]
    table, lengths = torch.zeros(1, pages[0].shape[0], dtype=torch.int32), torch.zeros(1, dtype=torch.int32)
    early = driver.active.get_current_target().arch >= 90
    for queries, ring, overlaps in ((1, False, early), (8, True, False)):
        view = PagedView(*pages, *compressed, table, lengths, *(rings if ring else ()))
        query = q.repeat(1, queries, 1, 1)
        plan = backend.decode.plan_decode(query, 1, v.shape[3], table.shape[1], geometry)
        gates = query[..., :3].contiguous()
        step = (query, gates, *view, geometry.as_tuple(), 1.0, plan._replace(overlaps=overlaps))
        backend.decode.paged_decode_forward(*step)
    if q.dtype == torch.float16:  # the widest in fp32 as well
        launch_decode(*(x.float().repeat(1, 1, 1, 256 // x.shape[3]) for x in (q, k, v)), geometry)


if __name__ == "__main__":
    architecture, dtype, group_size, head_dim, packed = sys.argv[1:]
    kernels = compile_only(int(architecture))
    launch_all(int(architecture), getattr(torch, dtype), int(group_size), int(head_dim), packed == "1")
    for name, kernel in kernels:
        ptx = kernel.asm["ptx"]
        print(json.dumps({"kernel": name, "shared_bytes": kernel.metadata.shared, "wgmma": "wgmma" in ptx}))
