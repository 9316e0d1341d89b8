"""Forward of the compressed and the window branch and of the forced blocks on Hopper, in Gluon.

Loads and the parts of a tile run side by side.

One warp loads keys and values by TMA, and queries where whole tokens fill a tile (BOXES); rows of other group sizes are
copied by those who need them. Groups of four warps hold 64 rows (token, head) each and drift apart, so that one
computes exponentials while others multiply; each issues the next scores and the present values' product together (Shah
et al., FlashAttention-3, arXiv 2407.08608, section 3). Programs are persistent, one for each multiprocessor: the next
tile's queries arrive under the present tile.

Shapes and intervals are those of `forward.py`, for forced blocks those of `forced_sm90.py`; `nsa.ops.triton.plan`
says which shapes come here.
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
from nsa.ops.triton.dense.forced_sm90 import ForcedMask
from nsa.ops.triton.dense.mask_sm90 import DenseMask
from nsa.ops.triton.gpu import LN2, LOG2E
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
    make_pipe,
    tma_store,
    wgmma_layout,
)

GROUPS = gl.constexpr(3)  # groups of four warps: with 160 registers a thread, three fill a multiprocessor
STAGES, TAIL_STAGES = 4, 2  # steps in flight; where keys have a tail, 192 = 128 + 64, there is room for fewer


@aggregate
class Softmax:
    """Online softmax of 64 rows in base 2: the largest scaled score so far and the sum of exponentials above it."""

    row_max: gl.tensor
    row_sum: gl.tensor
    scale_log2: gl.tensor

    @gluon.constexpr_function
    def __init__(self, row_max, row_sum, scale_log2):
        self.row_max, self.row_sum, self.scale_log2 = row_max, row_sum, scale_log2

    @gluon.jit
    def step(self, s):
        """Take a step's scores: its probabilities, alpha by which earlier sums shrink, and the new state."""
        row_max = gl.maximum(self.row_max, gl.max(s, 1) * self.scale_log2)
        # A row that saw no key yet has a maximum of -inf: subtracted from -inf it would give NaN.
        safe = gl.where(row_max == float("-inf"), 0.0, row_max)
        p = gl.exp2(s * self.scale_log2 - safe[:, None])
        alpha = gl.exp2(self.row_max - safe)
        return p, alpha, Softmax(row_max, self.row_sum * alpha + gl.sum(p, 1), self.scale_log2)

    @gluon.jit
    def finish(self, LN2: gl.constexpr):
        """What the sum of values is multiplied with, and the natural log-sum-exp; 1 and -inf where no key was seen."""
        share = 1.0 / gl.where(self.row_sum == 0.0, 1.0, self.row_sum)
        lse = gl.where(self.row_sum == 0.0, float("-inf"), (self.row_max + gl.log2(self.row_sum)) * LN2)
        return share, lse


@aggregate
class Output:
    """Where the forward writes, by boxes and by rows."""

    out_desc: tma.tensor_descriptor
    out_ptr: gl.tensor
    lse_ptr: gl.tensor

    @gluon.constexpr_function
    def __init__(self, out_desc, out_ptr, lse_ptr):
        self.out_desc, self.out_ptr, self.lse_ptr = out_desc, out_ptr, lse_ptr


@gluon.jit
def _load_partition(q_pipe, k_pipe, v_pipe, shape, mask, schedule):
    """One warp: load every tile's queries, if they come by boxes, and its keys and values."""
    step = 0
    for round in range(schedule.num_rounds()):
        tile = schedule.tile(round)
        keys = mask.of_tile(tile, shape, GROUPS * ROWS)
        for part in gl.static_range(GROUPS if shape.BOXES else 0):
            q_pipe.load(round, shape.box(tile.part(part)), part)
        # Tiles without any key take one step, all of it masked: who waits for a step need not ask whether there is one.
        for i in range(gl.maximum(gl.cdiv(keys.end - keys.begin, KEYS), 1)):
            box = [tile.b, keys.key(keys.begin + i * KEYS), tile.group, 0]
            k_pipe.load(step, box)
            v_pipe.load(step, box)
            step += 1


@gluon.jit
def _attend(q, q_tail, k_pipe, v_pipe, step, keys, mask, scale_log2, D: gl.constexpr):
    """Sum of values and softmax of a part's rows, and the number of the next step.

    While exponentials of a step are taken, the values of the one before are multiplied; keys of a step are let go of a
    step earlier than its values.
    """
    S_LAYOUT: gl.constexpr = wgmma_layout(KEYS)
    O_LAYOUT: gl.constexpr = wgmma_layout(D)
    P_LAYOUT: gl.constexpr = gl.DotOperandLayout(0, O_LAYOUT, 2)
    dtype: gl.constexpr = q.dtype
    none = gl.zeros([ROWS, KEYS], gl.float32, S_LAYOUT)
    acc = gl.zeros([ROWS, D], gl.float32, O_LAYOUT)
    row_max = gl.full([ROWS], float("-inf"), gl.float32, gl.SliceLayout(1, S_LAYOUT))
    row_sum = gl.zeros([ROWS], gl.float32, gl.SliceLayout(1, S_LAYOUT))
    softmax = Softmax(row_max, row_sum, scale_log2)
    k_pipe.consumer_wait(step)
    s = begin_scores(q, q_tail, k_pipe, step, none)
    s = warpgroup_mma_wait(0, deps=[s])
    k_pipe.consumer_release(step)  # the products that read the keys are over
    p, _alpha, softmax = softmax.step(mask.apply(s, keys.begin, float("-inf")))
    p = gl.convert_layout(p.to(dtype), P_LAYOUT)
    for key_start in range(keys.begin + KEYS, keys.end, KEYS):
        k_pipe.consumer_wait(step + 1)
        s = begin_scores(q, q_tail, k_pipe, step + 1, none)
        v_pipe.consumer_wait(step)
        acc = warpgroup_mma(p, v_pipe.tile(step), acc, is_async=True)
        s = warpgroup_mma_wait(1, deps=[s])  # the scores; the values go on under the exponentials
        k_pipe.consumer_release(step + 1)
        fresh, alpha, softmax = softmax.step(mask.apply(s, key_start, float("-inf")))
        acc = warpgroup_mma_wait(0, deps=[acc])
        v_pipe.consumer_release(step)
        acc = acc * gl.convert_layout(alpha, gl.SliceLayout(1, O_LAYOUT))[:, None]
        p = gl.convert_layout(fresh.to(dtype), P_LAYOUT)
        step += 1
    v_pipe.consumer_wait(step)
    acc = warpgroup_mma(p, v_pipe.tile(step), acc, is_async=True)
    acc = warpgroup_mma_wait(0, deps=[acc])
    v_pipe.consumer_release(step)
    return acc, softmax, step + 1


@gluon.jit
def _row_partition(
    PART: gl.constexpr, q_ptr, output, q_pipe, k_pipe, v_pipe, shape, mask, schedule, scale_log2, LN2: gl.constexpr
):
    """Four warps: attend with 64 rows of every tile."""
    ROW: gl.constexpr = gl.SliceLayout(1, wgmma_layout(KEYS))
    step = 0
    rounds = schedule.num_rounds()
    if not shape.BOXES:
        q_pipe.copy_rows(0, q_ptr, schedule.tile(0).part(PART), shape, PART)
        async_copy.commit_group()
    for round in range(rounds):
        tile = schedule.tile(round)
        rows = tile.part(PART)
        row = rows.row + gl.arange(0, ROWS, ROW)
        keys = mask.of_tile(tile, shape, GROUPS * ROWS)
        row_mask = mask.of_rows(keys, rows, shape, row)
        q, q_tail = q_pipe.tile(round, PART), q_pipe.tail_tile(round, PART)
        if shape.BOXES:
            q_pipe.consumer_wait(round, PART)
        else:
            async_copy.wait_group(0)  # the rows that these warps copied themselves, a round ago
            fence_async_shared()  # rows were written by threads, the products read them as TMA does
            if round + 1 < rounds:
                q_pipe.copy_rows(round + 1, q_ptr, schedule.tile(round + 1).part(PART), shape, PART)
                async_copy.commit_group()
        acc, softmax, step = _attend(q, q_tail, k_pipe, v_pipe, step, keys, row_mask, scale_log2, shape.D)
        share, lse = softmax.finish(LN2)
        gl.store(output.lse_ptr + shape.index(rows, row), lse, mask=row < shape.T * shape.G)
        # The queries are done with: their place holds the result until it is written.
        q.store((acc * gl.convert_layout(share, gl.SliceLayout(1, acc.type.layout))[:, None]).to(q.dtype))
        if shape.BOXES:
            fence_async_shared()  # the result was written by threads, TMA reads it
            buffer = q_pipe.buffer(round, PART)
            tma_store(output.out_desc, shape.box(rows), q_pipe.smem.index(buffer))
            tma.store_wait(0)  # before the next queries may overwrite it
            q_pipe.consumer_release(round, PART)
        else:
            LINE: gl.constexpr = line_layout(shape.D)
            offsets, live = shape.offsets(rows, ROWS, shape.D, shape.D, LINE)
            gl.store(output.out_ptr + offsets, q.load(LINE), mask=live)


@gluon.jit(do_not_specialize=["T", "S", "q_start", "k_start", "num_tiles", "num_pairs"])
def dense_forward_sm90_kernel(
    q_desc, q_tail_desc, k_desc, k_tail_desc, v_desc, out_desc, q_ptr, out_ptr, lse_ptr, doc_ptr, cmp_ptr, scale_log2,
    T, S, q_start, k_start, num_tiles, num_pairs,
    G: gl.constexpr, HKV: gl.constexpr, D: gl.constexpr, TAIL: gl.constexpr, SIZE: gl.constexpr, STRIDE: gl.constexpr,
    WINDOW: gl.constexpr, BLOCK: gl.constexpr, INIT: gl.constexpr, LOCAL: gl.constexpr, PACKED: gl.constexpr,
    LN2: gl.constexpr, STAGES: gl.constexpr, BOXES: gl.constexpr,
):  # fmt: skip
    """Attention of the rows of every tile, for forced blocks if LOCAL > 0; LN2 is the natural logarithm of 2."""
    shape = Shape(T, G, HKV, D, TAIL, BOXES)
    schedule = Schedule(num_tiles, num_pairs, HKV, GROUPS * ROWS)
    if LOCAL > 0:
        mask = ForcedMask(doc_ptr, S, q_start, BLOCK, INIT, LOCAL, PACKED)
    else:
        mask = DenseMask(doc_ptr, cmp_ptr, S, q_start, k_start, SIZE, STRIDE, WINDOW, PACKED)
    output = Output(out_desc, out_ptr, lse_ptr)
    # Two stages of queries: the next tile's arrive under the present one's. Parts have their own, as they drift apart.
    q_pipe = make_pipe(q_desc, q_tail_desc, 2, GROUPS, TAIL, 1)
    k_pipe = make_pipe(k_desc, k_tail_desc, STAGES, 1, TAIL, GROUPS)
    v_pipe = make_pipe(v_desc, v_desc, STAGES, 1, 0, GROUPS)
    fence_async_shared()  # all partitions and TMA see the barriers
    # The last list is registers of a thread, for all but the first partition: what loads needs few of them.
    gl.warp_specialize([
        (_row_partition, (0, q_ptr, output, q_pipe, k_pipe, v_pipe, shape, mask, schedule, scale_log2, LN2)),
        (_row_partition, (1, q_ptr, output, q_pipe, k_pipe, v_pipe, shape, mask, schedule, scale_log2, LN2)),
        (_row_partition, (2, q_ptr, output, q_pipe, k_pipe, v_pipe, shape, mask, schedule, scale_log2, LN2)),
        (_load_partition, (q_pipe, k_pipe, v_pipe, shape, mask, schedule)),
    ], [4, 4, 1], [160, 160, 24])  # fmt: skip


def dense_forward_sm90(
    q: Tensor, k: Tensor, v: Tensor, out: Tensor, lse: Tensor, geometry: BlockGeometry, layout: Layout | None,
    window: int, q_start: int, k_start: int, scale: float, programs: int, forced: bool = False,
) -> None:  # fmt: skip
    """Write what `dense_forward`, or with `forced` `forced_forward`, gives.

    Args:
        programs: at most, one for each multiprocessor.
    """
    B, T, H, Dk = q.shape
    S, Hkv, D = k.shape[1], k.shape[2], v.shape[3]
    G, tail = H // Hkv, Dk - D
    boxes = ROWS.value % G == 0
    box = (ROWS.value // G, G) if boxes else (ROWS.value, 1)
    documents = document_pointers(layout, q, "doc_start", "cmp_start")
    num_tiles = triton.cdiv(T * G, GROUPS.value * ROWS.value)
    dense_forward_sm90_kernel[(min(programs, num_tiles * B * Hkv),)](
        *describe_parts(q, D, *box), *describe_parts(k, D, KEYS.value, 1), describe_box(v, KEYS.value, 1),
        describe_box(out, *box), q, out, lse, *documents, scale * LOG2E, T, S, q_start, k_start, num_tiles, B * Hkv,
        G=G, HKV=Hkv, D=D, TAIL=tail, SIZE=geometry.compress_block_size, STRIDE=geometry.compress_stride,
        WINDOW=window, BLOCK=geometry.select_block_size if forced else 0,
        INIT=geometry.num_init_blocks if forced else 0, LOCAL=geometry.num_local_blocks if forced else 0,
        PACKED=layout is not None, LN2=LN2, STAGES=TAIL_STAGES if tail else STAGES, BOXES=boxes, num_warps=4,
    )  # fmt: skip
