"""The emulator passes a right pipeline under every schedule and finds what is wrong with one."""

# Kernels are typed by Triton, not by Python.
# pyright: reportArgumentType=false, reportCallIssue=false, reportAttributeAccessIssue=false, reportIndexIssue=false
# pyright: reportGeneralTypeIssues=false, reportAssignmentType=false
from __future__ import annotations

from contextlib import nullcontext

import pytest
import torch

pytest.importorskip("triton")

from triton.experimental import gluon
from triton.experimental.gluon import language as gl
from triton.experimental.gluon.language.nvidia.ampere import async_copy
from triton.experimental.gluon.language.nvidia.hopper import (
    fence_async_shared,
    mbarrier,
    tma,
    warpgroup_mma,
    warpgroup_mma_wait,
)
from triton.experimental.gluon.nvidia.hopper import TensorDescriptor

from gluon_emulator import EmulationError, emulate


@gluon.jit
def make_barriers(NUM: gl.constexpr, ARRIVALS: gl.constexpr):
    barriers = gl.allocate_shared_memory(gl.int64, [NUM, 1], mbarrier.MBarrierLayout())
    for i in gl.static_range(NUM):
        mbarrier.init(barriers.index(i), count=ARRIVALS)
    return barriers


# A pipeline of two stages that is right, and with FAULT wrong in one place: out = sum of x_i transposed times x_i, for
# tiles x_i of 64 rows.


@gluon.jit
def _load_partition(x_desc, x_smem, full, empty, num_steps, FAULT: gl.constexpr):
    for i in range(num_steps):
        slot = i % 2
        if FAULT == "parity":
            mbarrier.wait(empty.index(slot), i // 2 & 1)
        elif FAULT != "no wait for room":
            mbarrier.wait(empty.index(slot), (i // 2 & 1) ^ 1)
        if FAULT == "bytes too few":
            mbarrier.expect(full.index(slot), 64 * 64)
        elif FAULT == "bytes too many":
            mbarrier.expect(full.index(slot), 4 * 64 * 64)
        else:
            mbarrier.expect(full.index(slot), 2 * 64 * 64)
        tma.async_copy_global_to_shared(x_desc, [i * 64, 0], full.index(slot), x_smem.index(slot))


@gluon.jit
def _gather_partition(x_ptr, x_smem, full, empty, num_steps, FAULT: gl.constexpr):
    place = gl.arange(0, 64)[:, None] * 64 + gl.arange(0, 64)[None, :]
    if FAULT == "beyond the tensor":
        place += 1
    for i in range(num_steps):
        slot = i % 2
        mbarrier.wait(empty.index(slot), (i // 2 & 1) ^ 1)
        if FAULT == "ordinary store":
            x_smem.index(slot).store(gl.load(x_ptr + i * 4096 + place))
        else:
            async_copy.async_copy_global_to_shared(x_smem.index(slot), x_ptr + i * 4096 + place)
        async_copy.mbarrier_arrive(full.index(slot), increment_count=False)


@gluon.jit
def _product_partition(out_desc, x_smem, out_smem, full, empty, num_steps, GATHER: gl.constexpr, FAULT: gl.constexpr):
    acc = gl.zeros([64, 64], gl.float32)
    for i in range(num_steps):
        slot = i % 2
        if FAULT != "no wait for data":
            mbarrier.wait(full.index(slot), i // 2 & 1)
        if GATHER and FAULT != "no fence after a gather":
            fence_async_shared()
        x = x_smem.index(slot)
        acc = warpgroup_mma(x.permute([1, 0]), x, acc, is_async=True)
        if FAULT == "no fence after a read":
            x.load(None)
        if FAULT == "arrival before the wait":
            mbarrier.arrive(empty.index(slot), count=1)
        if FAULT == "product in flight":
            acc = warpgroup_mma_wait(1, deps=[acc])
        else:
            acc = warpgroup_mma_wait(0, deps=[acc])
        if FAULT != "arrival before the wait" and FAULT != "no arrival":
            mbarrier.arrive(empty.index(slot), count=1)
    out_smem.store(acc.to(out_smem.dtype))
    if FAULT != "no fence before a store":
        fence_async_shared()
    tma.async_copy_shared_to_global(out_desc, [0, 0], out_smem)
    if FAULT == "no wait for the store":
        return
    if FAULT == "written after a store":
        out_smem.store(acc.to(out_smem.dtype))
    tma.store_wait(0)


@gluon.jit
def _pipeline_kernel(x_desc, x_ptr, out_desc, num_steps, GATHER: gl.constexpr, FAULT: gl.constexpr):
    x_smem = gl.allocate_shared_memory(x_desc.dtype, [2, 64, 64], x_desc.layout)
    out_smem = gl.allocate_shared_memory(out_desc.dtype, [64, 64], out_desc.layout)
    full = make_barriers(2, 128 if GATHER else 1)
    empty = make_barriers(2, 2 if FAULT == "count" else 1)
    if FAULT != "no fence after the barriers":
        fence_async_shared()
    work = (_product_partition, (out_desc, x_smem, out_smem, full, empty, num_steps, GATHER, FAULT))
    if GATHER:
        gl.warp_specialize([work, (_gather_partition, (x_ptr, x_smem, full, empty, num_steps, FAULT))], [4], [40])
    else:
        gl.warp_specialize([work, (_load_partition, (x_desc, x_smem, full, empty, num_steps, FAULT))], [1], [24])


def run_pipeline(gather: bool = False, fault: str = "", programs: int = 1) -> tuple[torch.Tensor, torch.Tensor]:
    """What the kernel gives and what it should."""
    torch.manual_seed(0)
    x, out = torch.randn(5 * 64, 64).half(), torch.zeros(64, 64, dtype=torch.float16)
    layout = gl.NVMMASharedLayout.get_default_for([64, 64], gl.float16)
    x_desc, out_desc = (TensorDescriptor(t, list(t.shape), [64, 1], [64, 64], layout) for t in (x, out))
    _pipeline_kernel[(programs,)](x_desc, x, out_desc, 5, GATHER=gather, FAULT=fault, num_warps=4)
    return out, (x.float().T @ x.float()).half()


SCHEDULES = [
    {"seed": 1},
    {"eagerness": 0.0, "order": [0, 1, 2]},  # all as late as possible, products ahead of loads
    {"eagerness": 0.0, "order": [0, 2, 1]},
    {"eagerness": 1.0, "order": [0, 2, 1]},
]


@pytest.mark.parametrize("gather", [False, True])
@pytest.mark.parametrize("schedule", SCHEDULES)
def test_a_right_pipeline_passes_under_every_schedule(gather, schedule):
    with emulate(**schedule):
        torch.testing.assert_close(*run_pipeline(gather), rtol=1e-3, atol=1e-3)


@pytest.mark.parametrize(
    ("gather", "fault", "message"),
    [
        (False, "no wait for data", "nothing was written|race: _product_partition reads x_smem"),
        (False, "no wait for room", "race: _load_partition writes x_smem|more than 1 arrivals"),
        (False, "arrival before the wait", "race: _load_partition writes x_smem .* while _product_partition reads"),
        (False, "parity", "deadlock: .*_load_partition waits for empty"),
        (False, "count", "deadlock: .*1 of 2 arrivals|ends within a phase"),
        (False, "no arrival", "deadlock"),
        (False, "bytes too few", "4096 bytes more than full"),
        (False, "bytes too many", "deadlock: .*8192 bytes to come"),
        (False, "product in flight", "a product that was not waited for|race: _load_partition writes x_smem"),
        (False, "no fence before a store", "no fence between _product_partition writes out_smem"),
        (False, "no fence after the barriers", "no fence after the initialisation of full"),
        (False, "no wait for the store", "before it knows that _product_partition reads out_smem"),
        (False, "written after a store", "race: _product_partition writes out_smem"),
        (False, "no fence after a read", "no fence between _product_partition reads x_smem"),
        (True, "no fence after a gather", "no fence between _gather_partition writes x_smem"),
        (True, "ordinary store", "race: _product_partition reads x_smem"),
        (True, "beyond the tensor", "of 20480"),
    ],
)
def test_every_fault_is_found_under_every_schedule(gather, fault, message):
    for seed in range(8):
        with emulate(seed), pytest.raises(EmulationError, match=message):
            run_pipeline(gather, fault)


@gluon.jit
def _one_load_kernel(x_desc, INVALIDATED: gl.constexpr):
    x_smem = gl.allocate_shared_memory(x_desc.dtype, [64, 64], x_desc.layout)
    full = make_barriers(1, 1)
    fence_async_shared()
    mbarrier.expect(full.index(0), 2 * 64 * 64)
    tma.async_copy_global_to_shared(x_desc, [0, 0], full.index(0), x_smem)
    mbarrier.wait(full.index(0), 0)
    if INVALIDATED:
        mbarrier.invalidate(full.index(0))


@pytest.mark.parametrize("invalidated", [False, True])
def test_a_barrier_of_a_program_without_partitions_must_be_invalidated(invalidated):
    x = torch.zeros(64, 64, dtype=torch.float16)
    layout = gl.NVMMASharedLayout.get_default_for([64, 64], gl.float16)
    error = nullcontext() if invalidated else pytest.raises(EmulationError, match="without invalidating full")
    with emulate(), error:
        _one_load_kernel[(1,)](TensorDescriptor(x, [64, 64], [64, 1], [64, 64], layout), INVALIDATED=invalidated)


def test_programs_that_write_the_same_are_an_error():
    with emulate(), pytest.raises(EmulationError, match="another program or partition writes"):
        run_pipeline(programs=2)


@gluon.jit
def _signal_partition(barrier):
    mbarrier.arrive(barrier, count=1)
    mbarrier.arrive(barrier, count=1)


@gluon.jit
def _wait_partition(barrier):
    mbarrier.wait(barrier, 1)  # the phase before the first counts as over
    mbarrier.wait(barrier, 0)


@gluon.jit
def _phase_kernel(x_ptr):
    barrier = make_barriers(1, 1).index(0)
    gl.warp_specialize([(_wait_partition, (barrier,)), (_signal_partition, (barrier,))], [1], [24])


def test_a_phase_that_passes_a_waiting_partition_is_found():
    messages = []
    for seed in range(20):
        try:
            with emulate(seed):
                _phase_kernel[(1,)](torch.zeros(1))
        except EmulationError as error:
            messages.append(str(error))
    assert any("a phase of barrier[0] passed while _wait_partition waited" in message for message in messages)


@gluon.jit
def _arrival_kernel(x_ptr, ARRIVALS: gl.constexpr):
    mbarrier.arrive(make_barriers(1, 2).index(0), count=ARRIVALS)


@pytest.mark.parametrize(("arrivals", "message"), [(1, "ends within a phase of .*1 of 2"), (3, "more than 2 arrivals")])
def test_arrivals_that_are_not_what_a_barrier_counts_are_an_error(arrivals, message):
    with emulate(), pytest.raises(EmulationError, match=message):
        _arrival_kernel[(1,)](torch.zeros(1), ARRIVALS=arrivals)


@gluon.jit
def _number_kernel(out_ptr, a, b):
    gl.store(out_ptr, a // b)
    gl.store(out_ptr + 1, a % b)
    gl.store(out_ptr + 2, a * b)


def test_integers_truncate_and_do_not_wrap():
    out = torch.zeros(3, dtype=torch.int32)
    with emulate():
        _number_kernel[(1,)](out, -7, 2)
        assert out.tolist() == [-3, -1, -14]
        with pytest.raises(EmulationError, match="does not fit"):
            _number_kernel[(1,)](out, 2**20, 2**12)
        with pytest.raises(EmulationError, match="elements 2 to 2 of 2"):
            _number_kernel[(1,)](out[:2], 7, 2)
