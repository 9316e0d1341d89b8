"""What the Triton backend promises beside its numbers: operators, graphs, no waiting, repeatable gradients."""

from __future__ import annotations

from itertools import product
from typing import Any

import pytest
import torch
from torch import Tensor

from gpu.planned import plan_for, run_whole
from nsa import BlockGeometry, mean_pool, nsa_attention
from nsa.ops.call import Call
from nsa.ops.routing import choose_backend, explain_backend
from nsa.ops.triton.dense import dkdv_sm90, dq_sm90, forward as dense_forward, forward_sm90 as dense_forward_sm90
from nsa.ops.triton.selected import (
    backward as selected_backward,
    backward_sm90 as selected_backward_sm90,
    forward as selected_forward,
    forward_sm90 as selected_forward_sm90,
    union,
    union_dq_sm90,
    union_sm90,
)
from nsa.ops.triton.topk import choice, scores, scores_sm90

SMALL = BlockGeometry(8, 4, 16, 4, 1, 2, 24)


def inputs(T: int = 300, H: int = 8, Hkv: int = 2, D: int = 64, dtype: torch.dtype = torch.bfloat16) -> list[Tensor]:
    torch.manual_seed(0)
    shapes = [(1, T, H, D), (1, T, Hkv, D), (1, T, Hkv, D), (1, T, H, 3)]
    return [torch.randn(*shape, device="cuda", dtype=dtype, requires_grad=True) for shape in shapes]


def attention(
    q: Tensor, k: Tensor, v: Tensor, gates: Tensor, cu: Tensor | None = None, geometry: BlockGeometry = SMALL,
    unions: bool | None = None,
) -> Tensor:  # fmt: skip
    count = None if cu is None else geometry.max_num_compressed(q.shape[1])
    k_cmp, v_cmp = (mean_pool(x, geometry, cu, num_compressed=count) for x in (k, v))
    if unions is None:
        return nsa_attention(q, k, v, k_cmp, v_cmp, gates, geometry, cu_seqlens=cu)
    plan = plan_for(q, k_cmp, v, geometry, cu, unions=unions)
    return run_whole(plan, (q, k, v, k_cmp, v_cmp, k, v, gates), Call(geometry, q.shape[3] ** -0.5, cu))


def step(*tensors: Tensor, **options: Any) -> list[Tensor]:
    out = attention(*tensors, **options)
    return [out, *torch.autograd.grad(out.float().square().sum(), tensors)]


def test_auto_chooses_triton_on_the_gpu_and_says_why():
    q = inputs()[0]
    assert explain_backend("auto", q) == ("triton", "torch.bfloat16 on a CUDA device")


def test_auto_looks_at_the_values_head_size_too():
    q = inputs()[0]
    assert choose_backend("auto", q, q.repeat(1, 1, 1, 5)) == "torch"


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (lambda q: q.double(), "takes fp16, bf16 and fp32, not torch.float64"),
        (lambda q: q.cpu(), "needs a CUDA device"),
        (lambda q: q.repeat(1, 1, 1, 5), "head sizes up to 256, not 320"),
    ],
)
def test_what_triton_cannot_run_is_an_error_that_says_so(change, message):
    with pytest.raises(ValueError, match=message):
        choose_backend("triton", change(inputs()[0]))


@pytest.mark.parametrize("unions", [False, True])
@pytest.mark.parametrize("geometry", [SMALL, BlockGeometry(8, 4, 64, 5, 1, 2, 24)])
def test_repeated_calls_agree_bit_for_bit_whatever_lay_in_memory(geometry, unions):
    tensors = inputs(T=1200)
    cu = torch.tensor([0, 300, 301, 1100], dtype=torch.int32, device="cuda")
    first = step(*tensors, cu=cu, geometry=geometry, unions=unions)
    torch.use_deterministic_algorithms(True)  # fills new tensors with NaN
    try:
        second = step(*tensors, cu=cu, geometry=geometry, unions=unions)
    finally:
        torch.use_deterministic_algorithms(False)
    for x, y in zip(first, second, strict=True):
        assert torch.equal(x, y)


@pytest.mark.parametrize("group_size", [4, 5])  # whole tokens fill a tile, or not
@pytest.mark.parametrize(("T", "window"), [(200, 24), (900, 300)])  # the second has whole tiles of such tokens
def test_tokens_after_the_last_document_give_zero_and_no_gradient(T, window, group_size):
    tensors = inputs(T=T, H=2 * group_size)
    cu = torch.tensor([0, 60, 130], dtype=torch.int32, device="cuda")
    out, *grads = step(*tensors, cu=cu, geometry=BlockGeometry(8, 4, 16, 4, 1, 2, window))
    assert not out[:, 130:].any()
    for grad in grads:
        assert torch.isfinite(grad).all()
        assert not grad[:, 130:].any()


def test_documents_do_not_see_each_other():
    tensors = inputs(T=200)
    alone = attention(*(x[:, 60:] for x in tensors))
    cu = torch.tensor([0, 60, 200], dtype=torch.int32, device="cuda")
    torch.testing.assert_close(attention(*tensors, cu=cu)[:, 60:], alone, rtol=0, atol=2e-2)


def test_strided_inputs_equal_their_copies():
    q, k, v, gates = inputs()
    wide = torch.cat([q, k, v], dim=2)
    views = [x.detach() for x in wide.split([8, 2, 2], dim=2)]
    assert torch.equal(attention(*views, gates), attention(q, k, v, gates))


def test_large_logits_stay_finite():
    q, k, v, gates = inputs()
    out, *grads = step((q * 200).detach().requires_grad_(), k, v, gates)
    assert all(torch.isfinite(x).all() for x in (out, *grads))


def test_a_step_never_waits_for_the_device():
    tensors = inputs()
    cu = torch.tensor([0, 100, 300], dtype=torch.int32, device="cuda")
    step(*tensors, cu=cu)
    torch.cuda.set_sync_debug_mode("error")
    try:
        step(*tensors, cu=cu)
    finally:
        torch.cuda.set_sync_debug_mode("default")


def test_forward_and_backward_run_in_a_cuda_graph():
    tensors = inputs()
    side = torch.cuda.Stream()
    side.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(side):
        step(*tensors)
    torch.cuda.current_stream().wait_stream(side)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        captured = step(*tensors)
    with torch.no_grad():
        tensors[0].mul_(0.5)
    graph.replay()
    for x, y in zip(captured, step(*tensors), strict=True):
        assert torch.equal(x, y)


def test_compiles_as_one_graph_with_equal_results():
    tensors = inputs()
    compiled = torch.compile(attention, fullgraph=True)
    out = compiled(*tensors)
    grads = torch.autograd.grad(out.float().square().sum(), tensors)
    for x, y in zip((out, *grads), step(*tensors), strict=True):
        torch.testing.assert_close(x, y, rtol=2e-2, atol=2e-2)


def test_every_operator_passes_opcheck():
    q, k, v, gates = inputs(T=100)
    shape, tail = SMALL.as_tuple(), (*Call(SMALL, 0.125).flatten(), "triton")
    ops = torch.ops.nsa
    count = SMALL.num_compressed(100)
    torch.library.opcheck(ops.mean_pool.default, (k, None, shape, count, "triton"))
    k_cmp, v_cmp = (ops.mean_pool(x, None, shape, count, "triton").detach().requires_grad_() for x in (k, v))
    torch.library.opcheck(ops.compressed_attention.default, (q, k_cmp, v_cmp, *tail))
    _, lse = ops.compressed_attention(q, k_cmp, v_cmp, *tail)
    torch.library.opcheck(ops.select_blocks.default, (q.detach(), k_cmp.detach(), lse.detach(), *tail))
    blocks = ops.select_blocks(q.detach(), k_cmp.detach(), lse.detach(), *tail)
    torch.library.opcheck(ops.selected_attention.default, (q, k, v, blocks, *tail))
    torch.library.opcheck(ops.window_attention.default, (q, k, v, *tail))
    torch.library.opcheck(ops.attention.default, (q, k, v, k_cmp, v_cmp, k, v, gates, *tail))


def test_new_lengths_do_not_compile_new_kernels():
    geometry = BlockGeometry(8, 4, 64, 4, 1, 2, 24)

    def run(lengths: tuple[int, ...]) -> None:
        for unions, T in product((False, True), lengths):
            step(*inputs(T=T), geometry=geometry, unions=unions)

    run((300, 301, 333))
    kernels = (
        dense_forward.dense_forward_kernel, dense_forward_sm90.dense_forward_sm90_kernel,
        dkdv_sm90.dense_dkdv_sm90_kernel, dq_sm90.dense_dq_sm90_kernel, selected_forward.selected_forward_kernel,
        selected_forward.selected_reduce_kernel,
        selected_backward.selected_backward_kernel, scores.scores_kernel, choice.choice_kernel, union.union_kernel,
        union_sm90.union_forward_sm90_kernel, union_dq_sm90.union_dq_sm90_kernel,
        scores_sm90.scores_sm90_kernel, selected_forward_sm90.selected_forward_sm90_kernel,
        selected_backward_sm90.selected_backward_sm90_kernel,
    )  # fmt: skip
    before = [sum(len(cache[0]) for cache in kernel.device_caches.values()) for kernel in kernels]
    run((310, 350, 384, 401, 512, 517))
    after = [sum(len(cache[0]) for cache in kernel.device_caches.values()) for kernel in kernels]
    assert all(y <= x + 1 for x, y in zip(before, after, strict=True)), (before, after)


def test_out_of_memory_is_an_error_after_which_everything_works():
    tensors = inputs(T=2000)
    before = step(*tensors)
    torch.cuda.empty_cache()
    total = torch.cuda.get_device_properties(0).total_memory
    large = inputs(T=100_000)
    torch.cuda.set_per_process_memory_fraction((torch.cuda.memory_reserved() + 200 * 2**20) / total)
    try:
        with pytest.raises(torch.OutOfMemoryError):
            step(*large)
    finally:
        torch.cuda.set_per_process_memory_fraction(1.0)
    for x, y in zip(before, step(*tensors), strict=True):
        assert torch.equal(x, y)
    assert all(torch.isfinite(x).all() for x in step(*large))


def test_memory_grows_with_the_length_not_with_its_square():
    geometry = BlockGeometry()
    peaks = []
    for T in (16384, 65536):
        tensors = inputs(T=T, H=4, Hkv=1)
        torch.cuda.reset_peak_memory_stats()
        held = torch.cuda.memory_allocated()
        with torch.no_grad():
            attention(*tensors, geometry=geometry)
        peaks.append(torch.cuda.max_memory_allocated() - held)
    assert peaks[1] < 4.5 * peaks[0]


def test_a_million_tokens_in_one_call():
    tensors = inputs(T=2**20, H=8, Hkv=2)
    with torch.no_grad():
        out = attention(*tensors, geometry=BlockGeometry())
        # The end of a long sequence sees its own window and blocks only: offsets beyond 2**31 elements would miss them.
        assert torch.isfinite(out[:, -64:]).all()
        assert out[:, -64:].float().std() > 0.01
