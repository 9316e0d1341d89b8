"""A kernel with aggregates, as Triton 3.6 and 3.7 take them: out = sum of x_i transposed times x_i, for tiles x_i.

With FAULT it is wrong in one place. Annotations must not be postponed here: Triton holds fields against them.
"""

# Kernels are typed by Triton, not by Python.
# pyright: reportArgumentType=false, reportCallIssue=false, reportAttributeAccessIssue=false, reportIndexIssue=false
# pyright: reportGeneralTypeIssues=false, reportAssignmentType=false
# Lists in kernels are added, not unpacked.
# ruff: noqa: RUF005

from collections.abc import Sequence

import torch
from triton.experimental import gluon
from triton.experimental.gluon import language as gl
from triton.experimental.gluon.language.nvidia.hopper import (
    fence_async_shared,
    mbarrier,
    tma,
    warpgroup_mma,
    warpgroup_mma_wait,
)
from triton.experimental.gluon.nvidia.hopper import TensorDescriptor
from triton.language.core import _aggregate as aggregate


@aggregate
class Pipe:
    """Tiles that one partition fills and another empties, STAGES of them in turn.

    `step` counts the tiles from 0: number `step` lies in stage `step % STAGES`, in round `step // STAGES` of it.
    """

    smem: gl.shared_memory_descriptor
    full: gl.shared_memory_descriptor
    empty: gl.shared_memory_descriptor
    STAGES: gl.constexpr

    @gluon.constexpr_function
    def __init__(self, smem, full, empty, STAGES):
        self.smem, self.full, self.empty = smem, full, empty
        self.STAGES = gl.constexpr(STAGES)

    @gluon.jit
    def fill(self, step, desc, box, BYTES: gl.constexpr):
        """Copy a box once its place is free."""
        stage = step % self.STAGES
        # A stage counts as free before its first round: the parity of the round before the first one is 1.
        mbarrier.wait(self.empty.index(stage), (step // self.STAGES & 1) ^ 1)
        mbarrier.expect(self.full.index(stage), BYTES)
        tma.async_copy_global_to_shared(desc, box, self.full.index(stage), self.smem.index(stage))

    @gluon.jit
    def acquire(self, step):
        """A tile, once it is there."""
        stage = step % self.STAGES
        mbarrier.wait(self.full.index(stage), step // self.STAGES & 1)
        return self.smem.index(stage)

    @gluon.jit
    def release(self, step):
        mbarrier.arrive(self.empty.index(step % self.STAGES), count=1)


@gluon.jit
def make_barriers(NUM: gl.constexpr, ARRIVALS: gl.constexpr):
    barriers = gl.allocate_shared_memory(gl.int64, [NUM, 1], mbarrier.MBarrierLayout())
    for i in gl.static_range(NUM):
        mbarrier.init(barriers.index(i), count=ARRIVALS)
    return barriers


@gluon.jit
def make_pipe(desc, STAGES: gl.constexpr, READERS: gl.constexpr):
    smem = gl.allocate_shared_memory(desc.dtype, [STAGES] + desc.block_shape, desc.layout)
    full = make_barriers(STAGES, 1)
    empty = make_barriers(STAGES, READERS)
    return Pipe(smem, full, empty, STAGES)


@aggregate
class Shape:
    """What both partitions know of the problem."""

    num_steps: gl.tensor
    ROWS: gl.constexpr
    WIDTH: gl.constexpr

    @gluon.constexpr_function
    def __init__(self, num_steps, ROWS, WIDTH):
        self.num_steps = num_steps
        self.ROWS, self.WIDTH = gl.constexpr(ROWS), gl.constexpr(WIDTH)

    @gluon.constexpr_function
    def tile_bytes(self):
        return 2 * self.ROWS * self.WIDTH

    @gluon.jit
    def box(self, step):
        return [step * self.ROWS, 0]


@aggregate
class Work:
    """An aggregate may hold others."""

    shape: Shape
    pipe: Pipe

    @gluon.constexpr_function
    def __init__(self, shape, pipe):
        self.shape, self.pipe = shape, pipe


@gluon.jit
def load_partition(work, x_desc, FAULT: gl.constexpr):
    shape, pipe = work.shape, work.pipe
    for step in range(shape.num_steps):
        if FAULT == "no wait for room":
            mbarrier.expect(pipe.full.index(step % pipe.STAGES), shape.tile_bytes())
            tma.async_copy_global_to_shared(
                x_desc, shape.box(step), pipe.full.index(step % pipe.STAGES), pipe.smem.index(step % pipe.STAGES)
            )
        elif FAULT == "too few bytes":
            pipe.fill(step, x_desc, shape.box(step), shape.tile_bytes() // 2)
        else:
            pipe.fill(step, x_desc, shape.box(step), shape.tile_bytes())


@gluon.jit
def product_partition(work, out_desc, out_smem, FAULT: gl.constexpr):
    shape, pipe = work.shape, work.pipe
    layout: gl.constexpr = gl.NVMMADistributedLayout([3, 0], [4, 1], [16, shape.WIDTH, 16])
    acc = gl.zeros([shape.WIDTH, shape.WIDTH], gl.float32, layout)
    for step in range(shape.num_steps):
        if FAULT == "no wait for data":
            x = pipe.smem.index(step % pipe.STAGES)
        else:
            x = pipe.acquire(step)
        acc = warpgroup_mma(x.permute([1, 0]), x, acc, is_async=True)
        if FAULT == "released too early":
            pipe.release(step)
        acc = warpgroup_mma_wait(0, deps=[acc])
        if FAULT != "released too early" and FAULT != "not released":
            pipe.release(step)
        if FAULT == "a field is set":
            pipe.STAGES = 3
    out_smem.store(acc.to(out_smem.dtype))
    fence_async_shared()
    tma.async_copy_shared_to_global(out_desc, [0, 0], out_smem)
    tma.store_wait(0)


# Not specialised: a number of steps of 1 would be a constant, and no field of type tensor could hold it.
@gluon.jit(do_not_specialize=["num_steps"])
def example_kernel(
    x_desc, out_desc, num_steps, ROWS: gl.constexpr, WIDTH: gl.constexpr, STAGES: gl.constexpr, FAULT: gl.constexpr
):
    shape = Shape(num_steps, ROWS, WIDTH)
    x_pipe = make_pipe(x_desc, STAGES, 2 if FAULT == "two readers awaited" else 1)
    out_smem = gl.allocate_shared_memory(out_desc.dtype, out_desc.block_shape, out_desc.layout)
    fence_async_shared()  # TMA sees the barriers
    work = Work(shape, x_pipe)
    gl.warp_specialize(
        [(product_partition, (work, out_desc, out_smem, FAULT)), (load_partition, (work, x_desc, FAULT))], [1], [24]
    )


@aggregate
class Counter:
    """Counts on by making another of its kind: fields never change."""

    value: gl.tensor
    STEP: gl.constexpr

    @gluon.constexpr_function
    def __init__(self, value, STEP):
        if value is not None:
            self.value = value
        self.STEP = gl.constexpr(STEP)

    @gluon.jit
    def next(self):
        return Counter(self.value + self.STEP, self.STEP)


@gluon.jit(do_not_specialize=["num_steps"])
def count_kernel(out_ptr, num_steps, given, FAULT: gl.constexpr):
    """Write 2 * num_steps + 1."""
    if FAULT == "no constant":
        counter = Counter(num_steps, num_steps)
    elif FAULT == "a barrier for a number":
        counter = Counter(make_barriers(1, 1), 2)
    elif FAULT == "an argument of 1 that is specialised":
        counter = Counter(given, 2)
    elif FAULT == "not set":
        counter = Counter(None, 2)
    else:
        counter = Counter(num_steps - num_steps + 1, 2)
    for _ in range(num_steps):
        counter = counter.next()
    gl.store(out_ptr, counter.value)


def run_example(num_steps: int = 5, fault: str = "", stages: int = 2) -> tuple[torch.Tensor, torch.Tensor]:
    """What the kernel gives and what it should."""
    torch.manual_seed(0)
    x, out = torch.randn(num_steps * 64, 64).half(), torch.zeros(64, 64, dtype=torch.float16)
    example_kernel[(1,)](
        describe(x, [64, 64]), describe(out, [64, 64]), num_steps, ROWS=64, WIDTH=64, STAGES=stages, FAULT=fault,
        num_warps=4,
    )  # fmt: skip
    return out, (x.float().T @ x.float()).half()


def describe(x: torch.Tensor, box: Sequence[int]) -> TensorDescriptor:
    layout = gl.NVMMASharedLayout.get_default_for(list(box), gl.float16)
    return TensorDescriptor(x, list(x.shape), list(x.stride()), list(box), layout)
