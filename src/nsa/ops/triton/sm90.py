"""What the Gluon kernels for Hopper share: barriers, boxes by TMA, rounds of persistent programs, copies of rows.

Legend: D columns of a head that are multiplied first, TAIL those after them (192 = 128 + 64); G heads of a group.
"""

# Kernels are typed by Triton, not by Python.
# pyright: reportArgumentType=false, reportCallIssue=false, reportAttributeAccessIssue=false, reportReturnType=false
# pyright: reportGeneralTypeIssues=false, reportPossiblyUnboundVariable=false, reportAssignmentType=false
from __future__ import annotations

from torch import Tensor
from triton.experimental import gluon
from triton.experimental.gluon import language as gl
from triton.experimental.gluon.language.nvidia.ampere import async_copy
from triton.experimental.gluon.language.nvidia.hopper import mbarrier, tma
from triton.experimental.gluon.nvidia.hopper import TensorDescriptor

ROWS = gl.constexpr(64)  # rows of a group of four warps, as one wgmma takes
KEYS = gl.constexpr(64)  # keys of a step


def describe_box(x: Tensor, tokens: int, heads: int) -> TensorDescriptor:
    """Boxes of tokens with some heads of `[B, T, H, D]`; beyond a sequence they read zeros and write nothing."""
    box = [1, tokens, heads, x.shape[3]]
    layout = gl.NVMMASharedLayout.get_default_for(box, gl.bfloat16)
    return TensorDescriptor(x, list(x.shape), list(x.stride()), box, layout)


def describe_parts(x: Tensor, size: int, tokens: int, heads: int) -> tuple[TensorDescriptor, TensorDescriptor]:
    """Boxes of the first `size` columns, and of the others where there are any."""
    first = describe_box(x[..., :size], tokens, heads)
    return first, first if x.shape[3] == size else describe_box(x[..., size:], tokens, heads)


@gluon.jit
def make_barriers(NUM: gl.constexpr, ARRIVALS: gl.constexpr):
    barriers = gl.allocate_shared_memory(gl.int64, [NUM, 1], mbarrier.MBarrierLayout())
    for i in gl.static_range(NUM):
        mbarrier.init(barriers.index(i), count=ARRIVALS)
    return barriers


@gluon.jit
def num_rounds(num_tiles):
    """How many tiles a program takes when they are dealt out there and back, the heaviest first."""
    programs = gl.num_programs(0)
    full = num_tiles // programs
    place = gl.program_id(0)
    if full % 2 == 1:
        place = programs - 1 - place
    return full + (place < num_tiles - full * programs).to(gl.int32)


@gluon.jit
def tile_of_round(turn, num_tiles, heads, HKV: gl.constexpr, TILE: gl.constexpr):
    """First row, sequence and group of a program's tile in a round."""
    programs = gl.num_programs(0)
    place = gl.program_id(0)
    if turn % 2 == 1:
        place = programs - 1 - place
    work = turn * programs + place
    return (num_tiles - 1 - work // heads) * TILE, work % heads // HKV, work % heads % HKV


@gluon.jit
def row_offsets(
    low, b, group, T, G: gl.constexpr, HKV: gl.constexpr, D: gl.constexpr, WIDTH: gl.constexpr, NUM: gl.constexpr,
    LAYOUT: gl.constexpr,
):  # fmt: skip
    """Where D columns of NUM rows of a group from `low` on lie in `[B, T, H, WIDTH]`, and which rows exist."""
    row = low + gl.arange(0, NUM, gl.SliceLayout(1, LAYOUT))
    t = gl.minimum(row // G, T - 1)
    row_64 = (b.to(gl.int64) * T + t) * (G * HKV) + group * G + row % G
    return row_64[:, None] * WIDTH + gl.arange(0, D, gl.SliceLayout(0, LAYOUT))[None, :], (row < T * G)[:, None]


@gluon.jit
def copy_rows(
    x_ptr, tile, low, b, group, T, G: gl.constexpr, HKV: gl.constexpr, D: gl.constexpr, WIDTH: gl.constexpr,
    NUM: gl.constexpr,
):  # fmt: skip
    """Begin to copy NUM rows of a group from `low` on; those that do not exist are the last token's."""
    LAYOUT: gl.constexpr = gl.BlockedLayout([1, 8], [256 // D, D // 8], [4, 1], [1, 0])
    offsets, _live = row_offsets(low, b, group, T, G, HKV, D, WIDTH, NUM, LAYOUT)
    async_copy.async_copy_global_to_shared(tile.reshape([NUM, D]), x_ptr + offsets)


@gluon.jit
def copy_queries(
    q_ptr, q_smem, q_tail_smem, place, low, b, group, T, G: gl.constexpr, HKV: gl.constexpr, D: gl.constexpr,
    TAIL: gl.constexpr,
):  # fmt: skip
    copy_rows(q_ptr, q_smem.index(place), low, b, group, T, G, HKV, D, D + TAIL, ROWS)
    if TAIL > 0:
        copy_rows(q_ptr + D, q_tail_smem.index(place), low, b, group, T, G, HKV, TAIL, D + TAIL, ROWS)
    async_copy.commit_group()


@gluon.jit
def load_queries(
    q_desc, q_tail_desc, q_smem, q_tail_smem, q_full, q_empty, place, phase, box, D: gl.constexpr, TAIL: gl.constexpr
):  # fmt: skip
    """Load a box of queries once its place is free."""
    mbarrier.wait(q_empty.index(place), phase)
    mbarrier.expect(q_full.index(place), 2 * ROWS * (D + TAIL))
    tma.async_copy_global_to_shared(q_desc, box, q_full.index(place), q_smem.index(place))
    if TAIL > 0:
        tma.async_copy_global_to_shared(q_tail_desc, box, q_full.index(place), q_tail_smem.index(place))


@gluon.jit
def load_keys(
    k_desc, k_tail_desc, v_desc, k_smem, k_tail_smem, v_smem, k_full, k_empty, v_full, v_empty, step, box,
    D: gl.constexpr, TAIL: gl.constexpr, STAGES: gl.constexpr,
):  # fmt: skip
    """Load the keys and values of a step once its place is free."""
    slot = step % STAGES
    phase = (step // STAGES & 1) ^ 1
    mbarrier.wait(k_empty.index(slot), phase)
    mbarrier.expect(k_full.index(slot), 2 * KEYS * (D + TAIL))
    tma.async_copy_global_to_shared(k_desc, box, k_full.index(slot), k_smem.index(slot))
    if TAIL > 0:
        tma.async_copy_global_to_shared(k_tail_desc, box, k_full.index(slot), k_tail_smem.index(slot))
    mbarrier.wait(v_empty.index(slot), phase)
    mbarrier.expect(v_full.index(slot), 2 * KEYS * D)
    tma.async_copy_global_to_shared(v_desc, box, v_full.index(slot), v_smem.index(slot))
