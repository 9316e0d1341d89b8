"""Checks of everything that enters the operator; each error names the numbers and the remedy.

Shape and dtype checks cost no device work. The contents of `cu_seqlens` are read only where that needs no wait for a
device, on the CPU; elsewhere the kernels stay inside their buffers and leave rows of no document at zero.
"""

from __future__ import annotations

from itertools import pairwise

import torch
from torch import Tensor

from nsa.geometry import BlockGeometry


def check_tensor(name: str, x: Tensor, dims: str) -> None:
    """`dims` is the expected layout, for example "B T H Dk"."""
    num_dims = len(dims.split())
    if x.ndim != num_dims:
        raise ValueError(f"{name} must be [{dims.replace(' ', ', ')}], {num_dims} dimensions, not {list(x.shape)}")


def check_floating(**tensors: Tensor) -> None:
    """All of one floating dtype, on one device."""
    (first_name, first), *others = tensors.items()
    if first.dtype not in (torch.float16, torch.bfloat16, torch.float32, torch.float64):
        raise ValueError(f"{first_name} must be fp16, bf16, fp32 or fp64, not {first.dtype}")
    for name, x in others:
        if x.dtype != first.dtype:
            raise ValueError(f"{name} is {x.dtype} but {first_name} is {first.dtype}; cast them to one dtype")
        if x.device != first.device:
            raise ValueError(f"{name} is on {x.device} but {first_name} is on {first.device}; move them to one device")


def check_heads(q: Tensor, k: Tensor, k_name: str = "k") -> None:
    """Query heads `[.., H, Dk]` that divide into groups, one for each key head, of one head size."""
    num_heads, num_kv_heads = q.shape[2], k.shape[2]
    if num_kv_heads == 0 or num_heads % num_kv_heads:
        raise ValueError(
            f"the {num_heads} query heads must be a multiple of the {num_kv_heads} key/value heads of {k_name}"
        )
    if q.shape[3] != k.shape[3]:
        raise ValueError(f"q has head size {q.shape[3]} but {k_name} has {k.shape[3]}; they are multiplied")


def check_keys(q: Tensor, k: Tensor, v: Tensor, names: tuple[str, str] = ("k", "v")) -> None:
    """Layout, dtype, heads and head sizes of one branch's queries, keys and values."""
    check_tensor("q", q, "B T H Dk")
    check_tensor(names[0], k, "B T Hkv Dk")
    check_tensor(names[1], v, "B T Hkv Dv")
    check_floating(q=q, **{names[0]: k, names[1]: v})
    if k.shape[:3] != v.shape[:3]:
        raise ValueError(
            f"{names[0]} is {list(k.shape)} but {names[1]} is {list(v.shape)}; all but the last size must agree"
        )
    if q.shape[0] != k.shape[0]:
        raise ValueError(f"q has batch {q.shape[0]} but {names[0]} has batch {k.shape[0]}")
    check_heads(q, k, names[0])


def check_length(name: str, x: Tensor, expected: int, why: str) -> None:
    """`why` says where the expected number of tokens comes from."""
    if x.shape[1] != expected:
        raise ValueError(f"{name} has {x.shape[1]} tokens, expected {expected}: {why}")


def check_cu_seqlens(cu_seqlens: Tensor | None, x: Tensor, name: str = "q") -> None:
    """Document bounds of packed input against the tensor that they cut."""
    if cu_seqlens is None:
        return
    if x.shape[0] != 1:
        raise ValueError(
            f"packed input (cu_seqlens) needs batch 1, but {name} has batch {x.shape[0]}; "
            f"flatten the batch to [1, B*T, ...] and add the row bounds to cu_seqlens"
        )
    if cu_seqlens.ndim != 1 or cu_seqlens.numel() < 2 or cu_seqlens.dtype != torch.int32:
        raise ValueError(f"cu_seqlens must be int32 [documents + 1], not {cu_seqlens.dtype} {list(cu_seqlens.shape)}")
    if cu_seqlens.device != x.device:
        raise ValueError(f"cu_seqlens is on {cu_seqlens.device} but {name} is on {x.device}; move it there")
    if cu_seqlens.device.type != "cpu" or torch.compiler.is_compiling():
        return
    bounds = cu_seqlens.tolist()
    if bounds[0] != 0 or bounds[-1] != x.shape[1]:
        raise ValueError(
            f"cu_seqlens runs from {bounds[0]} to {bounds[-1]} but {name} has {x.shape[1]} tokens; it must start at 0 "
            f"and end at {x.shape[1]} (give padding at the end a document of its own)"
        )
    for i, (start, end) in enumerate(pairwise(bounds)):
        if end < start:
            raise ValueError(f"cu_seqlens must not decrease, but entry {i + 1} is {end} after {start}")


def count_compressed(cu_seqlens: Tensor, geometry: BlockGeometry) -> int:
    """Compressed tokens of packed documents together; reads `cu_seqlens` on the host."""
    bounds = cu_seqlens.tolist()
    return sum(geometry.num_compressed(end - start) for start, end in pairwise(bounds))


def check_compressed(k_cmp: Tensor, total: int, geometry: BlockGeometry, cu_seqlens: Tensor | None) -> None:
    """`k_cmp` must hold the compressed tokens of `total` tokens; packed input may bring unused rows at the end."""
    if cu_seqlens is None:
        expected = geometry.num_compressed(total)
        # Worded only when it is raised: a compiler that formats a length compiles for that length alone.
        if k_cmp.shape[1] != expected:
            raise ValueError(
                f"k_cmp has {k_cmp.shape[1]} tokens, expected {expected}: blocks of {geometry.compress_block_size} "
                f"every {geometry.compress_stride} over {total} tokens"
            )
        return
    if cu_seqlens.device.type != "cpu" or torch.compiler.is_compiling():
        return
    least = count_compressed(cu_seqlens, geometry)
    if k_cmp.shape[1] < least:
        raise ValueError(f"k_cmp has {k_cmp.shape[1]} tokens but the packed documents have {least} compressed tokens")
