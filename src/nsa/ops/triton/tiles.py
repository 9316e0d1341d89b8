"""Tiles of the kernels for every GPU: for 99 KiB of shared memory, and for Hopper's 227 KiB (`large`).

A tile is what a kernel is launched with: its sizes, warps and pipeline stages. `widest` is the larger of the sizes of a
key and a value head, as the kernels see them (padded).
"""

from __future__ import annotations

from collections.abc import Mapping

import torch

from nsa.geometry import BlockGeometry

Tile = Mapping[str, int]
MAX_UNION_TOKENS = 64  # of a tile that runs over a union of blocks: bits of a mask


def power_of_2(least: int) -> int:
    """The smallest power of two from `least` on."""
    return 1 << max(least - 1, 0).bit_length()


def forward_tile(dtype: torch.dtype, widest: int, large: bool) -> Tile:
    """Tile of attention's forward: BLOCK_M rows held, BLOCK_N keys a step."""
    if dtype == torch.float32:
        return {"BLOCK_M": 32, "BLOCK_N": 16 if widest > 128 else 32, "num_warps": 4, "num_stages": 1}
    if not large:
        stages = 1 if widest > 128 else 2
        return {"BLOCK_M": 64, "BLOCK_N": 32, "num_warps": 4, "num_stages": stages}
    if widest > 192:
        return {"BLOCK_M": 128, "BLOCK_N": 64, "num_warps": 8, "num_stages": 2}
    return {"BLOCK_M": 64, "BLOCK_N": 64, "num_warps": 4, "num_stages": 2 if widest > 128 else 3}


def dkdv_tile(dtype: torch.dtype, widest: int, large: bool) -> Tile:
    """Tile of dK and dV: BLOCK_N keys held, BLOCK_M rows a step."""
    if dtype == torch.float32:
        return {"BLOCK_M": 16, "BLOCK_N": 16 if widest > 128 else 32, "num_warps": 4, "num_stages": 1}
    if not large:
        return {"BLOCK_M": 32, "BLOCK_N": 32 if widest > 128 else 64, "num_warps": 4, "num_stages": 1}
    if widest > 192:
        return {"BLOCK_M": 64, "BLOCK_N": 64, "num_warps": 8, "num_stages": 2}
    rows = 32 if widest > 128 else 64 if widest > 64 else 128
    return {"BLOCK_M": rows, "BLOCK_N": 64, "num_warps": 4, "num_stages": 2}


def dq_tile(dtype: torch.dtype, widest: int, large: bool) -> Tile:
    """Tile of dQ: BLOCK_M rows held, BLOCK_N keys a step."""
    if dtype == torch.float32:
        return {"BLOCK_M": 16, "BLOCK_N": 16 if widest > 128 else 32, "num_warps": 4, "num_stages": 1}
    if not large:
        return {"BLOCK_M": 32 if widest > 128 else 64, "BLOCK_N": 32, "num_warps": 4, "num_stages": 1}
    if widest > 192:
        return {"BLOCK_M": 64, "BLOCK_N": 64, "num_warps": 8, "num_stages": 2}
    return {"BLOCK_M": 64, "BLOCK_N": 32 if widest > 128 else 64, "num_warps": 4, "num_stages": 2}


def forced_tile(dtype: torch.dtype, widest: int, group_size: int, large: bool) -> Tile:
    """Two or three steps are too few for a pipeline, which takes the room of another program, unless they are short."""
    tile = {**forward_tile(dtype, widest, large), "num_stages": 1}
    short = large and group_size >= 8 and tile["BLOCK_M"] == 64
    return {**tile, "BLOCK_N": 32, "num_stages": 2} if short else tile


def union_tile(tile: Tile, group_size: int, geometry: BlockGeometry) -> Tile:
    """A forward's or dQ's tile with room for a whole token, as many TOKENS as it holds, and at most a block a step."""
    rows = max(tile["BLOCK_M"], power_of_2(group_size))
    keys = min(tile["BLOCK_N"], max(16, power_of_2(geometry.select_block_size)))
    return {**tile, "BLOCK_M": rows, "BLOCK_N": keys, "TOKENS": min(MAX_UNION_TOKENS, rows // group_size)}


def scores_tile(dtype: torch.dtype, head_dim: int, group_size: int, num_keys: int, large: bool) -> Tile:
    """Tile of the scores: columns of HEADS heads (a power of two) by TOKENS tokens, BLOCK_N of the keys a step."""
    heads = power_of_2(group_size)
    if dtype == torch.float32:
        return {"HEADS": heads, "TOKENS": max(2, 32 // heads), "BLOCK_N": 16, "num_warps": 4, "num_stages": 1}
    if not large or head_dim > 128:
        return {"HEADS": heads, "TOKENS": max(4, 64 // heads), "BLOCK_N": 64, "num_warps": 4, "num_stages": 1}
    stages = 2 if num_keys <= 4096 else 3  # three programs a multiprocessor, or deeper reads once L2 is short of room
    return {"HEADS": heads, "TOKENS": max(4, 128 // heads), "BLOCK_N": 64, "num_warps": 4, "num_stages": stages}


def choice_tile(
    geometry: BlockGeometry, num_blocks: int, max_chunk: int = 256, whole: int = 256, slack: int = 2,
    registers: int | None = None,
) -> Tile:  # fmt: skip
    """Candidates a step (CHUNK) and quads of the list of a row of `num_blocks`: 0 up to `whole`, taken in one step.

    A bound that `slack` more candidates reach than are wanted is near enough. With 64 registers a thread 32 warps, as
    many as there may be of one warp each, fit a multiprocessor; long lists need more.
    """
    free = geometry.num_selected_blocks - geometry.num_init_blocks - geometry.num_local_blocks
    # Room for the best of the list and of a chunk, each in a quad of its own, the initial quads and the last.
    quads = power_of_2(-(-geometry.num_init_blocks // 4) + 2 * free + 1)
    chunk = max(128, power_of_2(num_blocks))
    return {
        "CHUNK": chunk if chunk <= whole else min(chunk, max_chunk),
        "QUADS": 0 if chunk <= whole else max(32, quads),
        "SLACK": slack,
        "PADDED": power_of_2(geometry.num_selected_blocks),
        "num_warps": 1,
        "maxnreg": registers or (64 if quads <= 64 else 96),
    }


def selected_forward_tile(dtype: torch.dtype, widest: int, large: bool) -> Tile:
    """Tile of the selected branch by blocks: BLOCK_M rows a step; all keys of a (sub-)block are held."""
    if dtype == torch.float32:
        return {"BLOCK_M": 16, "num_warps": 4, "num_stages": 1}
    if not large:
        return {"BLOCK_M": 32 if widest > 128 else 64, "num_warps": 4, "num_stages": 1}
    if widest > 192:
        return {"BLOCK_M": 64, "num_warps": 8, "num_stages": 1}
    if widest > 128:
        return {"BLOCK_M": 64, "num_warps": 4, "num_stages": 2}
    return {"BLOCK_M": 64, "num_warps": 4, "num_stages": 1, "maxnreg": 128}  # four programs a multiprocessor


def selected_backward_tile(dtype: torch.dtype, widest: int, large: bool, with_dq: bool) -> Tile:
    """Tile of its gradients, of dK and dV alone or `with_dq`: BLOCK_M rows a step."""
    if dtype == torch.float32:
        return {"BLOCK_M": 16, "num_warps": 4, "num_stages": 1}
    if not large:
        return {"BLOCK_M": 16 if widest > 128 else 32, "num_warps": 4, "num_stages": 1}
    if widest > 192:
        return {"BLOCK_M": 64, "num_warps": 8, "num_stages": 2}
    stages = 2 if with_dq else 3 if widest > 64 else 1
    return {"BLOCK_M": 32 if widest > 128 else 64, "num_warps": 4, "num_stages": stages}
