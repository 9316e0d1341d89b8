"""dK and dV of the compressed and the window branch on Hopper, in Gluon: loads beside products.

As in `backward.py`, a program holds keys and runs over the rows that see them. One warp loads by TMA, or four copy rows
where whole tokens do not fill a tile (BOXES); two groups of four warps hold 64 keys each. A product is issued before
the arithmetic that does not need it: dP under the exponentials, dV under dS.

Shapes, intervals and splits are those of `backward.py`; lse and delta come as rows, see `pack_rows`.
"""

# Kernels are typed by Triton, not by Python.
# pyright: reportArgumentType=false, reportCallIssue=false, reportAttributeAccessIssue=false, reportReturnType=false
# pyright: reportGeneralTypeIssues=false, reportPossiblyUnboundVariable=false
# pyright: reportAssignmentType=false, reportOperatorIssue=false
# No postponed annotations: Triton holds the fields of aggregates against them.

import torch
import triton
import triton.language as tl
from torch import Tensor
from triton.experimental import gluon
from triton.experimental.gluon import language as gl
from triton.experimental.gluon.language.nvidia.ampere import async_copy
from triton.experimental.gluon.language.nvidia.hopper import (
    fence_async_shared,
    mbarrier,
    warpgroup_mma,
    warpgroup_mma_wait,
)
from triton.experimental.gluon.nvidia.hopper import TensorDescriptor
from triton.language.core import _aggregate as aggregate  # public as gluon.aggregate from Triton 3.9 on

from nsa.geometry import BlockGeometry
from nsa.ops.triton.dense.mask_sm90 import InverseMask
from nsa.ops.triton.gpu import LOG2E
from nsa.ops.triton.layout import Layout, document_pointers
from nsa.ops.triton.sm90 import (
    KEYS,
    Shape,
    Tile,
    begin_scores,
    describe_box,
    describe_parts,
    make_companion,
    make_pipe,
    wgmma_layout,
)

GROUPS = gl.constexpr(2)  # groups of four warps with 64 keys each; three would leave too few registers for dK and dV
NUM_ROWS, NUM_TAIL_ROWS = 64, 32  # rows of a step; with keys of 192, more would leave no registers
STAGES = gl.constexpr(3)  # steps in flight


@triton.jit(do_not_specialize=["T", "padded"])
def _pack_rows_kernel(
    lse_ptr, delta_ptr, out_ptr, T, padded, log2e, H: tl.constexpr, HKV: tl.constexpr, BLOCK: tl.constexpr
):
    """Lay out BLOCK rows of a group, log-sum-exps in base 2 and deltas; see `pack_rows`."""
    G: tl.constexpr = H // HKV
    head = tl.program_id(1)
    row = tl.program_id(0) * BLOCK + tl.arange(0, BLOCK)
    live = row < T * G
    source = ((head // HKV).to(tl.int64) * T + row // G) * H + head % HKV * G + row % G
    target = head.to(tl.int64) * padded + row
    tl.store(out_ptr + target, tl.load(lse_ptr + source, mask=live, other=0.0) * log2e, mask=row < padded)
    out_ptr += tl.num_programs(1).to(tl.int64) * padded
    tl.store(out_ptr + target, tl.load(delta_ptr + source, mask=live, other=0.0), mask=row < padded)


def pack_rows(lse: Tensor, delta: Tensor, num_kv_heads: int) -> Tensor:
    """fp32 `[2 * B * Hkv, T * G (padded)]`: log-sum-exp in base 2, then delta, a group's rows one after the other."""
    B, T, H = lse.shape
    padded = triton.cdiv(T * (H // num_kv_heads), 64) * 64
    rows = torch.empty(2 * B * num_kv_heads, padded, dtype=torch.float32, device=lse.device)
    _pack_rows_kernel[(triton.cdiv(padded, 1024), B * num_kv_heads)](
        lse, delta, rows, T, padded, LOG2E, H=H, HKV=num_kv_heads, BLOCK=1024
    )
    return rows


@aggregate
class KeyTile:
    """Keys from `key` on of a group in sequence `b`; the rows from `begin` to `end` see any of the program's."""

    key: gl.tensor
    b: gl.tensor
    group: gl.tensor
    begin: gl.tensor
    end: gl.tensor

    @gluon.constexpr_function
    def __init__(self, key, b, group, begin, end):
        self.key, self.b, self.group, self.begin, self.end = key, b, group, begin, end

    @gluon.jit
    def part(self, PART: gl.constexpr):
        """The keys of a group of four warps."""
        return KeyTile(self.key + PART * KEYS, self.b, self.group, self.begin, self.end)

    @gluon.jit
    def num_steps(self, NUM: gl.constexpr):
        """Steps of NUM rows."""
        return gl.cdiv(gl.maximum(self.end - self.begin, 0), NUM)

    @gluon.jit
    def steps_of(self, rows, NUM: gl.constexpr):
        """The first step with some of `rows`, and the end of these steps."""
        num_steps = self.num_steps(NUM)
        start = gl.minimum(gl.maximum(rows.begin - self.begin, 0) // NUM, num_steps)
        stop = gl.minimum(gl.cdiv(gl.maximum(rows.end - self.begin, 0), NUM), num_steps)
        return start, gl.maximum(stop, start)


@aggregate
class Output:
    """Where the gradients of a split go, `shift` rows from the first split's; dK is multiplied with `scale`."""

    dk_ptr: gl.tensor
    dv_ptr: gl.tensor
    shift: gl.tensor
    scale: gl.tensor

    @gluon.constexpr_function
    def __init__(self, dk_ptr, dv_ptr, shift, scale):
        self.dk_ptr, self.dv_ptr, self.shift, self.scale = dk_ptr, dv_ptr, shift, scale


@gluon.jit
def _load_rows(pipe, line_pipe, x_ptr, step, head, rows, shape):
    """Fill a step's rows, with their log-sum-exps or deltas under the same barrier, once there is room."""
    ROWS: gl.constexpr = line_pipe.smem.shape[2]
    pipe.producer_acquire(step, 4 * ROWS + (pipe.tile_bytes() if shape.BOXES else 0))
    line_pipe.copy(step, [head, rows.row])
    if shape.BOXES:
        pipe.copy(step, shape.box(rows))
    else:
        pipe.copy_rows(step, x_ptr, rows, shape)
        # Every thread arrives when its own copies have: TMA counts bytes, `cp.async` does not.
        async_copy.mbarrier_arrive(pipe.full.index(pipe.buffer(step)), increment_count=False)


@gluon.jit
def _load_partition(k_pipe, v_pipe, q_pipe, lse_pipe, dout_pipe, delta_pipe, q_ptr, dout_ptr, shape, tile):
    """One warp, or four where rows are copied by threads: load the keys and values, and the rows that see them."""
    ROWS: gl.constexpr = lse_pipe.smem.shape[2]
    for part in gl.static_range(GROUPS):
        # Filled once: nobody need have let go of them.
        mbarrier.expect(k_pipe.full.index(part), k_pipe.tile_bytes() + v_pipe.tile_bytes())
        box = [tile.b, tile.part(part).key, tile.group, 0]
        k_pipe.copy(0, box, part)
        v_pipe.copy(0, box, part)
    head = tile.b * shape.HKV + tile.group
    delta_head = lse_pipe.desc.shape[0] // 2 + head
    for step in range(tile.num_steps(ROWS)):
        rows = Tile(tile.begin + step * ROWS, tile.b, tile.group)
        _load_rows(q_pipe, lse_pipe, q_ptr, step, head, rows, shape)
        _load_rows(dout_pipe, delta_pipe, dout_ptr, step, delta_head, rows, shape)


@gluon.jit
def _skip_steps(start, stop, q_pipe, dout_pipe):
    """Let go of steps that only the other part's keys see."""
    for step in range(start, stop):
        # Filled first: else this might count for the stage's step before.
        q_pipe.consumer_wait(step)
        q_pipe.consumer_release(step)
        dout_pipe.consumer_wait(step)
        dout_pipe.consumer_release(step)


@gluon.jit
def _store_keys(x_ptr, x, tile, shift, S, HKV: gl.constexpr, WIDTH: gl.constexpr):
    """Store the gradients of a part's keys to columns of `[splits, B, S, HKV, WIDTH]`."""
    LAYOUT: gl.constexpr = x.type.layout
    key = tile.key + gl.arange(0, KEYS, gl.SliceLayout(1, LAYOUT))
    row_64 = shift + (tile.b.to(gl.int64) * S + key) * HKV + tile.group
    column = gl.arange(0, x.shape[1], gl.SliceLayout(0, LAYOUT))
    gl.store(x_ptr + row_64[:, None] * WIDTH + column[None, :], x.to(x_ptr.dtype.element_ty), mask=(key < S)[:, None])


@gluon.jit
def _key_partition(
    PART: gl.constexpr, output, k_pipe, v_pipe, q_pipe, lse_pipe, dout_pipe, delta_pipe, shape, mask, tile, scale_log2
):
    """Four warps: dK and dV of 64 keys."""
    ROWS: gl.constexpr = lse_pipe.smem.shape[2]
    D: gl.constexpr = shape.D
    TAIL: gl.constexpr = shape.TAIL
    S_LAYOUT: gl.constexpr = wgmma_layout(ROWS)
    K_LAYOUT: gl.constexpr = wgmma_layout(D)
    TAIL_LAYOUT: gl.constexpr = wgmma_layout(64)
    P_LAYOUT: gl.constexpr = gl.DotOperandLayout(0, K_LAYOUT, 2)
    ROW: gl.constexpr = gl.SliceLayout(0, S_LAYOUT)
    dtype: gl.constexpr = q_pipe.smem.dtype
    keys = tile.part(PART)
    rows = mask.of_tile(keys.key, KEYS, shape)
    score_mask = mask.of_keys(rows, keys.key + gl.arange(0, KEYS, gl.SliceLayout(1, S_LAYOUT)), shape)
    start, stop = tile.steps_of(rows, ROWS)
    _skip_steps(0, start, q_pipe, dout_pipe)

    none = gl.zeros([KEYS, ROWS], gl.float32, S_LAYOUT)
    dk = gl.zeros([KEYS, D], gl.float32, K_LAYOUT)
    dv = gl.zeros([KEYS, D], gl.float32, K_LAYOUT)
    k, k_tail, v = k_pipe.tile(0, PART), k_pipe.tail_tile(0, PART), v_pipe.tile(0, PART)
    dk_tail = dk
    if TAIL > 0:
        dk_tail = gl.zeros([KEYS, TAIL], gl.float32, TAIL_LAYOUT)
    k_pipe.consumer_wait(0, PART)  # the part's keys and values
    for step in range(start, stop):
        stage = step % STAGES
        q_pipe.consumer_wait(step)
        if not shape.BOXES:
            fence_async_shared()  # rows were written by threads, the products read them as TMA does
        s = begin_scores(k, k_tail, q_pipe, step, none)
        dout_pipe.consumer_wait(step)
        if not shape.BOXES:
            fence_async_shared()  # the same for gradients
        dout = dout_pipe.tile(step)
        dp = warpgroup_mma(v, dout.permute([1, 0]), none, use_acc=False, is_async=True)
        lse = lse_pipe.smem.index(stage).reshape([ROWS]).load(ROW)
        s = warpgroup_mma_wait(1, deps=[s])  # dP goes on under the exponentials
        p = gl.exp2(s * scale_log2 - lse[None, :])
        p = score_mask.apply(p, tile.begin + step * ROWS, 0.0)
        dv = warpgroup_mma(gl.convert_layout(p.to(dtype), P_LAYOUT), dout, dv, is_async=True)
        dp = warpgroup_mma_wait(1, deps=[dp])  # dV goes on under dS
        delta = delta_pipe.smem.index(stage).reshape([ROWS]).load(ROW)
        fence_async_shared()  # reads of lse and delta come before the next ones arrive
        ds = (p * (dp - delta[None, :])).to(dtype)
        dk = warpgroup_mma(gl.convert_layout(ds, P_LAYOUT), q_pipe.tile(step), dk, is_async=True)
        if TAIL > 0:
            ds = gl.convert_layout(ds, gl.DotOperandLayout(0, TAIL_LAYOUT, 2))
            dk_tail = warpgroup_mma(ds, q_pipe.tail_tile(step), dk_tail, is_async=True)
        # All end here: carried into the next step they would need more registers than there are.
        dv = warpgroup_mma_wait(1 if TAIL == 0 else 2, deps=[dv])
        dout_pipe.consumer_release(step)  # both products that read the gradients are over
        if TAIL > 0:
            dk = warpgroup_mma_wait(1, deps=[dk])
            dk_tail = warpgroup_mma_wait(0, deps=[dk_tail])
        else:
            dk = warpgroup_mma_wait(0, deps=[dk])
        q_pipe.consumer_release(step)
    _skip_steps(stop, tile.num_steps(ROWS), q_pipe, dout_pipe)
    _store_keys(output.dk_ptr, dk * output.scale, keys, output.shift, mask.S, shape.HKV, D + TAIL)
    if TAIL > 0:
        _store_keys(output.dk_ptr + D, dk_tail * output.scale, keys, output.shift, mask.S, shape.HKV, D + TAIL)
    _store_keys(output.dv_ptr, dv, keys, output.shift, mask.S, shape.HKV, D)


@gluon.jit(do_not_specialize=["T", "S", "q_start", "k_start", "split_rows"])
def dense_dkdv_sm90_kernel(
    q_desc, q_tail_desc, k_desc, k_tail_desc, v_desc, dout_desc, row_desc, q_ptr, dout_ptr, dk_ptr, dv_ptr, doc_ptr,
    first_ptr, end_ptr, scale, scale_log2, T, S, q_start, k_start, split_rows,
    G: gl.constexpr, HKV: gl.constexpr, D: gl.constexpr, TAIL: gl.constexpr, SIZE: gl.constexpr, STRIDE: gl.constexpr,
    WINDOW: gl.constexpr, PACKED: gl.constexpr, ROWS: gl.constexpr, BOXES: gl.constexpr,
):  # fmt: skip
    """dK and dV of 128 keys from the rows of a split, ROWS of them a step."""
    k_pipe = make_pipe(k_desc, k_tail_desc, 1, GROUPS, TAIL, 0)
    v_pipe = make_companion(k_pipe, v_desc)
    arrivals: gl.constexpr = 1 if BOXES else 129  # one for lse or delta, and every thread that copies rows
    q_pipe = make_pipe(q_desc, q_tail_desc, STAGES, 1, TAIL, GROUPS, arrivals)
    dout_pipe = make_pipe(dout_desc, dout_desc, STAGES, 1, 0, GROUPS, arrivals)
    lse_pipe = make_companion(q_pipe, row_desc)
    delta_pipe = make_companion(dout_pipe, row_desc)
    fence_async_shared()  # all partitions and TMA see the barriers

    shape = Shape(T, G, HKV, D, TAIL, BOXES)
    split = gl.num_programs(2) - 1 - gl.program_id(2)  # the last rows see most keys: the heaviest first
    row_begin = split * split_rows
    row_end = gl.minimum(row_begin + split_rows, T * G)
    mask = InverseMask(
        doc_ptr, first_ptr, end_ptr, S, q_start, k_start, row_begin, row_end, SIZE, STRIDE, WINDOW, PACKED
    )
    key_start = gl.program_id(0) * (GROUPS * KEYS)
    rows = mask.of_tile(key_start, GROUPS * KEYS, shape)
    tile = KeyTile(key_start, gl.program_id(1) // HKV, gl.program_id(1) % HKV, rows.begin, rows.end)
    shift = split * (gl.num_programs(1) // HKV).to(gl.int64) * S * HKV
    output = Output(dk_ptr, dv_ptr, shift, scale)
    # The last list is registers of a thread, for all but the first partition: what loads needs few of them.
    gl.warp_specialize([
        (_key_partition, (
            0, output, k_pipe, v_pipe, q_pipe, lse_pipe, dout_pipe, delta_pipe, shape, mask, tile, scale_log2,
        )),
        (_key_partition, (
            1, output, k_pipe, v_pipe, q_pipe, lse_pipe, dout_pipe, delta_pipe, shape, mask, tile, scale_log2,
        )),
        (_load_partition, (
            k_pipe, v_pipe, q_pipe, lse_pipe, dout_pipe, delta_pipe, q_ptr, dout_ptr, shape, tile,
        )),
    ], [4, 1 if BOXES else 4], [240 if BOXES else 224, 24 if BOXES else 56])  # fmt: skip


def dense_dkdv_sm90(
    dout: Tensor, q: Tensor, k: Tensor, v: Tensor, lse: Tensor, delta: Tensor, dk: Tensor, dv: Tensor,
    geometry: BlockGeometry, layout: Layout | None, window: int, q_start: int, k_start: int, scale: float,
) -> None:  # fmt: skip
    """Write dk and dv `[splits, B, S, Hkv, D]` of each split's rows."""
    B, T, H, Dk = q.shape
    S, Hkv, D, splits = k.shape[1], k.shape[2], v.shape[3], dk.shape[0]
    G, num_rows = H // Hkv, NUM_TAIL_ROWS if Dk > D else NUM_ROWS
    boxes = num_rows % G == 0
    box = (num_rows // G, G) if boxes else (num_rows, 1)
    rows = pack_rows(lse, delta, Hkv)
    row_layout = gl.NVMMASharedLayout(swizzle_byte_width=0, element_bitwidth=32, rank=2)
    row_desc = TensorDescriptor(rows, list(rows.shape), list(rows.stride()), [1, num_rows], row_layout)
    documents = document_pointers(layout, q, "doc_start", "cmp_token", "doc_end" if window else "cmp_doc_end")
    dense_dkdv_sm90_kernel[(triton.cdiv(S, 2 * KEYS.value), B * Hkv, splits)](
        *describe_parts(q, D, *box), *describe_parts(k, D, KEYS.value, 1), describe_box(v, KEYS.value, 1),
        describe_box(dout, *box), row_desc, q, dout, dk, dv, *documents, scale, scale * LOG2E,
        T, S, q_start, k_start, triton.cdiv(T, splits) * G,
        G=G, HKV=Hkv, D=D, TAIL=Dk - D, SIZE=geometry.compress_block_size, STRIDE=geometry.compress_stride,
        WINDOW=window, PACKED=layout is not None, ROWS=num_rows, BOXES=boxes, num_warps=4,
    )  # fmt: skip
