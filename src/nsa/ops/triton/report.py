"""Which kernels the Triton backend launches for given shapes, with their tiles and why."""

from __future__ import annotations

from typing import Any, NamedTuple

from torch import Tensor

from nsa.geometry import BlockGeometry
from nsa.ops.triton.dense import backward as dense_backward, forward as dense_forward
from nsa.ops.triton.dense.forced import hopper_forced_serves
from nsa.ops.triton.gpu import KEY_SIZES, VALUE_SIZES, has_large_shared_memory, hopper_serves
from nsa.ops.triton.selected import backward as selected_backward, forward as selected_forward, union as unions
from nsa.ops.triton.selected.backward_sm90 import hopper_select_backward_serves
from nsa.ops.triton.selected.forward_sm90 import hopper_select_forward_serves
from nsa.ops.triton.selected.invert import sub_block_ratio
from nsa.ops.triton.selected.union_sm90 import hopper_union_serves
from nsa.ops.triton.topk import choice

HOPPER = "a Hopper GPU, heads of 64 or 128, or keys of 192 with values of 128"
HOPPER_SCORES = "a Hopper GPU, keys of 64, 128 or 192, up to 32 heads a group"
HOPPER_STAGES = (("forward", "forward"), ("backward, keys", "key"), ("backward, queries", "query"))


class Kernel(NamedTuple):
    """One stage: what it computes, the kernels that do, their main tile, and why these."""

    stage: str
    kernels: str
    tile: dict[str, Any]
    reason: str


def kernels(q: Tensor, k: Tensor, v: Tensor, geometry: BlockGeometry, num_docs: int) -> list[Kernel]:
    """The kernels of `nsa_attention` and its backward for tensors of these shapes, dtype and device.

    Args:
        num_docs: documents of packed input, or sequences of the batch.
    """
    large = has_large_shared_memory(q)
    key = next(size for size in KEY_SIZES if size >= q.shape[3])
    value = next(size for size in VALUE_SIZES if size >= v.shape[3])
    size, group = (q, key, value, large), q.shape[2] // k.shape[2]
    memory = "Hopper's shared memory" if large else "99 KiB of shared memory"
    fits = f"{q.dtype}, {memory}" + ("" if (key, value) == (q.shape[3], v.shape[3]) else f", padded to {key}/{value}")
    forward, by_key, by_query = (
        dense_forward.forward_tile(*size),
        dense_backward.key_tile(*size),
        dense_backward.query_tile(*size),
    )
    loads = "boxes" if by_key["BLOCK_M"] % group == 0 else "rows"
    reckoned = (q.shape[0] * q.shape[1], num_docs, group, geometry)
    block = geometry.select_block_size // sub_block_ratio(geometry.select_block_size)
    found = []
    # What the kernels see once heads are padded.
    fitting = q[..., :1].expand(*q.shape[:3], key), v[..., :1].expand(*v.shape[:3], value)
    hopper = hopper_serves(*fitting)
    for stage in ("compressed", "window"):
        if hopper:
            found += [Kernel(f"{stage} {what}", f"hopper_{name}", {}, HOPPER) for what, name in HOPPER_STAGES]
            continue
        found.append(Kernel(f"{stage} forward", "dense_forward", forward, fits))
        found.append(Kernel(f"{stage} backward, keys", "dense_key", by_key, f"{fits}, queries loaded as {loads}"))
        found.append(Kernel(f"{stage} backward, queries", "dense_query", by_query, fits))
    if choice.hopper_scores(fitting[0], group):
        found.append(Kernel("choice of blocks", "hopper_score, choice", {}, HOPPER_SCORES))
    else:
        scores = choice.score_tile(q, group, geometry.num_compressed(k.shape[1]), large)
        found.append(Kernel("choice of blocks", "score, choice", scores, fits))
    union = unions.union_pays(*reckoned, unions.forward_ratio(*fitting, group, geometry))
    if union and hopper_union_serves(*fitting, group, geometry):
        how, tile = "union, hopper_union_forward", {}
    elif union:
        how, tile = "union, union_forward", unions.fit_tile(forward, group, geometry)
    else:
        hopper = hopper_select_forward_serves(*fitting, block, peeled=True)
        by_block = "hopper_select_forward" if hopper else "select_forward"
        dense = "hopper_forward" if hopper_forced_serves(*fitting, group) else "forced_forward"
        how = f"{dense}, {by_block}, select_reduce"
        tile = {} if hopper else selected_forward.select_tile(*size)
    found.append(Kernel("selected forward and gated sum", how, tile, _why(union)))
    union = unions.union_pays(*reckoned, unions.backward_ratio(*fitting, group, geometry))
    hopper = hopper_select_backward_serves(*fitting, block)
    tile = {} if hopper else selected_backward.select_backward_tile(*size, queries=not union)
    by_block = "hopper_select_backward" if hopper else "select_backward"
    if union:
        hopper = hopper_union_serves(*fitting, group, geometry)
        queries = "hopper_union_query" if hopper else "union_query"
        how = f"union, {queries}, {by_block}, select_key_reduce"
    else:
        how = f"{by_block}, select_query_reduce, select_key_reduce"
    found.append(Kernel("selected backward", how, tile, _why(union)))
    found.append(Kernel("gates backward", "gate_backward", {}, fits))
    return found


def _why(union: bool) -> str:
    if union:
        return "neighbours choose from few blocks at this length, so that tiles run over the union of theirs"
    return "tokens choose from many blocks at this length, so that blocks run over the tokens that chose them"
