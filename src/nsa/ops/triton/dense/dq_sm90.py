"""dQ of the compressed and the window branch on Hopper, in Gluon: loads beside products.

As in `backward.py`, a program holds rows and runs over their keys. One warp loads by TMA; two groups of four warps hold
64 rows each, which they copy themselves where whole tokens do not fill a tile (BOXES).

Shapes and intervals are those of `backward.py`.
"""

# Kernels are typed by Triton, not by Python.
# pyright: reportArgumentType=false, reportCallIssue=false, reportAttributeAccessIssue=false, reportReturnType=false
# pyright: reportGeneralTypeIssues=false, reportPossiblyUnboundVariable=false
# pyright: reportAssignmentType=false, reportOperatorIssue=false
# No postponed annotations: Triton holds the fields of aggregates against them.

import triton
from torch import Tensor
from triton.experimental import gluon
from triton.experimental.gluon import language as gl
from triton.experimental.gluon.language.nvidia.ampere import async_copy
from triton.experimental.gluon.language.nvidia.hopper import (
    fence_async_shared,
    tma,
    warpgroup_mma,
    warpgroup_mma_wait,
)
from triton.language.core import _aggregate as aggregate  # public as gluon.aggregate from Triton 3.9 on

from nsa.geometry import BlockGeometry
from nsa.ops.triton.dense.mask_sm90 import DenseMask
from nsa.ops.triton.gpu import LOG2E
from nsa.ops.triton.layout import Layout, document_pointers
from nsa.ops.triton.sm90 import (
    KEYS,
    ROWS,
    Schedule,
    Shape,
    begin_scores,
    describe_box,
    describe_parts,
    line_layout,
    make_companion,
    make_pipe,
    tma_store,
    wgmma_layout,
)

GROUPS = gl.constexpr(2)  # groups of four warps; three would leave too few registers for dQ beside two scores
STAGES = gl.constexpr(3)  # steps in flight, for which there is room at 128 columns


@aggregate
class Inputs:
    """What rows bring: queries, gradients of the output, natural log-sum-exps, deltas."""

    q_ptr: gl.tensor
    dout_ptr: gl.tensor
    lse_ptr: gl.tensor
    delta_ptr: gl.tensor

    @gluon.constexpr_function
    def __init__(self, q_ptr, dout_ptr, lse_ptr, delta_ptr):
        self.q_ptr, self.dout_ptr, self.lse_ptr, self.delta_ptr = q_ptr, dout_ptr, lse_ptr, delta_ptr


@aggregate
class Gradient:
    """Where dQ goes, by boxes and by rows; with ADD it is added to what is there."""

    desc: tma.tensor_descriptor
    tail_desc: tma.tensor_descriptor
    ptr: gl.tensor
    ADD: gl.constexpr

    @gluon.constexpr_function
    def __init__(self, desc, tail_desc, ptr, ADD):
        self.desc, self.tail_desc, self.ptr, self.ADD = desc, tail_desc, ptr, gl.constexpr(ADD)


@aggregate
class Scales:
    """The scale of scores, the same in base 2, and log2(e)."""

    scale: gl.tensor
    scale_log2: gl.tensor
    log2e: gl.tensor

    @gluon.constexpr_function
    def __init__(self, scale, scale_log2, log2e):
        self.scale, self.scale_log2, self.log2e = scale, scale_log2, log2e


@gluon.jit
def _load_partition(q_pipe, dout_pipe, k_pipe, v_pipe, shape, mask, schedule):
    """One warp: load every tile's queries and gradients, if they come by boxes, and its keys and values."""
    step = 0
    for round in range(schedule.num_rounds()):
        tile = schedule.tile(round)
        keys = mask.of_tile(tile, shape, GROUPS * ROWS)
        for part in gl.static_range(GROUPS if shape.BOXES else 0):
            box = shape.box(tile.part(part))
            q_pipe.producer_acquire(round, q_pipe.tile_bytes() + dout_pipe.tile_bytes(), part)  # one barrier for both
            q_pipe.copy(round, box, part)
            dout_pipe.copy(round, box, part)
        for key_start in range(keys.begin, keys.end, KEYS):
            box = [tile.b, key_start, tile.group, 0]
            k_pipe.load(step, box)
            v_pipe.load(step, box)
            step += 1


@gluon.jit
def _copy_rows(inputs, q_pipe, dout_pipe, round, tile, shape, PART: gl.constexpr):
    """Threads begin to copy the queries and gradients of a part."""
    q_pipe.copy_rows(round, inputs.q_ptr, tile, shape, PART)
    dout_pipe.copy_rows(round, inputs.dout_ptr, tile, shape, PART)
    async_copy.commit_group()


@gluon.jit
def _load_rows(x_ptr, row, live, D: gl.constexpr, WIDTH: gl.constexpr, LAYOUT: gl.constexpr):
    """The first D columns of rows of `[..., WIDTH]`; zeros for those that do not exist."""
    place = gl.convert_layout(row, gl.SliceLayout(1, LAYOUT))[:, None] * WIDTH
    place += gl.arange(0, D, gl.SliceLayout(0, LAYOUT))[None, :]
    return gl.load(x_ptr + place, mask=gl.convert_layout(live, gl.SliceLayout(1, LAYOUT))[:, None], other=0.0)


@gluon.jit
def _store_tile(gradient, q_pipe, round, rows, shape, PART: gl.constexpr):
    """Write dQ, which lies in the place of the queries, and let go of that."""
    D: gl.constexpr = shape.D
    TAIL: gl.constexpr = shape.TAIL
    if shape.BOXES:
        fence_async_shared()  # dQ was written by threads, TMA reads it
        buffer = q_pipe.buffer(round, PART)
        tma_store(gradient.desc, shape.box(rows), q_pipe.smem.index(buffer))
        if TAIL > 0:
            tma_store(gradient.tail_desc, shape.box(rows), q_pipe.tail.index(buffer))
        tma.store_wait(0)  # before the next queries may overwrite it
        q_pipe.consumer_release(round, PART)
    else:
        LINE: gl.constexpr = line_layout(D)
        offsets, live = shape.offsets(rows, ROWS, D, D + TAIL, LINE)
        gl.store(gradient.ptr + offsets, q_pipe.tile(round, PART).load(LINE), mask=live)
        if TAIL > 0:
            TAIL_LINE: gl.constexpr = line_layout(TAIL)
            offsets, live = shape.offsets(rows, ROWS, TAIL, D + TAIL, TAIL_LINE)
            gl.store(gradient.ptr + D + offsets, q_pipe.tail_tile(round, PART).load(TAIL_LINE), mask=live)


@gluon.jit
def _sum_keys(q, q_tail, dout, lse, delta, k_pipe, v_pipe, step, keys, mask, scale_log2):
    """dQ of a part's rows before its scale, its columns after the first D, and the number of the next step."""
    D: gl.constexpr = q.shape[1]
    TAIL: gl.constexpr = k_pipe.TAIL
    S_LAYOUT: gl.constexpr = wgmma_layout(KEYS)
    Q_LAYOUT: gl.constexpr = wgmma_layout(D)
    none = gl.zeros([ROWS, KEYS], gl.float32, S_LAYOUT)
    dq = gl.zeros([ROWS, D], gl.float32, Q_LAYOUT)
    dq_tail = dq
    if TAIL > 0:
        dq_tail = gl.zeros([ROWS, TAIL], gl.float32, S_LAYOUT)
    for key_start in range(keys.begin, keys.end, KEYS):
        k_pipe.consumer_wait(step)
        s = begin_scores(q, q_tail, k_pipe, step, none)
        v_pipe.consumer_wait(step)
        dp = warpgroup_mma(dout, v_pipe.tile(step).permute([1, 0]), none, use_acc=False, is_async=True)
        s = warpgroup_mma_wait(1, deps=[s])  # dP goes on under the exponentials
        p = gl.exp2(s * scale_log2 - lse[:, None])
        p = mask.apply(p, key_start, 0.0)
        dp = warpgroup_mma_wait(0, deps=[dp])
        v_pipe.consumer_release(step)  # the product that read the values is over
        ds = (p * (dp - delta[:, None])).to(q.dtype)
        operand = gl.convert_layout(ds, gl.DotOperandLayout(0, Q_LAYOUT, 2))
        dq = warpgroup_mma(operand, k_pipe.tile(step), dq, is_async=True)
        if TAIL > 0:
            operand = gl.convert_layout(ds, gl.DotOperandLayout(0, S_LAYOUT, 2))
            dq_tail = warpgroup_mma(operand, k_pipe.tail_tile(step), dq_tail, is_async=True)
            dq = warpgroup_mma_wait(1, deps=[dq])
            dq_tail = warpgroup_mma_wait(0, deps=[dq_tail])
        else:
            dq = warpgroup_mma_wait(0, deps=[dq])
        k_pipe.consumer_release(step)  # all products that read the keys are over
        step += 1
    return dq, dq_tail, step


@gluon.jit
def _row_partition(
    PART: gl.constexpr, inputs, gradient, q_pipe, dout_pipe, k_pipe, v_pipe, shape, mask, schedule, scales
):  # fmt: skip
    """Four warps: dQ of 64 rows of every tile."""
    D: gl.constexpr = shape.D
    TAIL: gl.constexpr = shape.TAIL
    S_LAYOUT: gl.constexpr = wgmma_layout(KEYS)
    Q_LAYOUT: gl.constexpr = wgmma_layout(D)
    ROW: gl.constexpr = gl.SliceLayout(1, S_LAYOUT)
    dtype: gl.constexpr = q_pipe.smem.dtype
    step = 0
    rounds = schedule.num_rounds()
    if not shape.BOXES and q_pipe.STAGES == 2:
        _copy_rows(inputs, q_pipe, dout_pipe, 0, schedule.tile(0).part(PART), shape, PART)
    for round in range(rounds):
        tile = schedule.tile(round)
        keys = mask.of_tile(tile, shape, GROUPS * ROWS)
        rows = tile.part(PART)
        row = rows.row + gl.arange(0, ROWS, ROW)
        row_mask = mask.of_rows(keys, rows, shape, row)
        index = shape.index(rows, row)
        live = row < shape.T * shape.G
        lse = gl.load(inputs.lse_ptr + index) * scales.log2e
        delta = gl.load(inputs.delta_ptr + index)
        q, q_tail = q_pipe.tile(round, PART), q_pipe.tail_tile(round, PART)
        dout = dout_pipe.tile(round, PART)
        before = gl.zeros([ROWS, D], dtype, Q_LAYOUT)
        before_tail = before
        if TAIL > 0:
            before_tail = gl.zeros([ROWS, TAIL], dtype, S_LAYOUT)
        if gradient.ADD:  # read long before it is needed
            before = _load_rows(gradient.ptr, index, live, D, D + TAIL, Q_LAYOUT)
            if TAIL > 0:
                before_tail = _load_rows(gradient.ptr + D, index, live, TAIL, D + TAIL, S_LAYOUT)
        if shape.BOXES:
            q_pipe.consumer_wait(round, PART)
        else:
            if q_pipe.STAGES == 1:
                _copy_rows(inputs, q_pipe, dout_pipe, round, rows, shape, PART)
            async_copy.wait_group(0)  # the rows that these warps copied themselves
            fence_async_shared()  # rows were written by threads, the products read them as TMA does
            if q_pipe.STAGES == 2 and round + 1 < rounds:
                _copy_rows(inputs, q_pipe, dout_pipe, round + 1, schedule.tile(round + 1).part(PART), shape, PART)
        dq, dq_tail, step = _sum_keys(
            q, q_tail, dout, lse, delta, k_pipe, v_pipe, step, keys, row_mask, scales.scale_log2
        )
        # The queries are done with: their place holds the result until it is written.
        q.store((dq * scales.scale + before.to(gl.float32)).to(dtype))
        if TAIL > 0:
            q_tail.store((dq_tail * scales.scale + before_tail.to(gl.float32)).to(dtype))
        _store_tile(gradient, q_pipe, round, rows, shape, PART)


@gluon.jit(do_not_specialize=["T", "S", "q_start", "k_start", "num_tiles", "num_pairs"])
def dense_dq_sm90_kernel(
    q_desc, q_tail_desc, k_desc, k_tail_desc, v_desc, dout_desc, dq_desc, dq_tail_desc, q_ptr, dout_ptr, dq_ptr,
    lse_ptr, delta_ptr, doc_ptr, cmp_ptr, scale, scale_log2, log2e, T, S, q_start, k_start, num_tiles, num_pairs,
    G: gl.constexpr, HKV: gl.constexpr, D: gl.constexpr, TAIL: gl.constexpr, SIZE: gl.constexpr, STRIDE: gl.constexpr,
    WINDOW: gl.constexpr, PACKED: gl.constexpr, ADD: gl.constexpr, BUFFERS: gl.constexpr, BOXES: gl.constexpr,
):  # fmt: skip
    """dQ of the rows of every tile; with BUFFERS 2 the next tile's rows arrive under the present one's."""
    shape = Shape(T, G, HKV, D, TAIL, BOXES)
    schedule = Schedule(num_tiles, num_pairs, HKV, GROUPS * ROWS)
    mask = DenseMask(doc_ptr, cmp_ptr, S, q_start, k_start, SIZE, STRIDE, WINDOW, PACKED)
    inputs = Inputs(q_ptr, dout_ptr, lse_ptr, delta_ptr)
    gradient = Gradient(dq_desc, dq_tail_desc, dq_ptr, ADD)
    scales = Scales(scale, scale_log2, log2e)
    q_pipe = make_pipe(q_desc, q_tail_desc, BUFFERS, GROUPS, TAIL, 1)
    dout_pipe = make_companion(q_pipe, dout_desc)
    k_pipe = make_pipe(k_desc, k_tail_desc, STAGES, 1, TAIL, GROUPS)
    v_pipe = make_pipe(v_desc, v_desc, STAGES, 1, 0, GROUPS)
    fence_async_shared()  # all partitions and TMA see the barriers
    # The last list is registers of a thread, for all but the first partition: what loads needs few of them.
    gl.warp_specialize([
        (_row_partition, (
            0, inputs, gradient, q_pipe, dout_pipe, k_pipe, v_pipe, shape, mask, schedule, scales,
        )),
        (_row_partition, (
            1, inputs, gradient, q_pipe, dout_pipe, k_pipe, v_pipe, shape, mask, schedule, scales,
        )),
        (_load_partition, (q_pipe, dout_pipe, k_pipe, v_pipe, shape, mask, schedule)),
    ], [4, 1], [240, 24])  # fmt: skip


def dense_dq_sm90(
    dout: Tensor, q: Tensor, k: Tensor, v: Tensor, lse: Tensor, delta: Tensor, dq: Tensor,
    geometry: BlockGeometry, layout: Layout | None, window: int, q_start: int, k_start: int, scale: float,
    add: bool, programs: int,
) -> None:  # fmt: skip
    """Write dq, or add to it, with so many programs at most."""
    B, T, H, Dk = q.shape
    S, Hkv, D = k.shape[1], k.shape[2], v.shape[3]
    G, tail = H // Hkv, Dk - D
    boxes = ROWS.value % G == 0
    box = (ROWS.value // G, G) if boxes else (ROWS.value, 1)
    documents = document_pointers(layout, q, "doc_start", "cmp_start")
    num_tiles = triton.cdiv(T * G, 2 * ROWS.value)
    dense_dq_sm90_kernel[(min(programs, num_tiles * B * Hkv),)](
        *describe_parts(q, D, *box), *describe_parts(k, D, KEYS.value, 1), describe_box(v, KEYS.value, 1),
        describe_box(dout, *box), *describe_parts(dq, D, *box), q, dout, dq, lse, delta, *documents,
        scale, scale * LOG2E, LOG2E, T, S, q_start, k_start, num_tiles, B * Hkv,
        G=G, HKV=Hkv, D=D, TAIL=tail, SIZE=geometry.compress_block_size, STRIDE=geometry.compress_stride,
        WINDOW=window, PACKED=layout is not None, ADD=add,
        BUFFERS=1 if tail else 2, BOXES=boxes, num_warps=4,
    )  # fmt: skip
