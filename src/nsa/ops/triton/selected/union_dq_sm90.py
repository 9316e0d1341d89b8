"""dQ of the selected branch over unions of blocks on Hopper, in Gluon: two groups of rows share every load.

The rows, lists and skips of `union_sm90.py` with the steps of `dense/dq_sm90.py`; a tile has two groups of four warps.
Nothing waits across steps, so that a group skips every block that none of its tokens chose.
"""

# Kernels are typed by Triton, not by Python.
# pyright: reportArgumentType=false, reportCallIssue=false, reportAttributeAccessIssue=false, reportReturnType=false
# pyright: reportGeneralTypeIssues=false, reportPossiblyUnboundVariable=false
# pyright: reportAssignmentType=false, reportOperatorIssue=false
# Lists in kernels are added, not unpacked.
# ruff: noqa: RUF005
# Triton holds fields of aggregates against their annotations, which therefore may not be postponed.

from torch import Tensor
from triton.experimental import gluon
from triton.experimental.gluon import language as gl
from triton.experimental.gluon.language.nvidia.ampere import async_copy
from triton.experimental.gluon.language.nvidia.hopper import fence_async_shared, tma, warpgroup_mma, warpgroup_mma_wait
from triton.language.core import _aggregate as aggregate  # public as gluon.aggregate from Triton 3.9 on

from nsa.geometry import BlockGeometry
from nsa.ops.triton.gpu import LOG2E
from nsa.ops.triton.selected.parts_sm90 import Part, Shape, Unions, tokens_of_part
from nsa.ops.triton.sm90 import (
    KEYS,
    ROWS,
    Pipe,
    begin_scores,
    describe_box,
    describe_parts,
    line_layout,
    make_pipe,
    tma_store,
)

GROUPS = gl.constexpr(2)  # groups of four warps: beside dQ, scores and dP, registers have no room for a third
STAGES = gl.constexpr(3)  # steps in flight, as the shared memory has room for


def tile_tokens(group_size: int) -> int:
    """Tokens of a tile."""
    return GROUPS.value * (ROWS.value // group_size)


@aggregate
class Inputs:
    """What rows are read from without TMA."""

    q_ptr: gl.tensor
    dout_ptr: gl.tensor
    lse_ptr: gl.tensor
    delta_ptr: gl.tensor

    @gluon.constexpr_function
    def __init__(self, q_ptr, dout_ptr, lse_ptr, delta_ptr):
        self.q_ptr, self.dout_ptr = q_ptr, dout_ptr
        self.lse_ptr, self.delta_ptr = lse_ptr, delta_ptr


@aggregate
class Gradient:
    """Where dQ goes; ADD puts it on top of what is there."""

    ptr: gl.tensor
    desc: tma.tensor_descriptor
    tail_desc: tma.tensor_descriptor
    ADD: gl.constexpr

    @gluon.constexpr_function
    def __init__(self, ptr, desc, tail_desc, ADD):
        self.ptr, self.desc, self.tail_desc = ptr, desc, tail_desc
        self.ADD = gl.constexpr(ADD)


@aggregate
class Rows:
    """What a part's rows bring to every step; lse is in base 2."""

    part: Part
    q: gl.shared_memory_descriptor
    q_tail: gl.shared_memory_descriptor
    dout: gl.shared_memory_descriptor
    lse: gl.tensor
    delta: gl.tensor
    bit: gl.tensor  # of a row's token, in the masks
    end: gl.tensor  # first key that a row does not see

    @gluon.constexpr_function
    def __init__(self, part, q, q_tail, dout, lse, delta, bit, end):
        self.part = part
        self.q, self.q_tail, self.dout = q, q_tail, dout
        self.lse, self.delta, self.bit, self.end = lse, delta, bit, end


@gluon.jit
def _load_partition(shape, unions, queries, douts, keys, values):
    """The warp that loads: a tile's queries and output gradients, then the keys and values of its union's blocks."""
    step = 0
    for round in range(shape.num_rounds()):
        token, b, group = shape.tile_of_round(round)
        starts, _masks, count = unions.of_tile(shape, token, b, group)
        key_start = gl.load(starts)
        for part in gl.static_range(shape.PARTS if shape.BOXES else 0):
            box = [b, token + part * shape.TOKENS, group * shape.G, 0]
            queries.producer_acquire(round, queries.tile_bytes() + douts.tile_bytes(), part)
            queries.copy(round, box, part)
            douts.copy(round, box, part)
        for i in range(count):
            next_start = gl.load(starts + gl.minimum(i + 1, count - 1))  # long before it is needed
            box = [b, key_start, group, 0]
            keys.load(step, box)
            values.load(step, box)
            step += 1
            key_start = next_start


@gluon.jit
def _copy_part(inputs, queries, douts, round, part, PART: gl.constexpr):
    """Begin to copy a part's queries and output gradients row by row."""
    part.copy_rows(inputs.q_ptr, queries, round, PART)
    part.copy_rows(inputs.dout_ptr, douts, round, PART)
    async_copy.commit_group()


@gluon.jit
def _load_rows(x_ptr, row, live, D: gl.constexpr, WIDTH: gl.constexpr, LAYOUT: gl.constexpr):
    """D columns of rows of `[B, T, H, WIDTH]`; zeros for those that are not there."""
    offsets = gl.convert_layout(row, gl.SliceLayout(1, LAYOUT))[:, None] * WIDTH
    offsets += gl.arange(0, D, gl.SliceLayout(0, LAYOUT))[None, :]
    return gl.load(x_ptr + offsets, mask=gl.convert_layout(live, gl.SliceLayout(1, LAYOUT))[:, None], other=0.0)


@gluon.jit
def _probabilities(s, rows, mine, key_start, scale_log2, LAYOUT: gl.constexpr):
    """The softmax of a block's scores; 0 for rows whose token did not choose it and for keys after the token."""
    p = gl.exp2(s * scale_log2 - gl.where((mine >> rows.bit & 1) != 0, rows.lse, float("inf"))[:, None])
    if key_start + KEYS > rows.part.token + rows.part.shape.q_start + 1:  # else all rows see the whole block
        key = key_start + gl.arange(0, KEYS, gl.SliceLayout(0, LAYOUT))
        p = gl.where(key[None, :] < rows.end[:, None], p, 0.0)
    return p


@gluon.jit
def _add_block(
    dq, dq_tail, rows, keys, values, step, mine, key_start, none, scale_log2, S_LAYOUT: gl.constexpr,
    Q_LAYOUT: gl.constexpr,
):  # fmt: skip
    """dQ of a part's rows, in its two parts of columns, with what a block adds."""
    TAIL: gl.constexpr = keys.TAIL
    k, k_tail, v = keys.tile(step), keys.tail_tile(step), values.tile(step)
    s = begin_scores(rows.q, rows.q_tail, keys, step, none)
    values.consumer_wait(step)  # until TMA has written them
    dp = warpgroup_mma(rows.dout, v.permute([1, 0]), none, use_acc=False, is_async=True)
    s = warpgroup_mma_wait(1, deps=[s])  # the scores alone: dP was begun after them
    p = _probabilities(s, rows, mine, key_start, scale_log2, S_LAYOUT)
    dp = warpgroup_mma_wait(0, deps=[dp])
    values.consumer_release(step)  # the product has read them: the loading warp may go on
    ds = (p * (dp - rows.delta[:, None])).to(rows.q.dtype)
    dq = warpgroup_mma(gl.convert_layout(ds, gl.DotOperandLayout(0, Q_LAYOUT, 2)), k, dq, is_async=True)
    if TAIL > 0:
        ds = gl.convert_layout(ds, gl.DotOperandLayout(0, S_LAYOUT, 2))
        dq_tail = warpgroup_mma(ds, k_tail, dq_tail, is_async=True)
        dq = warpgroup_mma_wait(1, deps=[dq])
        dq_tail = warpgroup_mma_wait(0, deps=[dq_tail])
    else:
        dq = warpgroup_mma_wait(0, deps=[dq])
    return dq, dq_tail


@gluon.jit
def _write_gradient(
    dq, dq_tail, before, before_tail, scale, queries, gradient, round, part, PART: gl.constexpr
):  # fmt: skip
    """Write a part's dQ, on top of what was there before, by way of its queries' buffer, as these are done with."""
    D: gl.constexpr = part.shape.D
    TAIL: gl.constexpr = part.shape.TAIL
    LAYOUT: gl.constexpr = line_layout(D)
    tile, tail_tile = queries.tile(round, PART), queries.tail_tile(round, PART)
    tile.store((dq * scale + before.to(gl.float32)).to(tile.dtype))
    if TAIL > 0:
        tail_tile.store((dq_tail * scale + before_tail.to(gl.float32)).to(tile.dtype))
    if part.shape.BOXES:
        fence_async_shared()  # threads wrote what TMA reads
        buffer = queries.buffer(round, PART)
        tma_store(gradient.desc, part.box(), queries.smem.index(buffer))
        if TAIL > 0:
            tma_store(gradient.tail_desc, part.box(), queries.tail.index(buffer))
        tma.store_wait(0)  # TMA has read the buffer
        queries.consumer_release(round, PART)  # and the loading warp may fill it
    else:
        offsets, live = part.offsets(D, D + TAIL, LAYOUT)
        gl.store(gradient.ptr + offsets, tile.load(LAYOUT), mask=live)
        if TAIL > 0:
            TAIL_LAYOUT: gl.constexpr = line_layout(TAIL)
            offsets, live = part.offsets(TAIL, D + TAIL, TAIL_LAYOUT)
            gl.store(gradient.ptr + D + offsets, tail_tile.load(TAIL_LAYOUT), mask=live)


@gluon.jit
def _row_partition(
    PART: gl.constexpr, shape, unions, queries, douts, keys, values, inputs, gradient, scale, scale_log2, log2e
):
    """Four warps with a part of every tile."""
    D: gl.constexpr = shape.D
    TAIL: gl.constexpr = shape.TAIL
    TOKENS: gl.constexpr = shape.TOKENS
    S_LAYOUT: gl.constexpr = gl.NVMMADistributedLayout([3, 0], [4, 1], [16, KEYS, 16])  # of dQ's last 64 columns too
    Q_LAYOUT: gl.constexpr = gl.NVMMADistributedLayout([3, 0], [4, 1], [16, D, 16])
    dtype: gl.constexpr = queries.smem.dtype
    none = gl.zeros([ROWS, KEYS], gl.float32, S_LAYOUT)
    step = 0
    num_rounds = shape.num_rounds()
    if not shape.BOXES and queries.STAGES == 2:
        _copy_part(inputs, queries, douts, 0, shape.part_of_round(0, PART), PART)
    for round in range(num_rounds):
        token, b, group = shape.tile_of_round(round)
        starts, masks, count = unions.of_tile(shape, token, b, group)
        next_start, next_mask = gl.load(starts), gl.load(masks)
        part = Part(shape, token + PART * TOKENS, b, group)
        bit = part.bits(gl.SliceLayout(1, S_LAYOUT))
        end = part.token + bit + shape.q_start + 1
        row, live = part.rows(gl.SliceLayout(1, S_LAYOUT))
        lse, delta = gl.load(inputs.lse_ptr + row) * log2e, gl.load(inputs.delta_ptr + row)
        q, q_tail, dout = queries.tile(round, PART), queries.tail_tile(round, PART), douts.tile(round, PART)
        rows = Rows(part, q, q_tail, dout, lse, delta, bit, end)
        dq = gl.zeros([ROWS, D], gl.float32, Q_LAYOUT)
        dq_tail = dq
        before = dq.to(dtype)
        before_tail = before
        if TAIL > 0:
            dq_tail = gl.zeros([ROWS, TAIL], gl.float32, S_LAYOUT)
            before_tail = dq_tail.to(dtype)
        if gradient.ADD:  # read long before it is needed
            before = _load_rows(gradient.ptr, row, live, D, D + TAIL, Q_LAYOUT)
            if TAIL > 0:
                before_tail = _load_rows(gradient.ptr + D, row, live, TAIL, D + TAIL, S_LAYOUT)
        if shape.BOXES:
            queries.consumer_wait(round, PART)  # until TMA has written them and the output gradients
        else:
            if queries.STAGES == 1:
                _copy_part(inputs, queries, douts, round, part, PART)
            async_copy.wait_group(0)
            fence_async_shared()  # threads wrote what products read
            if queries.STAGES == 2 and round + 1 < num_rounds:
                _copy_part(inputs, queries, douts, round + 1, shape.part_of_round(round + 1, PART), PART)
        for i in range(count):
            key_start = next_start
            mine = tokens_of_part(next_mask, PART, TOKENS)
            ahead = gl.minimum(i + 1, count - 1)
            next_start, next_mask = gl.load(starts + ahead), gl.load(masks + ahead)
            keys.consumer_wait(step)  # until TMA has written them
            if mine != 0:
                dq, dq_tail = _add_block(
                    dq, dq_tail, rows, keys, values, step, mine, key_start, none, scale_log2, S_LAYOUT, Q_LAYOUT
                )
            else:  # the other group chose the block, and waits for its values before the stage is filled again
                values.consumer_release(step)
            keys.consumer_release(step)  # the products have read them
            step += 1
        _write_gradient(dq, dq_tail, before, before_tail, scale, queries, gradient, round, part, PART)


@gluon.jit(do_not_specialize=["T", "q_start", "num_tiles", "num_pairs"])
def union_dq_sm90_kernel(
    q_desc, q_tail_desc, k_desc, k_tail_desc, v_desc, dout_desc, dq_desc, dq_tail_desc, q_ptr, dout_ptr, dq_ptr,
    lse_ptr, delta_ptr, start_ptr, mask_ptr, count_ptr, scale, scale_log2, log2e, T, q_start, num_tiles, num_pairs,
    G: gl.constexpr, HKV: gl.constexpr, D: gl.constexpr, TAIL: gl.constexpr, TOKENS: gl.constexpr, COUNT: gl.constexpr,
    ADD: gl.constexpr, BUFFERS: gl.constexpr, BOXES: gl.constexpr,
):  # fmt: skip
    """dQ of the selected branch; ADD puts it on top of what `dq_ptr` holds."""
    shape = Shape(T, q_start, num_tiles, num_pairs, G, HKV, D, TAIL, TOKENS, GROUPS, BOXES)
    unions = Unions(start_ptr, mask_ptr, count_ptr, COUNT)
    keys = make_pipe(k_desc, k_tail_desc, STAGES, 1, TAIL, GROUPS)
    values = make_pipe(v_desc, v_desc, STAGES, 1, 0, GROUPS)
    dout_smem = gl.allocate_shared_memory(
        dout_desc.dtype, [BUFFERS * GROUPS] + dout_desc.block_shape, dout_desc.layout
    )  # fmt: skip
    # The last pipe: without BOXES nobody uses its barriers, whose place goes to what is allocated later.
    queries = make_pipe(q_desc, q_tail_desc, BUFFERS, GROUPS, TAIL, 1)
    # Output gradients come and go with the queries, and share their barriers.
    douts = Pipe(dout_desc, dout_desc, dout_smem, dout_smem, queries.full, queries.empty, BUFFERS, GROUPS, 0)
    inputs = Inputs(q_ptr, dout_ptr, lse_ptr, delta_ptr)
    gradient = Gradient(dq_ptr, dq_desc, dq_tail_desc, ADD)
    fence_async_shared()  # TMA sees the barriers
    row_arguments = (shape, unions, queries, douts, keys, values, inputs, gradient, scale, scale_log2, log2e)
    # Registers a thread, of 65,536 / 128 in three groups of warps: the loading warp leaves its own to the rows.
    gl.warp_specialize([
        (_row_partition, (0,) + row_arguments),
        (_row_partition, (1,) + row_arguments),
        (_load_partition, (shape, unions, queries, douts, keys, values)),
    ], [4, 1], [240, 24])  # fmt: skip


def union_dq_sm90(
    dout: Tensor, q: Tensor, k: Tensor, v: Tensor, lse: Tensor, delta: Tensor, dq: Tensor, starts: Tensor,
    masks: Tensor, counts: Tensor, geometry: BlockGeometry, q_start: int, scale: float, add: bool, programs: int,
) -> None:  # fmt: skip
    """Write dq, or add to it.

    Args:
        starts, masks, counts: `Unions` of `tile_tokens` tokens.
        programs: at most, one for each multiprocessor.
    """
    B, T, H, Dk = q.shape
    Hkv, D = k.shape[2], v.shape[3]
    G, tail = H // Hkv, Dk - D
    boxes = ROWS.value % G == 0
    box = (ROWS.value // G, G) if boxes else (ROWS.value, 1)
    num_tiles = counts.shape[1]
    union_dq_sm90_kernel[(min(programs, num_tiles * B * Hkv),)](
        *describe_parts(q, D, *box), *describe_parts(k, D, KEYS.value, 1), describe_box(v, KEYS.value, 1),
        describe_box(dout, *box), *describe_parts(dq, D, *box), q, dout, dq, lse, delta, starts, masks, counts,
        scale, scale * LOG2E, LOG2E, T, q_start, num_tiles, B * Hkv,
        G=G, HKV=Hkv, D=D, TAIL=tail, TOKENS=ROWS.value // G, COUNT=geometry.num_selected_blocks, ADD=add,
        BUFFERS=1 if tail else 2, BOXES=boxes, num_warps=4,
    )  # fmt: skip
