"""Forward of the selected branch over unions of blocks on Hopper, in Gluon: three groups of rows share every load.

As in `dense/forward_sm90.py`, a program is persistent, one warp loads by TMA, and groups of four warps hold 64 rows
(token, head) each: TOKENS whole tokens, so that a tile and its union have three times as many. A group skips the blocks
that none of its own tokens chose; of the others each row takes those of its token. A block that all rows lie behind
needs no mask by key.

Shapes and unions are those of `union.py`; `nsa.ops.triton.plan` says which shapes come here.
"""

# Kernels are typed by Triton, not by Python.
# pyright: reportArgumentType=false, reportCallIssue=false, reportAttributeAccessIssue=false, reportReturnType=false
# pyright: reportGeneralTypeIssues=false, reportPossiblyUnboundVariable=false
# pyright: reportAssignmentType=false, reportOperatorIssue=false
# Triton holds fields of aggregates against their annotations, which therefore may not be postponed.

from torch import Tensor
from triton.experimental import gluon
from triton.experimental.gluon import language as gl
from triton.experimental.gluon.language.nvidia.ampere import async_copy
from triton.experimental.gluon.language.nvidia.hopper import fence_async_shared, tma, warpgroup_mma, warpgroup_mma_wait
from triton.language.core import _aggregate as aggregate  # public as gluon.aggregate from Triton 3.9 on

from nsa.geometry import BlockGeometry
from nsa.ops.triton.dense.forward_sm90 import GROUPS, STAGES, TAIL_STAGES
from nsa.ops.triton.gates import Gated, add_branches, gate_pointers
from nsa.ops.triton.gpu import LN2, LOG2E
from nsa.ops.triton.selected.parts_sm90 import Part, Shape, Unions, tokens_of_part
from nsa.ops.triton.sm90 import (
    KEYS,
    ROWS,
    begin_scores,
    describe_box,
    describe_parts,
    line_layout,
    make_pipe,
    tma_store,
)

MIN_HEADS = 3  # of a group: a tile's tokens are then no more than a mask has bits


def tile_tokens(group_size: int) -> int:
    """Tokens of a tile."""
    return GROUPS.value * (ROWS.value // group_size)


@aggregate
class Output:
    """The branch's output and log-sum-exps."""

    ptr: gl.tensor
    desc: tma.tensor_descriptor
    lse_ptr: gl.tensor

    @gluon.constexpr_function
    def __init__(self, ptr, desc, lse_ptr):
        self.ptr, self.desc, self.lse_ptr = ptr, desc, lse_ptr


@aggregate
class GatedSum:
    """The other branches, the gates, and where the gated sum goes; without GATED all of it stands for nothing."""

    cmp_ptr: gl.tensor
    win_ptr: gl.tensor
    gate_ptr: gl.tensor
    ptr: gl.tensor
    desc: tma.tensor_descriptor
    GATED: gl.constexpr

    @gluon.constexpr_function
    def __init__(self, cmp_ptr, win_ptr, gate_ptr, ptr, desc, GATED):
        self.cmp_ptr, self.win_ptr, self.gate_ptr = cmp_ptr, win_ptr, gate_ptr
        self.ptr, self.desc = ptr, desc
        self.GATED = gl.constexpr(GATED)


@aggregate
class Softmax:
    """Running maximum, in base 2, and sum of the rows' exponentials."""

    row_max: gl.tensor
    row_sum: gl.tensor

    @gluon.constexpr_function
    def __init__(self, row_max, row_sum):
        self.row_max, self.row_sum = row_max, row_sum

    @gluon.jit
    def step(self, s, chosen, scale_log2):
        """One step of the online softmax: itself, the exponentials, and alpha, by which earlier results fade."""
        row_max = gl.where(chosen, gl.maximum(self.row_max, gl.max(s, 1) * scale_log2), self.row_max)
        # Rows that have seen no key yet: -inf less -inf would be NaN.
        safe = gl.where(row_max == float("-inf"), 0.0, row_max)
        p = gl.exp2(s * scale_log2 - gl.where(chosen, safe, float("inf"))[:, None])
        alpha = gl.exp2(self.row_max - safe)
        return Softmax(row_max, self.row_sum * alpha + gl.sum(p, 1)), p, alpha


@gluon.jit
def _load_partition(shape, unions, queries, keys, values):
    """The warp that loads: a tile's queries, then the keys and values of every block of its union."""
    step = 0
    for round in range(shape.num_rounds()):
        token, b, group = shape.tile_of_round(round)
        starts, _masks, count = unions.of_tile(shape, token, b, group)
        # Tiles without any block take one step, all of it masked.
        key_start = gl.where(count > 0, gl.load(starts), 0)
        for part in gl.static_range(shape.PARTS if shape.BOXES else 0):
            queries.load(round, [b, token + part * shape.TOKENS, group * shape.G, 0], part)
        for i in range(gl.maximum(count, 1)):
            next_start = gl.load(starts + gl.maximum(gl.minimum(i + 1, count - 1), 0))  # long before it is needed
            box = [b, key_start, group, 0]
            keys.load(step, box)
            values.load(step, box)
            step += 1
            key_start = next_start


@gluon.jit
def _mask_keys(s, key_start, end, plain_end, LAYOUT: gl.constexpr):
    """Scores without those of keys from each row's `end` on; blocks before `plain_end` have none."""
    if key_start + KEYS > plain_end:
        key = key_start + gl.arange(0, KEYS, gl.SliceLayout(0, LAYOUT))
        s = gl.where(key[None, :] < end[:, None], s, float("-inf"))
    return s


@gluon.jit
def _add_values(p, values, step, acc):
    """Begin to add a step's values, once they are there, weighted by p."""
    values.consumer_wait(step)  # until TMA has written them
    return warpgroup_mma(p, values.tile(step), acc, is_async=True)


@gluon.jit
def _attend(
    q, q_tail, keys, values, step, starts, masks, count, part, scale_log2, PART: gl.constexpr, S_LAYOUT: gl.constexpr,
    O_LAYOUT: gl.constexpr,
):  # fmt: skip
    """Sum of values and softmax of a part's rows over its tile's blocks, and the number of the next step.

    The values of a step are multiplied beside the scores of the next one that the part takes.
    """
    D: gl.constexpr = part.shape.D
    TOKENS: gl.constexpr = part.shape.TOKENS
    ROW: gl.constexpr = gl.SliceLayout(1, S_LAYOUT)
    P_LAYOUT: gl.constexpr = gl.DotOperandLayout(0, O_LAYOUT, 2)
    dtype: gl.constexpr = q.dtype
    bit = part.bits(ROW)
    end = part.token + bit + part.shape.q_start + 1
    plain_end = part.token + part.shape.q_start + 1
    none = gl.zeros([ROWS, KEYS], gl.float32, S_LAYOUT)
    acc = gl.zeros([ROWS, D], gl.float32, O_LAYOUT)
    softmax = Softmax(gl.full([ROWS], float("-inf"), gl.float32, ROW), gl.zeros([ROWS], gl.float32, ROW))
    key_start = gl.where(count > 0, gl.load(starts), 0)
    mine = tokens_of_part(gl.load(masks), PART, TOKENS)
    next_start, next_mask = gl.load(starts + 1), gl.load(masks + 1)  # long before they are needed
    held = step  # the step whose values are still to be multiplied
    keys.consumer_wait(step)  # until TMA has written them
    s = begin_scores(q, q_tail, keys, step, none)
    s = warpgroup_mma_wait(0, deps=[s])
    keys.consumer_release(step)  # the product has read them: the loading warp may go on
    s = _mask_keys(s, key_start, end, plain_end, S_LAYOUT)
    softmax, p, _alpha = softmax.step(s, (mine >> bit & 1) != 0, scale_log2)
    p = gl.convert_layout(p.to(dtype), P_LAYOUT)
    for i in range(1, count):
        key_start = next_start
        mine = tokens_of_part(next_mask, PART, TOKENS)
        ahead = gl.minimum(i + 1, count - 1)
        next_start, next_mask = gl.load(starts + ahead), gl.load(masks + ahead)
        step += 1
        keys.consumer_wait(step)  # until TMA has written them
        # Held values keep their stage: the loads come no further than to this step.
        if (mine != 0) | (step - held == keys.STAGES):
            s = begin_scores(q, q_tail, keys, step, none)
            acc = _add_values(p, values, held, acc)
            s = warpgroup_mma_wait(1, deps=[s])  # the scores alone: the values' product was begun after them
            keys.consumer_release(step)  # the product has read them
            s = _mask_keys(s, key_start, end, plain_end, S_LAYOUT)
            softmax, fresh, alpha = softmax.step(s, (mine >> bit & 1) != 0, scale_log2)
            acc = warpgroup_mma_wait(0, deps=[acc])
            values.consumer_release(held)  # the product has read them
            acc = acc * gl.convert_layout(alpha, gl.SliceLayout(1, O_LAYOUT))[:, None]
            p = gl.convert_layout(fresh.to(dtype), P_LAYOUT)
            held = step
        else:
            values.consumer_wait(step)  # else this arrival might count for the stage's round before
            keys.consumer_release(step)  # none of the part's tokens chose the block
            values.consumer_release(step)
    acc = _add_values(p, values, held, acc)
    acc = warpgroup_mma_wait(0, deps=[acc])
    values.consumer_release(held)  # the product has read them
    return acc, softmax, step + 1


@gluon.jit
def _send(x, desc, ptr, queries, round, part, PART: gl.constexpr):
    """Write a part's results by way of its queries' buffer, as these are done with; TMA is not waited for."""
    D: gl.constexpr = part.shape.D
    LAYOUT: gl.constexpr = line_layout(D)
    tile = queries.tile(round, PART)
    tile.store(x.to(tile.dtype))
    if part.shape.BOXES:
        fence_async_shared()  # threads wrote what TMA reads
        tma_store(desc, part.box(), queries.smem.index(queries.buffer(round, PART)))
    else:
        offsets, live = part.offsets(D, D, LAYOUT)
        gl.store(ptr + offsets, tile.load(LAYOUT), mask=live)


@gluon.jit
def _write_results(
    acc, softmax, queries, output, gated, round, part, PART: gl.constexpr, LN2: gl.constexpr, O_LAYOUT: gl.constexpr
):
    """Write a part's log-sum-exps, output and gated sum."""
    BOXES: gl.constexpr = part.shape.BOXES
    D: gl.constexpr = part.shape.D
    ROW: gl.constexpr = softmax.row_sum.type.layout
    row_sum = softmax.row_sum
    # Rows that saw no key have output 0 and log-sum-exp -inf.
    share = 1.0 / gl.where(row_sum == 0.0, 1.0, row_sum)
    lse = gl.where(row_sum == 0.0, float("-inf"), (softmax.row_max + gl.log2(row_sum)) * LN2)
    row, live = part.rows(ROW)
    gl.store(output.lse_ptr + row, lse, mask=live)
    acc = acc * gl.convert_layout(share, gl.SliceLayout(1, O_LAYOUT))[:, None]
    _send(acc, output.desc, output.ptr, queries, round, part, PART)
    if gated.GATED:
        row = gl.convert_layout(row, gl.SliceLayout(1, O_LAYOUT))
        live = gl.convert_layout(live, gl.SliceLayout(1, O_LAYOUT))
        column = row[:, None] * D + gl.arange(0, D, gl.SliceLayout(0, O_LAYOUT))[None, :]
        acc = add_branches(acc, gated.cmp_ptr, gated.win_ptr, gated.gate_ptr, row, column, live)
        if BOXES:
            tma.store_wait(0)  # TMA has read the output: the sum may take its place
        _send(acc, gated.desc, gated.ptr, queries, round, part, PART)
    if BOXES:
        tma.store_wait(0)  # TMA has read the buffer
        queries.consumer_release(round, PART)  # and the loading warp may fill it


@gluon.jit
def _row_partition(
    PART: gl.constexpr, shape, unions, queries, keys, values, q_ptr, output, gated, scale_log2, LN2: gl.constexpr
):
    """Four warps with a part of every tile."""
    S_LAYOUT: gl.constexpr = gl.NVMMADistributedLayout([3, 0], [4, 1], [16, KEYS, 16])
    O_LAYOUT: gl.constexpr = gl.NVMMADistributedLayout([3, 0], [4, 1], [16, shape.D, 16])
    step = 0
    num_rounds = shape.num_rounds()
    if not shape.BOXES:
        shape.part_of_round(0, PART).copy_rows(q_ptr, queries, 0, PART)
        async_copy.commit_group()
    for round in range(num_rounds):
        token, b, group = shape.tile_of_round(round)
        starts, masks, count = unions.of_tile(shape, token, b, group)
        part = Part(shape, token + PART * shape.TOKENS, b, group)
        if shape.BOXES:
            queries.consumer_wait(round, PART)  # until TMA has written them
        else:
            async_copy.wait_group(0)
            fence_async_shared()  # threads wrote what products read
            if round + 1 < num_rounds:
                shape.part_of_round(round + 1, PART).copy_rows(q_ptr, queries, round + 1, PART)
                async_copy.commit_group()
        q, q_tail = queries.tile(round, PART), queries.tail_tile(round, PART)
        acc, softmax, step = _attend(
            q, q_tail, keys, values, step, starts, masks, count, part, scale_log2, PART, S_LAYOUT, O_LAYOUT
        )
        _write_results(acc, softmax, queries, output, gated, round, part, PART, LN2, O_LAYOUT)


@gluon.jit(do_not_specialize=["T", "q_start", "num_tiles", "num_pairs"])
def union_forward_sm90_kernel(
    q_desc, q_tail_desc, k_desc, k_tail_desc, v_desc, out_desc, sum_desc, q_ptr, out_ptr, lse_ptr, cmp_ptr, win_ptr,
    gate_ptr, sum_ptr, start_ptr, mask_ptr, count_ptr, scale_log2, T, q_start, num_tiles, num_pairs,
    G: gl.constexpr, HKV: gl.constexpr, D: gl.constexpr, TAIL: gl.constexpr, TOKENS: gl.constexpr, COUNT: gl.constexpr,
    GATED: gl.constexpr, LN2: gl.constexpr, STAGES: gl.constexpr, BOXES: gl.constexpr,
):  # fmt: skip
    """Output and log-sum-exps of the selected branch, and with GATED the gated sum of the branches."""
    shape = Shape(T, q_start, num_tiles, num_pairs, G, HKV, D, TAIL, TOKENS, GROUPS, BOXES)
    unions = Unions(start_ptr, mask_ptr, count_ptr, COUNT)
    keys = make_pipe(k_desc, k_tail_desc, STAGES, 1, TAIL, GROUPS)
    values = make_pipe(v_desc, v_desc, STAGES, 1, 0, GROUPS)
    # Two stages: the next tile's queries arrive under the present one. The last pipe, as without BOXES nobody uses its
    # barriers, whose place goes to what is allocated later.
    queries = make_pipe(q_desc, q_tail_desc, 2, GROUPS, TAIL, 1)
    output = Output(out_ptr, out_desc, lse_ptr)
    gated = GatedSum(cmp_ptr, win_ptr, gate_ptr, sum_ptr, sum_desc, GATED)
    fence_async_shared()  # TMA sees the barriers
    # Registers a thread, of 65,536 / 128 in four groups of warps: the loading warp leaves its own to the rows.
    gl.warp_specialize([
        (_row_partition, (0, shape, unions, queries, keys, values, q_ptr, output, gated, scale_log2, LN2)),
        (_row_partition, (1, shape, unions, queries, keys, values, q_ptr, output, gated, scale_log2, LN2)),
        (_row_partition, (2, shape, unions, queries, keys, values, q_ptr, output, gated, scale_log2, LN2)),
        (_load_partition, (shape, unions, queries, keys, values)),
    ], [4, 4, 1], [160, 160, 24])  # fmt: skip


def union_forward_sm90(
    q: Tensor, k: Tensor, v: Tensor, out: Tensor, lse: Tensor, starts: Tensor, masks: Tensor, counts: Tensor,
    geometry: BlockGeometry, q_start: int, scale: float, gated: Gated | None, programs: int,
) -> None:  # fmt: skip
    """Write what `union_forward` gives, and the gated sum.

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
    branches = gate_pointers(gated, out)
    union_forward_sm90_kernel[(min(programs, num_tiles * B * Hkv),)](
        *describe_parts(q, D, *box), *describe_parts(k, D, KEYS.value, 1), describe_box(v, KEYS.value, 1),
        describe_box(out, *box), describe_box(branches.out, *box), q, out, lse, *branches, starts, masks, counts,
        scale * LOG2E, T, q_start, num_tiles, B * Hkv,
        G=G, HKV=Hkv, D=D, TAIL=tail, TOKENS=ROWS.value // G, COUNT=geometry.num_selected_blocks,
        GATED=gated is not None, LN2=LN2, STAGES=TAIL_STAGES if tail else STAGES, BOXES=boxes, num_warps=4,
    )  # fmt: skip
