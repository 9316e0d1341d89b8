"""Compile every Triton kernel for a GPU that is not here, as its wrapper would launch it; prints one JSON line each.

    PYTHONPATH=src:tests python tests/ops/triton_compile.py 90 bfloat16 16 128 0

Arguments are architecture, dtype, query heads a group, head size and whether documents are packed. The
wrappers run on CPU tensors; a launch compiles its kernel for the architecture and does not run it.
"""

from __future__ import annotations

import json
import sys
from dataclasses import replace
from typing import Any

import torch
from triton.runtime import driver

from ahead_of_time import compile_launches
from nsa.geometry import BlockGeometry
from nsa.ops import triton as backend
from nsa.ops.cache_view import PagedView
from nsa.ops.call import AttentionInputs, Call
from nsa.ops.triton.gpu import Device
from nsa.ops.triton.plan import Shapes, make_plan
from nsa.ops.triton.tiles import choice_tile


def compile_only(architecture: int) -> list[tuple[str, Any]]:
    """Make every launch compile its kernel instead, and collect name and kernel."""
    kernels = compile_launches(architecture)
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
    plan, call = make_plan(Shapes(*sizes), device), Call(geometry, 1.0, cu)
    k_cmp, v_cmp = (backend.mean_pool_forward(x, cu, geometry, N) for x in (k, v))
    backend.mean_pool_backward(k_cmp, cu, geometry, T)
    out, lse = backend.compressed_attention_forward(q, k_cmp, v_cmp, call, plan)
    backend.compressed_attention_backward(out, lse, q, k_cmp, v_cmp, out, lse, call, plan)
    blocks = backend.select_blocks_forward(q, k_cmp, lse, call, plan)
    in_chunks = choice_tile(geometry, geometry.num_select_blocks(T), whole=0)  # as for more blocks
    plan = replace(plan, topk=replace(plan.topk, choice=replace(plan.topk.choice, tile=in_chunks)))
    backend.select_blocks_forward(q, k_cmp, lse, call, plan)
    out, lse = backend.selected_attention_forward(q, k, v, blocks, call, plan)
    backend.selected_attention_backward(out, lse, q, k, v, out, lse, blocks, call, plan)
    out, lse = backend.window_attention_forward(q, k, v, call, plan)
    backend.window_attention_backward(out, lse, q, k, v, out, lse, call, plan)
    inputs = AttentionInputs(q, k, v, k_cmp, v_cmp, k, v, q[..., :3].contiguous())
    for unions in (False, True):
        plan = make_plan(Shapes(*sizes), device, unions)
        out, branches = backend.attention_forward(inputs, call, plan)
        backend.attention_backward(out, inputs, branches, call, plan)
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
        backend.decode.paged_decode_forward(query, gates, view, geometry, 1.0, plan._replace(overlaps=overlaps))
    if q.dtype == torch.float16:  # the widest in fp32 as well
        launch_decode(*(x.float().repeat(1, 1, 1, 256 // x.shape[3]) for x in (q, k, v)), geometry)


if __name__ == "__main__":
    architecture, dtype, group_size, head_dim, packed = sys.argv[1:]
    kernels = compile_only(int(architecture))
    launch_all(int(architecture), getattr(torch, dtype), int(group_size), int(head_dim), packed == "1")
    for name, kernel in kernels:
        ptx = kernel.asm["ptx"]
        print(json.dumps({"kernel": name, "shared_bytes": kernel.metadata.shared, "wgmma": "wgmma" in ptx}))
