"""Importance of the selection blocks on Hopper, in Gluon: the score kernel of `scores.py` with parts side by side.

Four warps gather the queries of the next tile and load compressed keys by TMA. Three groups of four warps take turns at
the keys: one multiplies its 64 keys with the tile's queries while the others take exponentials and store. Sums over a
block's keys stay within a thread, of up to 16 heads a group.

Columns, tiles and what is stored are those of `scores.py`.
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
    mbarrier,
    warpgroup_mma,
    warpgroup_mma_wait,
)
from triton.language.core import _aggregate as aggregate  # public as gluon.aggregate from Triton 3.9 on

from nsa.geometry import BlockGeometry
from nsa.ops.triton.gpu import LOG2E
from nsa.ops.triton.layout import Layout, document_pointers, num_documents, place_of_tile
from nsa.ops.triton.selected.invert import Chunk
from nsa.ops.triton.sm90 import (
    KEYS,
    Pipe,
    Schedule,
    Shape,
    copy_async,
    describe_parts,
    line_layout,
    make_barriers,
    make_pipe,
    wgmma_layout,
)
from nsa.ops.triton.tiles import Tile
from nsa.ops.triton.topk.scores import Scores, tiles_of_chunk

COLUMNS = gl.constexpr(128)  # (head, token) of a tile: scores with 64 keys take 64 registers of a thread
GROUPS = gl.constexpr(3)  # groups of four warps: two take exponentials and store while one multiplies
# Steps in flight; multiples of GROUPS, so that a group waits for every use of its places. Keys of 192 leave room for 3.
STAGES, TAIL_STAGES = 6, 3


@aggregate
class Documents:
    """Where packed documents lie, found in `steps`, and which of N compressed keys their tokens see."""

    cu_ptr: gl.tensor
    cu_cmp_ptr: gl.tensor
    N: gl.tensor
    q_start: gl.tensor
    num_docs: gl.tensor
    steps: gl.tensor
    SIZE: gl.constexpr
    STRIDE: gl.constexpr
    PACKED: gl.constexpr

    @gluon.constexpr_function
    def __init__(self, cu_ptr, cu_cmp_ptr, N, q_start, num_docs, steps, SIZE, STRIDE, PACKED):
        self.cu_ptr, self.cu_cmp_ptr, self.N, self.q_start = cu_ptr, cu_cmp_ptr, N, q_start
        self.num_docs, self.steps = num_docs, steps
        self.SIZE, self.STRIDE, self.PACKED = gl.constexpr(SIZE), gl.constexpr(STRIDE), gl.constexpr(PACKED)

    @gluon.jit
    def num_seen(self, t, doc_start):
        """How many compressed keys of its document a token sees."""
        past = t + self.q_start - doc_start - (self.SIZE - 1)
        return gl.where(past >= 0, past // self.STRIDE + 1, 0)


@aggregate
class Tokens:
    """Tokens of a launch, from `begin` to `end`, in tiles of TOKENS from number `first_tile` on, and its first pair."""

    begin: gl.tensor
    end: gl.tensor
    first_tile: gl.tensor
    pair_start: gl.tensor
    TOKENS: gl.constexpr

    @gluon.constexpr_function
    def __init__(self, begin, end, first_tile, pair_start, TOKENS):
        self.begin, self.end, self.first_tile, self.pair_start = begin, end, first_tile, pair_start
        self.TOKENS = gl.constexpr(TOKENS)


@aggregate
class Place:
    """Where a tile's columns lie: pair of the launch, first token, its document, and that one's first compressed key.

    All of its tokens see keys before `full_end`, some before `end`; 0 if none of the launch are among them.
    """

    pair: gl.tensor
    token: gl.tensor
    doc_start: gl.tensor
    doc_end: gl.tensor
    cmp_start: gl.tensor
    full_end: gl.tensor
    end: gl.tensor

    @gluon.constexpr_function
    def __init__(self, pair, token, doc_start, doc_end, cmp_start, full_end, end):
        self.pair, self.token, self.doc_start, self.doc_end = pair, token, doc_start, doc_end
        self.cmp_start, self.full_end, self.end = cmp_start, full_end, end


@aggregate
class Output:
    """Where a launch's scores go, `[pairs, tokens, width]`; if POOLED those of blocks of BLOCK tokens, else of keys."""

    ptr: gl.tensor
    width: gl.tensor | gl.constexpr  # a constant if it is 1
    BLOCK: gl.constexpr
    POOLED: gl.constexpr

    @gluon.constexpr_function
    def __init__(self, ptr, width, BLOCK, POOLED):
        self.ptr = ptr
        self.width = gl.constexpr(width) if isinstance(width, int) else width
        self.BLOCK, self.POOLED = gl.constexpr(BLOCK), gl.constexpr(POOLED)


@aggregate
class Target:
    """Where a tile's scores go: to rows of `width` of the tokens from `begin` to `end`; the tile begins at `token`."""

    ptr: gl.tensor
    width: gl.tensor | gl.constexpr
    token: gl.tensor
    begin: gl.tensor
    end: gl.tensor
    TOKENS: gl.constexpr

    @gluon.constexpr_function
    def __init__(self, ptr, width, token, begin, end, TOKENS):
        self.ptr, self.token, self.begin, self.end = ptr, token, begin, end
        self.width = gl.constexpr(width) if isinstance(width, int) else width
        self.TOKENS = gl.constexpr(TOKENS)

    @gluon.jit
    def store(self, x, column, SPAN: gl.constexpr):
        """Store the sums over SPAN keys each to columns from `column` on."""
        if SPAN > 1:
            x = gl.sum(x.reshape([KEYS // SPAN, SPAN, self.TOKENS]), 1)
        LAYOUT: gl.constexpr = x.type.layout
        token = self.token + gl.arange(0, self.TOKENS, gl.SliceLayout(0, LAYOUT))
        live = (token >= self.begin) & (token < self.end)
        target = (token - self.begin)[None, :] * self.width + column
        target += gl.arange(0, KEYS // SPAN, gl.SliceLayout(1, LAYOUT))[:, None]
        gl.store(self.ptr + target, x, mask=live[None, :])


@gluon.jit
def _place(schedule, round, documents, tokens, T):
    """Where the columns of a program's tile lie."""
    tile = schedule.tile(round)
    token, doc_start, doc_end, cmp_start = place_of_tile(
        tokens.first_tile + tile.row, documents.cu_ptr, documents.cu_cmp_ptr, T, documents.num_docs, documents.steps,
        tokens.TOKENS, documents.PACKED,
    )  # fmt: skip
    last = gl.minimum(token + tokens.TOKENS, doc_end) - 1
    end = gl.minimum(documents.num_seen(last, doc_start), documents.N - cmp_start)
    full_end = gl.minimum(documents.num_seen(token, doc_start), end)
    live = (token < gl.minimum(doc_end, tokens.end)) & (last >= tokens.begin)
    return Place(tile.b, token, doc_start, doc_end, cmp_start, full_end, gl.where(live, end, 0))


@gluon.jit
def _row_of_column(column, b, group, place, shape, TOKENS: gl.constexpr):
    """Where the (token, head) of a column lies in `[B, T, H]`, and which columns have one."""
    t = place.token + column % TOKENS
    head = column // TOKENS
    first = (b.to(gl.int64) * shape.T + gl.minimum(t, shape.T - 1)) * (shape.G * shape.HKV)
    return first + shape.G * group + gl.minimum(head, shape.G - 1), (t < place.doc_end) & (head < shape.G)


@gluon.jit
def _copy_queries(q_ptr, smem, b, group, place, shape, TOKENS: gl.constexpr):
    """Begin to copy some columns of the queries of a tile, head by head; zeros for what is none."""
    D: gl.constexpr = smem.shape[1]
    LAYOUT: gl.constexpr = line_layout(D)
    column = gl.arange(0, COLUMNS, gl.SliceLayout(1, LAYOUT))
    row, live = _row_of_column(column, b, group, place, shape, TOKENS)
    offsets = row[:, None] * (shape.D + shape.TAIL) + gl.arange(0, D, gl.SliceLayout(0, LAYOUT))[None, :]
    copy_async(smem, q_ptr + offsets, mask=live[:, None])


@gluon.jit
def _load_partition(q_ptr, lse_ptr, q_pipe, lse_smem, k_pipe, shape, documents, tokens, schedule, log2e):
    """Four warps: gather every tile's queries and log-sum-exps, and load its keys."""
    LINE: gl.constexpr = gl.BlockedLayout([1], [32], [4], [0])
    TOKENS: gl.constexpr = tokens.TOKENS
    used = 0  # tiles so far that see any key
    step = 0
    for round in range(schedule.num_rounds()):
        place = _place(schedule, round, documents, tokens, shape.T)
        if place.end > 0:
            b = (tokens.pair_start + place.pair) // shape.HKV
            group = (tokens.pair_start + place.pair) % shape.HKV
            q_pipe.producer_wait(used)
            stage = q_pipe.buffer(used)
            _copy_queries(q_ptr, q_pipe.smem.index(stage), b, group, place, shape, TOKENS)
            if shape.TAIL > 0:
                _copy_queries(q_ptr + shape.D, q_pipe.tail.index(stage), b, group, place, shape, TOKENS)
            row, live = _row_of_column(gl.arange(0, COLUMNS, LINE), b, group, place, shape, TOKENS)
            lse = gl.load(lse_ptr + row, mask=live, other=float("inf")) * log2e
            lse_smem.index(stage).store(lse)
            # Every thread arrives when its own copies have, and once for the log-sum-exps, which all have stored.
            async_copy.mbarrier_arrive(q_pipe.full.index(stage), increment_count=False)
            mbarrier.arrive(q_pipe.full.index(stage), count=1)
            used += 1
            for i in range(gl.cdiv(place.end, KEYS)):
                k_pipe.load(step, [b, place.cmp_start + i * KEYS, group, 0])
                step += 1


@gluon.jit
def _store_scores(
    target, p, key, HEADS: gl.constexpr, SPAN: gl.constexpr, REACH: gl.constexpr, POOLED: gl.constexpr
):  # fmt: skip
    """Store the sums over the heads of a group, or what they give to the blocks; see `scores.py`."""
    # A thread takes neighbouring keys of one token, so that a short block's sum is its own.
    NEAR: gl.constexpr = KEYS * target.TOKENS // 128
    LAYOUT: gl.constexpr = gl.BlockedLayout([NEAR, 1], [KEYS // NEAR, 32 * NEAR // KEYS], [1, 4], [0, 1])
    scores = gl.convert_layout(gl.sum(p.reshape([KEYS, HEADS, target.TOKENS]), 1), LAYOUT)
    if POOLED:
        i = gl.arange(0, KEYS, gl.SliceLayout(1, LAYOUT)) % SPAN
        own = scores * gl.minimum(REACH, SPAN - i).to(gl.float32)[:, None]
        target.store(own, key // SPAN, SPAN)
        if REACH > 1:
            other = scores * gl.maximum(i + REACH - SPAN, 0).to(gl.float32)[:, None]
            target.store(other, target.width // 2 + key // SPAN, SPAN)
    else:
        target.store(scores, key, 1)


@gluon.jit
def _store_step(target, s, lse, key, place, documents, scale_log2, BLOCK: gl.constexpr, POOLED: gl.constexpr):
    """Store what KEYS keys from `key` on give, of which all tokens see those before `place.full_end`."""
    p = gl.exp2(s * scale_log2 - lse[None, :])
    if key + KEYS > place.full_end:
        t = place.token + gl.arange(0, COLUMNS, gl.SliceLayout(0, s.type.layout)) % target.TOKENS
        column_end = documents.num_seen(t, place.doc_start)
        keys = key + gl.arange(0, KEYS, gl.SliceLayout(1, s.type.layout))
        p = gl.where(keys[:, None] < column_end[None, :], p, 0.0)
    SPAN: gl.constexpr = BLOCK // documents.STRIDE
    REACH: gl.constexpr = documents.SIZE // documents.STRIDE
    _store_scores(target, p, key, COLUMNS // target.TOKENS, SPAN, REACH, POOLED)


@gluon.jit
def _key_partition(
    PART: gl.constexpr, output, q_pipe, lse_smem, k_pipe, turns, shape, documents, tokens, schedule, scale_log2
):  # fmt: skip
    """Four warps: the scores of every third step's keys."""
    S_LAYOUT: gl.constexpr = wgmma_layout(COLUMNS)
    COLUMN: gl.constexpr = gl.SliceLayout(0, S_LAYOUT)
    none = gl.zeros([KEYS, COLUMNS], gl.float32, S_LAYOUT)
    used = 0  # tiles so far that see any key
    first_step = 0
    for round in range(schedule.num_rounds()):
        place = _place(schedule, round, documents, tokens, shape.T)
        if place.end > 0:
            num_steps = gl.cdiv(place.end, KEYS)
            last = gl.minimum(tokens.end, place.doc_end)
            pair_ptr = output.ptr + place.pair.to(gl.int64) * (tokens.end - tokens.begin) * output.width
            target = Target(pair_ptr, output.width, place.token, tokens.begin, last, tokens.TOKENS)
            q_pipe.consumer_wait(used)
            fence_async_shared()  # queries were written by threads, the products read them as TMA does
            q, q_tail = q_pipe.tile(used).permute([1, 0]), q_pipe.tail_tile(used).permute([1, 0])
            lse = lse_smem.index(q_pipe.buffer(used)).load(COLUMN)
            for i in range((PART + GROUPS - first_step % GROUPS) % GROUPS, num_steps, GROUPS):
                step = first_step + i
                k_pipe.consumer_wait(step)
                # The products of one group at a time: the step before this one is another group's, which arrives here
                # when it has multiplied. The first group waits for nobody at first, hence its opposite phase.
                mbarrier.wait(turns.index(PART), (step // GROUPS + (PART == 0)) & 1)
                s = warpgroup_mma(k_pipe.tile(step), q, none, use_acc=False, is_async=True)
                if shape.TAIL > 0:
                    s = warpgroup_mma(k_pipe.tail_tile(step), q_tail, s, is_async=True)
                s = warpgroup_mma_wait(0, deps=[s])
                mbarrier.arrive(turns.index((PART + 1) % GROUPS), count=1)  # the next group may multiply
                k_pipe.consumer_release(step)  # the products that read the keys are over
                _store_step(target, s, lse, i * KEYS, place, documents, scale_log2, output.BLOCK, output.POOLED)
            q_pipe.consumer_release(used)
            used += 1
            first_step += num_steps


@gluon.jit
def _make_queries(dtype: gl.constexpr, D: gl.constexpr, TAIL: gl.constexpr):
    """Room for the queries of two tiles, the next one's under the present one's; threads fill it, not TMA."""
    LAYOUT: gl.constexpr = gl.NVMMASharedLayout.get_default_for([COLUMNS, D], dtype)
    smem = gl.allocate_shared_memory(dtype, [2, COLUMNS, D], LAYOUT)
    tail = smem
    if TAIL > 0:
        TAIL_LAYOUT: gl.constexpr = gl.NVMMASharedLayout.get_default_for([COLUMNS, TAIL], dtype)
        tail = gl.allocate_shared_memory(dtype, [2, COLUMNS, TAIL], TAIL_LAYOUT)
    full = make_barriers(2, 129)  # every thread that gathers, and one for the log-sum-exps
    empty = make_barriers(2, GROUPS)
    return Pipe(None, None, smem, tail, full, empty, 2, 1, TAIL)


@gluon.jit(
    do_not_specialize=[
        "T", "N", "q_start", "num_docs", "steps", "pair_start", "token_start", "token_end", "first_tile", "num_tiles",
        "num_pairs",
    ]
)  # fmt: skip
def scores_sm90_kernel(
    q_ptr, k_desc, k_tail_desc, lse_ptr, score_ptr, cu_ptr, cu_cmp_ptr, scale_log2, log2e,
    T, N, q_start, num_docs, steps, pair_start, token_start, token_end, first_tile, num_tiles, num_pairs, width,
    G: gl.constexpr, HKV: gl.constexpr, D: gl.constexpr, TAIL: gl.constexpr, SIZE: gl.constexpr, STRIDE: gl.constexpr,
    BLOCK: gl.constexpr, PACKED: gl.constexpr, POOLED: gl.constexpr, TOKENS: gl.constexpr, STAGES: gl.constexpr,
):  # fmt: skip
    """Scores of a launch's tokens, summed over the heads of each group, by key or by block (POOLED)."""
    shape = Shape(T, G, HKV, D, TAIL, False)
    documents = Documents(cu_ptr, cu_cmp_ptr, N, q_start, num_docs, steps, SIZE, STRIDE, PACKED)
    tokens = Tokens(token_start, token_end, first_tile, pair_start, TOKENS)
    schedule = Schedule(num_tiles, num_pairs, 1, 1)  # one number for a pair: it counts from `pair_start`
    output = Output(score_ptr, width, BLOCK, POOLED)
    q_pipe = _make_queries(k_desc.dtype, D, TAIL)
    k_pipe = make_pipe(k_desc, k_tail_desc, STAGES, 1, TAIL, 1)
    LINE: gl.constexpr = gl.SwizzledSharedLayout(1, 1, 1, order=[0])
    lse_smem = gl.allocate_shared_memory(gl.float32, [2, COLUMNS], LINE)
    turns = make_barriers(GROUPS, 1)
    fence_async_shared()  # all partitions and TMA see the barriers
    # The last list is registers of a thread, for all but the first partition: what loads needs fewer of them.
    gl.warp_specialize([
        (_key_partition, (
            0, output, q_pipe, lse_smem, k_pipe, turns, shape, documents, tokens, schedule, scale_log2,
        )),
        (_key_partition, (
            1, output, q_pipe, lse_smem, k_pipe, turns, shape, documents, tokens, schedule, scale_log2,
        )),
        (_key_partition, (
            2, output, q_pipe, lse_smem, k_pipe, turns, shape, documents, tokens, schedule, scale_log2,
        )),
        (_load_partition, (
            q_ptr, lse_ptr, q_pipe, lse_smem, k_pipe, shape, documents, tokens, schedule, log2e,
        )),
    ], [4, 4, 4], [144, 144, 72])  # fmt: skip


def tile_tokens(group_size: int) -> int:
    """Tokens of a tile."""
    return COLUMNS.value // triton.next_power_of_2(group_size)


def scores_sm90(
    q: Tensor, k_cmp: Tensor, lse: Tensor, scores: Scores, geometry: BlockGeometry, layout: Layout | None,
    chunk: Chunk, q_start: int, scale: float, tile: Tile,
) -> None:  # fmt: skip
    """Write what `plain_scores` gives; `tile` has the tokens of a tile and the most programs."""
    T, H, Dk = q.shape[1:]
    N, Hkv, num_docs = k_cmp.shape[1], k_cmp.shape[2], num_documents(layout)
    D, heads = min(Dk, 128), chunk.num_pairs
    first_tile, num_tiles = tiles_of_chunk(chunk, tile["TOKENS"], num_docs)
    scores_sm90_kernel[(min(tile["programs"], num_tiles * heads),)](
        q, *describe_parts(k_cmp, D, KEYS.value, 1), lse, scores.values,
        *document_pointers(layout, scores.values, "cu_seqlens", "cu_compressed"), scale * LOG2E, LOG2E,
        T, N, q_start, num_docs, (num_docs + 1).bit_length(), chunk.pair, chunk.token, chunk.token_end, first_tile,
        num_tiles, heads, scores.width, G=H // Hkv, HKV=Hkv, D=D, TAIL=Dk - D, SIZE=geometry.compress_block_size,
        STRIDE=geometry.compress_stride, BLOCK=geometry.select_block_size, PACKED=layout is not None,
        POOLED=scores.pooled, TOKENS=tile["TOKENS"], STAGES=TAIL_STAGES if Dk > D else STAGES, num_warps=4,
    )  # fmt: skip
