"""Which kernels run, with which tiles and why: one frozen plan for a call's shapes and a device.

`make_plan` is the only place that decides. The functions around the kernels take their stage of a plan, the routing
report prints it, and who wants other kernels than those planned passes another plan: one for another `Device`, or this
one with stages replaced.

    >>> shapes = Shapes(1, 8192, 64, 4, 128, 128, torch.bfloat16, BlockGeometry(), num_docs=1, num_compressed=511)
    >>> make_plan(shapes, Device((9, 0), 232448, 132, 150 * 10**9)).window.forward.kernels
    ('dense_forward_sm90',)
"""

from __future__ import annotations

from collections.abc import Iterator
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

UNION_ROWS = 64  # rows of a tile that `union_pays` assumes; the kernels' own tiles hold about as many
# Unions make tiles dense, but each row also attends to the blocks that only its neighbours chose. The ratio is blocks
# attended to by unions over blocks chosen, in full tiles of UNION_ROWS rows; below these unions were the faster way
# (H200, docs/kernels_log.md). Hopper's kernel shares loads among more tokens, the more so the fewer heads a group has.
FORWARD_RATIO, SM90_FORWARD_RATIO = 3.0, 3.1
SM90_FORWARD_RATIO_OF_FEW_HEADS, FEW_HEADS = 3.6, 8
# With heads of 64 blocks by tokens are never slower on Hopper.
DQ_RATIO, SM90_DQ_RATIO, SM90_DQ_RATIO_OF_64 = 2.0, 1.7, 0.0

SM90_REASON = "a Hopper GPU, fp16 or bf16, heads of 64 or 128, or keys of 192 with values of 128"
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
    planner = _Planner(shapes, device)
    return Plan(
        compressed=planner.dense(windowed=False),
        window=planner.dense(windowed=True),
        topk=planner.topk(),
        selected=planner.selected(unions),
        listed=planner.listed(),
        gates=planner.gates(),
    )


class _Planner:
    """Decides for one set of shapes and a device.

    Attributes:
        fits_sm90: Hopper's own kernels take such heads; their results differ from the others' by rounding only.
        programs: tile of a persistent kernel, whose programs are one for each multiprocessor.
        what: the dtype, the wider of the two heads, and whether shared memory is large: what most tiles depend on.
        reason: for the tiles of kernels for every GPU.
    """

    def __init__(self, shapes: Shapes, device: Device) -> None:
        self.shapes, self.device, self.group_size = shapes, device, shapes.group_size
        self.fits_sm90 = self.takes_heads(shapes.value_size)
        self.programs: Tile = {"programs": device.num_multiprocessors}
        large, sizes = device.has_large_shared_memory, (shapes.key_size, shapes.value_size)
        self.what = (shapes.dtype, max(sizes), large)
        padded = "" if sizes == (shapes.head_dim, shapes.value_head_dim) else f", padded to {sizes[0]}/{sizes[1]}"
        memory = "Hopper's shared memory" if large else "99 KiB of shared memory"
        self.reason = f"{shapes.dtype}, {memory}{padded}"

    def takes_heads(self, value_size: int) -> bool:
        narrow = self.shapes.dtype in (torch.float16, torch.bfloat16)
        return self.device.is_hopper and narrow and (self.shapes.key_size, value_size) in SM90_HEADS

    def stage(
        self, name: str, is_sm90: bool, sm90_tile: Tile, tile: Tile, why: str = "", others: tuple[str, ...] = (),
        scratch_bytes: int = 0,
    ) -> Stage:  # fmt: skip
        """A stage with Hopper's own kernel or with the one for every GPU, and `others` beside it."""
        reason = "; ".join(filter(None, (SM90_REASON if is_sm90 else self.reason, why)))
        kernels = (f"{name}_sm90" if is_sm90 else name, *others)
        return Stage(kernels, sm90_tile if is_sm90 else tile, reason, self.device.scratch_bytes(scratch_bytes))

    def dense(self, windowed: bool) -> Dense:
        by_key = tiles.dkdv_tile(*self.what)
        # A tile of whole tokens is a box of q and dout; other group sizes are loaded row by row.
        by_key = {**by_key, "TMA": by_key["BLOCK_M"] % self.group_size == 0}
        held_keys = 2 * dkdv_sm90.KEYS.value if self.fits_sm90 else by_key["BLOCK_N"]
        return Dense(
            self.stage("dense_forward", self.fits_sm90, self.programs, tiles.forward_tile(*self.what)),
            self.stage("dense_dkdv", self.fits_sm90, {}, by_key),
            self.stage("dense_dq", self.fits_sm90, self.programs, tiles.dq_tile(*self.what)),
            1 if windowed else self.num_splits(held_keys),
        )

    def num_splits(self, held_keys: int) -> int:
        """Into how many parts the rows that see compressed keys are cut, so that all multiprocessors have even work."""
        shapes = self.shapes
        heads = shapes.batch * shapes.num_kv_heads
        if heads * shapes.num_compressed == 0:
            return 1
        wanted = -(-16 * self.device.num_multiprocessors // (heads * -(-shapes.num_compressed // held_keys)))
        longest = -(-shapes.tokens * self.group_size // 1024)
        bytes_each = 4 * heads * shapes.num_compressed * (shapes.key_size + shapes.value_size)
        return max(1, min(wanted, longest, MAX_SPLIT_BYTES // bytes_each))

    def topk(self) -> TopK:
        geometry, key_size = self.shapes.geometry, self.shapes.key_size
        # Values play no part. One wide head a group leaves Hopper's kernel no room.
        takes_group = (2 if key_size > 64 else 1) <= self.group_size <= MAX_SM90_SCORES_GROUP
        is_sm90 = self.takes_heads(min(key_size, 128)) and takes_group
        dtype, _, large = self.what
        tile = tiles.scores_tile(dtype, key_size, self.group_size, self.shapes.num_compressed, large)
        sm90_tile = {"TOKENS": scores_sm90.tile_tokens(self.group_size), **self.programs}
        block_n = scores_sm90.KEYS.value if is_sm90 else tile["BLOCK_N"]
        span, reach = geometry.strides_per_select, geometry.compress_block_size // geometry.compress_stride
        pooled = block_n % span == 0 and span & (span - 1) == 0 and reach <= span + 1
        num_blocks = geometry.num_select_blocks(self.shapes.q_start + self.shapes.tokens)
        # Keys' sums, many for a block, leave no registers for large steps.
        choice = tiles.choice_tile(geometry, num_blocks, max_chunk=256 if pooled else 128)
        why = f"{num_blocks} blocks at most, searched {'in chunks' if choice['QUADS'] else 'at once'}"
        scratch_bytes = self.device.scratch_bytes(TOPK_SCRATCH_BYTES)
        scores = self.stage("scores", is_sm90, sm90_tile, tile, f"{self.group_size} heads a group")
        return TopK(scores, Stage(("choice",), choice, why, scratch_bytes), pooled)

    def selected(self, unions: bool | None) -> Selected:
        if unions is None:
            by_union, dq_by_union = (union_pays(self.shapes, ratio) for ratio in self.union_ratios())
        else:
            by_union = dq_by_union = unions
        if by_union:
            tokens, tile = union_sm90.tile_tokens(self.group_size), tiles.forward_tile(*self.what)
            forced, forward = None, self.union("union_forward", tokens, tile)
        else:
            forced, forward = self.forced(), self.blocks_forward(self.fits_sm90_blocks(), BY_BLOCK)
        if not dq_by_union:
            return Selected(forced, forward, None, self.blocks_backward(True, BY_BLOCK))
        dq = self.union("union_dq", union_dq_sm90.tile_tokens(self.group_size), tiles.dq_tile(*self.what))
        return Selected(forced, forward, dq, self.blocks_backward(False))

    def union_ratios(self) -> tuple[float, float]:
        """Below which ratios unions are the faster forward and the faster way to dQ."""
        if not self.fits_sm90_unions():
            return FORWARD_RATIO, DQ_RATIO
        forward = SM90_FORWARD_RATIO_OF_FEW_HEADS if self.group_size <= FEW_HEADS else SM90_FORWARD_RATIO
        return forward, SM90_DQ_RATIO if self.shapes.key_size > 64 else SM90_DQ_RATIO_OF_64

    def fits_sm90_unions(self) -> bool:
        """Whether a block is one step of Hopper's own kernels and a group of warps holds whole tokens."""
        whole = union_sm90.MIN_HEADS <= self.group_size <= ROWS.value
        return self.fits_sm90 and self.shapes.geometry.select_block_size == KEYS.value and whole

    def union(self, name: str, sm90_tokens: int, tile: Tile) -> Stage:
        sm90_tile = {"TOKENS": sm90_tokens, **self.programs}
        tile = tiles.union_tile(tile, self.group_size, self.shapes.geometry)
        return self.stage(name, self.fits_sm90_unions(), sm90_tile, tile, BY_UNION, ("union",))

    def forced(self) -> Stage:
        # Where keys have a tail and rows are copied, Hopper's kernel would spill.
        has_tail, whole_tokens = self.shapes.key_size > self.shapes.value_size, ROWS.value % self.group_size == 0
        if self.fits_sm90 and (whole_tokens or not has_tail):
            return Stage(("dense_forward_sm90",), self.programs, SM90_REASON)
        dtype, widest, large = self.what
        return Stage(("forced_forward",), tiles.forced_tile(dtype, widest, self.group_size, large), self.reason)

    def fits_sm90_blocks(self) -> bool:
        block = self.shapes.geometry.select_block_size
        return self.fits_sm90 and block // sub_block_ratio(block) == panels_sm90.BLOCK.value

    def blocks_forward(self, is_sm90: bool, why: str) -> Stage:
        tile, others = tiles.selected_forward_tile(*self.what), ("selected_reduce",)
        return self.stage("selected_forward", is_sm90, {}, tile, why, others, FORWARD_SCRATCH_BYTES)

    def blocks_backward(self, with_dq: bool, why: str = "") -> Stage:
        tile = tiles.selected_backward_tile(*self.what, with_dq=with_dq)
        others = ("selected_dq_reduce", "selected_dkdv_reduce") if with_dq else ("selected_dkdv_reduce",)
        is_sm90 = self.fits_sm90_blocks()
        return self.stage("selected_backward", is_sm90, {}, tile, why, others, BACKWARD_SCRATCH_BYTES)

    def listed(self) -> Selected:
        # Hopper's forward takes blocks that lie before their tokens alone, as forced ones apart leave them.
        why = "lists may be any"
        return Selected(None, self.blocks_forward(False, why), None, self.blocks_backward(True, why))

    def gates(self) -> Stage:
        padded = tiles.power_of_2(self.shapes.value_head_dim)
        tile = {"PADDED": padded, "ROWS": max(1, GATE_ELEMENTS // padded)}
        return Stage(("gate_backward",), tile, self.reason)


def union_pays(shapes: Shapes, ratio: float) -> bool:
    """Whether the union of a tile's blocks is short, for documents of average length and independent choices.

    Args:
        ratio: see FORWARD_RATIO.
    """
    geometry, group_size = shapes.geometry, shapes.group_size
    tokens = min(tiles.MAX_UNION_TOKENS, UNION_ROWS // group_size)
    blocks = max(1, shapes.batch * shapes.tokens // max(1, shapes.num_docs) // geometry.select_block_size)
    if tokens == 0 or blocks > 64 * geometry.num_selected_blocks:
        return False
    chosen = unions = 0.0
    for seen in range(1, blocks + 1, max(1, blocks // 32)):  # as many tokens see each number of blocks; 32 of them do
        listed = min(seen, geometry.num_selected_blocks)
        chosen += listed
        unions += seen * (1 - (1 - listed / seen) ** tokens)
    return unions * UNION_ROWS < ratio * chosen * tokens * group_size
