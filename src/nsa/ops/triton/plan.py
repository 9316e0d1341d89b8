"""Which kernels run, with which tiles and why: one frozen plan for a call's shapes and a device.

`make_plan` is the only place that decides. The functions around the kernels take their stage of a plan, the routing
report prints it, and who wants other kernels than those planned passes another plan: one for another `Device`, or this
one with stages replaced.

    >>> shapes = Shapes(1, 8192, 64, 4, 128, 128, torch.bfloat16, BlockGeometry(), num_docs=1, num_compressed=511)
    >>> make_plan(shapes, Device((9, 0), 232448, 132, 150 * 10**9)).window.forward.kernels
    ('dense_forward_sm90',)
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import dataclass
from functools import lru_cache
from typing import NamedTuple

import torch
from torch import Tensor

from nsa.geometry import BlockGeometry
from nsa.ops.triton import tiles
from nsa.ops.triton.dense import dkdv_sm90
from nsa.ops.triton.gpu import KEY_SIZES, Device, fitting_size, read_device
from nsa.ops.triton.selected import panels_sm90, union_dq_sm90, union_sm90
from nsa.ops.triton.selected.invert import sub_block_ratio
from nsa.ops.triton.sm90 import KEYS, ROWS
from nsa.ops.triton.tiles import Tile
from nsa.ops.triton.topk import scores_sm90

SM90_HEADS = ((64, 64), (128, 128), (192, 128))  # sizes of keys and values that Hopper's own kernels take
MAX_SM90_SCORES_GROUP = 32
GATE_ELEMENTS = 4096  # of a program of the gates' gradients
MAX_SPLIT_BYTES = 512 * 2**20
TOPK_SCRATCH_BYTES = FORWARD_SCRATCH_BYTES = 2**31
# Large chunks give blocks more rows, so that fewer items share them. This is 1.34 GiB: three chunks for a group of 16
# heads of 128 at 65,536 tokens, whose whole step then takes less than 1.3 times dense attention's memory.
BACKWARD_SCRATCH_BYTES = 171 * 2**23

UNION_ROWS = 64  # rows of a tile, about; what `union_pays` reckons with
# Blocks of the unions over blocks of the lists, in full tiles of UNION_ROWS rows: below these the union is faster
# (H200, docs/kernels.md). Hopper's kernel shares loads among more tokens, the more so the fewer heads a group has.
FORWARD_RATIO, SM90_FORWARD_RATIO = 3.0, 3.1
SM90_FORWARD_RATIO_OF_FEW_HEADS, FEW_HEADS = 3.6, 8
# With heads of 64 blocks by tokens are never slower on Hopper.
DQ_RATIO, SM90_DQ_RATIO, SM90_DQ_RATIO_OF_64 = 2.0, 1.7, 0.0

SM90_REASON = "a Hopper GPU, heads of 64 or 128, or keys of 192 with values of 128"
SM90_SCORES_REASON = f"a Hopper GPU, keys of 64, 128 or 192, up to {MAX_SM90_SCORES_GROUP} heads a group"
BY_UNION = "neighbours choose from few blocks at this length, so that tiles run over the union of theirs"
BY_BLOCK = "tokens choose from many blocks at this length, so that blocks run over the tokens that chose them"


class Shapes(NamedTuple):
    """What a plan asks of a call's tensors.

    Attributes:
        batch, tokens, num_heads, num_kv_heads: B, T, H, Hkv of the queries and keys.
        head_dim, value_head_dim: Dk and Dv as the caller has them; kernels see them padded (`key_size`, `value_size`).
        dtype: of all tensors.
        geometry: block sizes and counts.
        num_docs: documents of packed input, or sequences of the batch.
        num_compressed: N, compressed tokens of a batch row.
        q_start: position of the first query.

    Raises:
        ValueError: a head is larger than the kernels take.
    """

    batch: int
    tokens: int
    num_heads: int
    num_kv_heads: int
    head_dim: int
    value_head_dim: int
    dtype: torch.dtype
    geometry: BlockGeometry
    num_docs: int
    num_compressed: int = 0
    q_start: int = 0

    @property
    def group_size(self) -> int:
        return self.num_heads // self.num_kv_heads

    @property
    def key_size(self) -> int:
        return fitting_size(self.head_dim, KEY_SIZES)

    @property
    def value_size(self) -> int:
        return fitting_size(self.value_head_dim)


@dataclass(frozen=True)
class Stage:
    """What runs one stage.

    Attributes:
        kernels: their names, first the one that does the work, then those that prepare lists for it or add up what it
            leaves; `_sm90` are Hopper's own.
        tile: what the first is launched with: sizes, warps, pipeline stages, and the programs of a persistent kernel.
        reason: why these.
        scratch_bytes: most bytes of memory that the stage takes for a while; long input goes chunk by chunk.
    """

    kernels: tuple[str, ...]
    tile: Tile
    reason: str
    scratch_bytes: int = 0

    @property
    def is_sm90(self) -> bool:
        """Whether Hopper's own kernel does the work."""
        return self.kernels[0].endswith("_sm90")


@dataclass(frozen=True)
class Dense:
    """The compressed or the window branch.

    Attributes:
        splits: parts of the rows whose dK and dV are apart until they are added.
    """

    forward: Stage
    dkdv: Stage
    dq: Stage
    splits: int


@dataclass(frozen=True)
class TopK:
    """The choice of blocks.

    Attributes:
        pooled: scores are added up block by block before they are stored, not key by key.
    """

    scores: Stage
    choice: Stage
    pooled: bool


@dataclass(frozen=True)
class Selected:
    """The selected branch.

    Attributes:
        forced: the forced blocks apart from the others; None where they are not.
        forward: all other blocks, or all.
        dq: dQ by unions; None where `backward` computes it.
        backward: dK and dV, and dQ.
    """

    forced: Stage | None
    forward: Stage
    dq: Stage | None
    backward: Stage


@dataclass(frozen=True)
class Plan:
    """What runs `nsa_attention`, its backward, and its stages alone.

    Attributes:
        compressed, window: the dense branches.
        topk: the choice of blocks.
        selected: the selected branch of the whole operator, whose lists are its own choice.
        listed: the selected branch alone, for any lists: they need not hold the forced blocks, and may hold later ones.
        gates: the gates' gradients.
    """

    compressed: Dense
    window: Dense
    topk: TopK
    selected: Selected
    listed: Selected
    gates: Stage

    def stages(self) -> Iterator[tuple[str, Stage]]:
        """Names and stages of the whole operator, in the order in which they run."""
        for name, dense in (("compressed", self.compressed), ("window", self.window)):
            yield f"{name} forward", dense.forward
            yield f"{name} backward, keys", dense.dkdv
            yield f"{name} backward, queries", dense.dq
        yield "scores of blocks", self.topk.scores
        yield "choice of blocks", self.topk.choice
        if self.selected.forced:
            yield "selected forward, forced blocks", self.selected.forced
        yield "selected forward and gated sum", self.selected.forward
        if self.selected.dq:
            yield "selected backward, queries", self.selected.dq
        yield "selected backward, keys" if self.selected.dq else "selected backward", self.selected.backward
        yield "gates backward", self.gates


def plan_call(
    q: Tensor, k: Tensor, v: Tensor, geometry: BlockGeometry, cu_seqlens: Tensor | None,
    num_compressed: int = 0, q_start: int = 0,
) -> Plan:  # fmt: skip
    """The plan for tensors of these shapes, dtype and device; their contents do not matter.

    Raises:
        ValueError: a head is larger than the kernels take.
    """
    batch, tokens, heads, head_dim = q.shape
    num_docs = batch if cu_seqlens is None else cu_seqlens.shape[0] - 1
    sizes = (batch, tokens, heads, k.shape[2], head_dim, v.shape[3])
    return make_plan(Shapes(*sizes, q.dtype, geometry, num_docs, num_compressed, q_start), read_device(q.device))


@lru_cache(maxsize=1024)
def make_plan(shapes: Shapes, device: Device, unions: bool | None = None) -> Plan:
    """The plan for these shapes on this device.

    Args:
        unions: whether the selected branch runs over unions of blocks; None where that pays.

    Raises:
        ValueError: a head is larger than the kernels take.
    """
    padded = tiles.power_of_2(shapes.value_head_dim)
    gates = {"PADDED": padded, "ROWS": max(1, GATE_ELEMENTS // padded)}
    return Plan(
        compressed=_plan_dense(shapes, device, windowed=False),
        window=_plan_dense(shapes, device, windowed=True),
        topk=_plan_topk(shapes, device),
        selected=_plan_selected(shapes, device, unions),
        listed=Selected(
            None,
            _plan_blocks(shapes, device, sm90=False, why="lists may be any"),
            None,
            _plan_blocks_backward(shapes, device, with_dq=True, why="lists may be any"),
        ),
        gates=Stage(("gate_backward",), gates, _reason(shapes, device)),
    )


def _fits_sm90(shapes: Shapes, device: Device, value_size: int | None = None) -> bool:
    """Whether Hopper's own kernels take such heads; their results differ from the others' by rounding only."""
    sizes = (shapes.key_size, shapes.value_size if value_size is None else value_size)
    return device.is_hopper and shapes.dtype in (torch.float16, torch.bfloat16) and sizes in SM90_HEADS


def _reason(shapes: Shapes, device: Device) -> str:
    """Why a kernel for every GPU has the tile that it has."""
    memory = "Hopper's shared memory" if device.has_large_shared_memory else "99 KiB of shared memory"
    sizes = (shapes.key_size, shapes.value_size)
    padded = "" if sizes == (shapes.head_dim, shapes.value_head_dim) else f", padded to {sizes[0]}/{sizes[1]}"
    return f"{shapes.dtype}, {memory}{padded}"


def _what(shapes: Shapes, device: Device) -> tuple[torch.dtype, int, bool]:
    """What most tiles depend on."""
    return shapes.dtype, max(shapes.key_size, shapes.value_size), device.has_large_shared_memory


def _plan_dense(shapes: Shapes, device: Device, windowed: bool) -> Dense:
    if _fits_sm90(shapes, device):
        programs = {"programs": device.num_multiprocessors}
        return Dense(
            Stage(("dense_forward_sm90",), programs, SM90_REASON),
            Stage(("dense_dkdv_sm90",), {}, SM90_REASON),
            Stage(("dense_dq_sm90",), programs, SM90_REASON),
            1 if windowed else _num_splits(shapes, device, 2 * dkdv_sm90.KEYS.value),
        )
    reason, what = _reason(shapes, device), _what(shapes, device)
    by_key = tiles.dkdv_tile(*what)
    # A tile of whole tokens is a box of q and dout; other group sizes are loaded row by row.
    boxes = by_key["BLOCK_M"] % shapes.group_size == 0
    return Dense(
        Stage(("dense_forward",), tiles.forward_tile(*what), reason),
        Stage(("dense_dkdv",), {**by_key, "TMA": boxes}, reason),
        Stage(("dense_dq",), tiles.dq_tile(*what), reason),
        1 if windowed else _num_splits(shapes, device, by_key["BLOCK_N"]),
    )


def _num_splits(shapes: Shapes, device: Device, block_n: int) -> int:
    """Into how many parts the rows that see compressed keys are cut, so that all multiprocessors have even work."""
    keys = shapes.batch * shapes.num_kv_heads * shapes.num_compressed
    if keys == 0:
        return 1
    programs = shapes.batch * shapes.num_kv_heads * -(-shapes.num_compressed // block_n)
    wanted = -(-16 * device.num_multiprocessors // programs)
    longest = -(-shapes.tokens * shapes.group_size // 1024)
    return max(1, min(wanted, longest, MAX_SPLIT_BYTES // (4 * keys * (shapes.key_size + shapes.value_size))))


def _plan_topk(shapes: Shapes, device: Device) -> TopK:
    geometry, group = shapes.geometry, shapes.group_size
    # Values play no part. One wide head a group leaves Hopper's kernel no room.
    fits = _fits_sm90(shapes, device, value_size=min(shapes.key_size, 128))
    if fits and (2 if shapes.key_size > 64 else 1) <= group <= MAX_SM90_SCORES_GROUP:
        tile, block_n = {"TOKENS": scores_sm90.tile_tokens(group), "programs": device.num_multiprocessors}, KEYS.value
        scores = Stage(("scores_sm90",), tile, SM90_SCORES_REASON)
    else:
        large = device.has_large_shared_memory
        tile = tiles.scores_tile(shapes.dtype, shapes.key_size, group, shapes.num_compressed, large)
        scores, block_n = Stage(("scores",), tile, _reason(shapes, device)), tile["BLOCK_N"]
    span, reach = geometry.strides_per_select, geometry.compress_block_size // geometry.compress_stride
    pooled = block_n % span == 0 and span & (span - 1) == 0 and reach <= span + 1
    num_blocks = geometry.num_select_blocks(shapes.q_start + shapes.tokens)
    # Keys' sums, many for a block, leave no registers for large steps.
    tile = tiles.choice_tile(geometry, num_blocks, max_chunk=256 if pooled else 128)
    reason = f"{num_blocks} blocks at most, searched {'in chunks' if tile['QUADS'] else 'at once'}"
    return TopK(scores, Stage(("choice",), tile, reason, device.scratch_bytes(TOPK_SCRATCH_BYTES)), pooled)


def _plan_selected(shapes: Shapes, device: Device, unions: bool | None) -> Selected:
    forward_ratio, dq_ratio = _union_ratios(shapes, device)
    forward_by_union = union_pays(shapes, forward_ratio) if unions is None else unions
    dq_by_union = union_pays(shapes, dq_ratio) if unions is None else unions
    forced: Stage | None = None
    dq: Stage | None = None
    if forward_by_union:
        forward = _plan_union(shapes, device, "union_forward", tiles.forward_tile, union_sm90.tile_tokens)
    else:
        forced = _plan_forced(shapes, device)
        forward = _plan_blocks(shapes, device, _fits_sm90_panels(shapes, device), BY_BLOCK)
    if dq_by_union:
        dq = _plan_union(shapes, device, "union_dq", tiles.dq_tile, union_dq_sm90.tile_tokens)
    backward = _plan_blocks_backward(shapes, device, not dq_by_union, BY_BLOCK)
    return Selected(forced, forward, dq, backward)


def union_pays(shapes: Shapes, ratio: float) -> bool:
    """Whether the union of a tile's blocks is short, for documents of average length and independent choices.

    Args:
        ratio: see FORWARD_RATIO.
    """
    geometry, group = shapes.geometry, shapes.group_size
    tokens = min(tiles.MAX_UNION_TOKENS, UNION_ROWS // group)
    blocks = max(1, shapes.batch * shapes.tokens // max(1, shapes.num_docs) // geometry.select_block_size)
    if tokens == 0 or blocks > 64 * geometry.num_selected_blocks:
        return False
    chosen = unions = 0.0
    for seen in range(1, blocks + 1, max(1, blocks // 32)):  # as many tokens see each number of blocks; 32 of them do
        listed = min(seen, geometry.num_selected_blocks)
        chosen += listed
        unions += seen * (1 - (1 - listed / seen) ** tokens)
    return unions * UNION_ROWS < ratio * chosen * tokens * group


def _union_ratios(shapes: Shapes, device: Device) -> tuple[float, float]:
    """Below which ratios unions are the faster forward and the faster way to dQ."""
    if not _fits_sm90_unions(shapes, device):
        return FORWARD_RATIO, DQ_RATIO
    forward = SM90_FORWARD_RATIO_OF_FEW_HEADS if shapes.group_size <= FEW_HEADS else SM90_FORWARD_RATIO
    return forward, SM90_DQ_RATIO if shapes.key_size > 64 else SM90_DQ_RATIO_OF_64


def _fits_sm90_unions(shapes: Shapes, device: Device) -> bool:
    """Whether Hopper's own kernels run over unions: a block is one step, a group of warps holds whole tokens."""
    whole = union_sm90.MIN_HEADS <= shapes.group_size <= ROWS.value
    return _fits_sm90(shapes, device) and shapes.geometry.select_block_size == KEYS.value and whole


def _plan_union(
    shapes: Shapes, device: Device, name: str, tile_of: Callable[..., Tile], sm90_tokens: Callable[[int], int]
) -> Stage:
    group = shapes.group_size
    if _fits_sm90_unions(shapes, device):
        tile = {"TOKENS": sm90_tokens(group), "programs": device.num_multiprocessors}
        return Stage((f"{name}_sm90", "union"), tile, f"{SM90_REASON}; {BY_UNION}")
    tile = tiles.union_tile(tile_of(*_what(shapes, device)), group, shapes.geometry)
    return Stage((name, "union"), tile, f"{_reason(shapes, device)}; {BY_UNION}")


def _plan_forced(shapes: Shapes, device: Device) -> Stage:
    # Hopper's kernel would spill where keys have a tail and rows are copied.
    if _fits_sm90(shapes, device) and (shapes.key_size == shapes.value_size or ROWS.value % shapes.group_size == 0):
        return Stage(("dense_forward_sm90",), {"programs": device.num_multiprocessors}, SM90_REASON)
    dtype, widest, large = _what(shapes, device)
    tile = tiles.forced_tile(dtype, widest, shapes.group_size, large)
    return Stage(("forced_forward",), tile, _reason(shapes, device))


def _fits_sm90_panels(shapes: Shapes, device: Device) -> bool:
    """Whether Hopper's own kernels run the selected branch block by block."""
    block = shapes.geometry.select_block_size
    return _fits_sm90(shapes, device) and block // sub_block_ratio(block) == panels_sm90.BLOCK.value


def _plan_blocks(shapes: Shapes, device: Device, sm90: bool, why: str) -> Stage:
    """Block by block; Hopper's own kernel takes blocks before their tokens alone, as forced ones apart leave them."""
    scratch = device.scratch_bytes(FORWARD_SCRATCH_BYTES)
    if sm90:
        return Stage(("selected_forward_sm90", "selected_reduce"), {}, f"{SM90_REASON}; {why}", scratch)
    tile = tiles.selected_forward_tile(*_what(shapes, device))
    return Stage(("selected_forward", "selected_reduce"), tile, f"{_reason(shapes, device)}; {why}", scratch)


def _plan_blocks_backward(shapes: Shapes, device: Device, with_dq: bool, why: str) -> Stage:
    scratch = device.scratch_bytes(BACKWARD_SCRATCH_BYTES)
    sums = ("selected_dq_reduce", "selected_dkdv_reduce") if with_dq else ("selected_dkdv_reduce",)
    if _fits_sm90_panels(shapes, device):
        return Stage(("selected_backward_sm90", *sums), {}, f"{SM90_REASON}; {why}", scratch)
    tile = tiles.selected_backward_tile(*_what(shapes, device), with_dq=with_dq)
    return Stage(("selected_backward", *sums), tile, f"{_reason(shapes, device)}; {why}", scratch)
