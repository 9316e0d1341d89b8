"""The torch backend, stage by stage: equal to the reference, exact in its choices, sound in low precision, linear."""

import itertools
from contextlib import contextmanager
from unittest import mock

import pytest
import torch
from hypothesis import given, settings, strategies as st
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

from drawing import Problem, problems
from nsa import (
    BlockGeometry,
    compressed_attention,
    mean_pool,
    nsa_attention,
    select_blocks,
    selected_attention,
    window_attention,
)
from nsa.ops.call import Call
from nsa.ops.torch_native import selected

ROUTES = ["tiles", "blockwise"]


@contextmanager
def route(name: str):
    """Selected attention takes this route, whatever the shapes."""
    with mock.patch.object(selected, "blockwise_is_cheaper", return_value=name == "blockwise"):
        yield


def results(stage, backend, tensors, *args, **kwargs):
    """Outputs and input gradients of a stage under fixed weights of every output; -inf is left out of the loss."""
    leaves = [x.detach().clone().requires_grad_() for x in tensors]
    outputs = stage(*leaves, *args, backend=backend, **kwargs)
    outputs = outputs if isinstance(outputs, tuple) else (outputs,)
    weighted = [
        (torch.where(torch.isfinite(y), y, 0.0) * torch.linspace(-1, 1, y.numel(), dtype=y.dtype).view_as(y)).sum()
        for y in outputs
        if y.requires_grad
    ]
    loss = sum(weighted) + 0.0 * sum(x.sum() for x in leaves)
    return (*outputs, *torch.autograd.grad(loss, leaves))


def assert_equal_to_reference(stage, tensors, *args, **kwargs):
    expected = results(stage, "reference", tensors, *args, **kwargs)
    for x, y in zip(results(stage, "torch", tensors, *args, **kwargs), expected, strict=True):
        torch.testing.assert_close(x, y, rtol=1e-10, atol=1e-10)


@settings(max_examples=40, deadline=None)
@given(problems(max_length=80), st.sampled_from(ROUTES))
def test_every_stage_equals_the_reference_forward_and_backward(problem: Problem, name: str):
    p, cu, geometry = problem, problem.cu_seqlens, problem.geometry
    assert_equal_to_reference(mean_pool, [p.k], geometry, cu)
    k_cmp, v_cmp = (mean_pool(x, geometry, cu, backend="reference") for x in (p.k, p.v))
    assert_equal_to_reference(compressed_attention, [p.q, k_cmp, v_cmp], geometry, cu_seqlens=cu)
    _, lse = compressed_attention(p.q, k_cmp, v_cmp, geometry, cu_seqlens=cu, backend="reference")
    blocks = select_blocks(p.q, k_cmp, lse, geometry, cu_seqlens=cu, backend="reference")
    assert torch.equal(select_blocks(p.q, k_cmp, lse, geometry, cu_seqlens=cu, backend="torch"), blocks)
    with route(name):
        assert_equal_to_reference(selected_attention, [p.q, p.k, p.v], blocks, geometry, cu_seqlens=cu)
    assert_equal_to_reference(window_attention, [p.q, p.k_win, p.v_win], geometry, cu_seqlens=cu)


@settings(max_examples=20, deadline=None)
@given(problems(max_length=60, packed=False), st.integers(0, 59), st.sampled_from(ROUTES), st.data())
def test_a_prefill_chunk_equals_the_reference(problem: Problem, q_start: int, name: str, data):
    geometry, q_start = problem.geometry, min(q_start, problem.q.shape[1] - 1)
    q, k, v = problem.q[:, q_start:], problem.k, problem.v
    k_cmp, v_cmp = mean_pool(k, geometry, backend="reference"), mean_pool(v, geometry, backend="reference")
    assert_equal_to_reference(compressed_attention, [q, k_cmp, v_cmp], geometry, q_start=q_start)
    _, lse = compressed_attention(q, k_cmp, v_cmp, geometry, q_start=q_start, backend="reference")
    blocks = select_blocks(q, k_cmp, lse, geometry, q_start=q_start, backend="reference")
    assert torch.equal(select_blocks(q, k_cmp, lse, geometry, q_start=q_start, backend="torch"), blocks)
    with route(name):
        assert_equal_to_reference(selected_attention, [q, k, v], blocks, geometry, q_start=q_start)
    k_start = data.draw(st.integers(0, max(0, q_start - geometry.window_size + 1)))
    window = [q, k[:, k_start:], v[:, k_start:]]
    assert_equal_to_reference(window_attention, window, geometry, q_start=q_start, k_start=k_start)


@pytest.mark.parametrize("name", ROUTES)
def test_a_query_without_blocks_gives_zero_and_no_gradient(name):
    geometry = BlockGeometry(4, 2, 4, 4, window_size=4)
    blocks = torch.full((1, 30, 1, 4), -1, dtype=torch.int32)
    blocks[:, 10:, :, 0] = 1
    tensors = [torch.randn(1, 30, n, 4, dtype=torch.float64) for n in (2, 1, 1)]
    with route(name):
        assert_equal_to_reference(selected_attention, tensors, blocks, geometry)
        out, lse = selected_attention(*tensors, blocks, geometry, backend="torch")
    assert torch.all(out[:, :10] == 0)
    assert torch.all(lse[:, :10] == -torch.inf)


@pytest.mark.parametrize("name", ROUTES)
@pytest.mark.parametrize("cu", [None, [0, 3, 3, 12]])
def test_gradients_equal_finite_differences_log_sum_exps_included(name, cu):
    geometry = BlockGeometry(4, 2, 4, 3, window_size=5)
    cu = None if cu is None else torch.tensor(cu, dtype=torch.int32)
    q, k, v = (torch.randn(1, 12, n, d, dtype=torch.float64, requires_grad=True) for n, d in ((4, 2), (2, 2), (2, 3)))
    k_cmp, v_cmp = (mean_pool(x.detach(), geometry, cu).requires_grad_() for x in (k, v))
    blocks = select_blocks(
        q, k_cmp, compressed_attention(q, k_cmp, v_cmp, geometry, cu_seqlens=cu)[1], geometry, cu_seqlens=cu
    )
    options = {"cu_seqlens": cu, "backend": "torch"}

    def finite(out, lse):
        return out, torch.where(torch.isfinite(lse), lse, 0.0)

    def check(stage, *tensors):
        assert torch.autograd.gradcheck(stage, tensors)

    check(lambda x: mean_pool(x, geometry, cu, backend="torch"), k)
    check(lambda *x: finite(*compressed_attention(*x, geometry, **options)), q, k_cmp, v_cmp)
    check(lambda *x: finite(*window_attention(*x, geometry, **options)), q, k, v)
    with route(name):
        check(lambda *x: finite(*selected_attention(*x, blocks, geometry, **options)), q, k, v)


@pytest.mark.parametrize("name", ROUTES)
def test_blocks_after_a_query_are_not_seen(name):
    geometry = BlockGeometry(4, 2, 4, 4, window_size=4)
    blocks = torch.tensor([0, 3, 6, 7], dtype=torch.int32).expand(1, 30, 1, 4)
    tensors = [torch.randn(1, 30, n, 4, dtype=torch.float64) for n in (2, 1, 1)]
    with route(name):
        assert_equal_to_reference(selected_attention, tensors, blocks, geometry)


def noncontiguous(x: torch.Tensor) -> torch.Tensor:
    """The same numbers with other strides: heads outermost in memory."""
    return x.transpose(1, 2).contiguous().transpose(1, 2)


@pytest.mark.parametrize("name", ROUTES)
def test_strides_do_not_matter(name):
    geometry = BlockGeometry(8, 4, 8, 4, window_size=16)
    q, k, v = torch.randn(2, 70, 4, 8), torch.randn(2, 70, 2, 8), torch.randn(2, 70, 2, 6)
    gates = torch.rand(2, 70, 4, 3)
    with route(name):
        expected, actual = (
            results(
                lambda q, k, v, g, **_: nsa_attention(
                    q, k, v, mean_pool(k, geometry), mean_pool(v, geometry), g, geometry, backend="torch"
                ),
                "torch",
                tensors,
            )
            for tensors in ([q, k, v, gates], [noncontiguous(x) for x in (q, k, v, gates)])
        )
    for x, y in zip(actual, expected, strict=True):
        torch.testing.assert_close(x, y)


def plain_attention(q, k, v, visible, scale):
    """Masked attention in the precision of its inputs throughout; `visible` `[B,T,K,S]`."""
    q = q.unflatten(2, (k.shape[2], -1))
    scores = (torch.einsum("btkrd,bskd->btkrs", q, k) * scale).masked_fill(~visible.unsqueeze(3), -torch.inf)
    p = scores.softmax(-1).nan_to_num(0.0)
    return torch.einsum("btkrs,bskd->btkrd", p, v).flatten(2, 3)


@pytest.mark.parametrize("name", ROUTES)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
def test_low_precision_errs_little_more_than_plain_mathematics_in_it(dtype, name):
    """At most twice the error of the plain computation, three times for gradients."""
    torch.manual_seed(0)
    geometry, length = BlockGeometry(16, 8, 16, 6, window_size=48), 200
    exact = [torch.randn(1, length, n, 32, dtype=torch.float64) for n in (8, 2, 2)]
    exact = [x.to(dtype).double() for x in exact]
    weight = torch.randn(1, length, 8, 32, dtype=torch.float64).to(dtype).double()
    t, s = torch.arange(length)[:, None], torch.arange(length)
    k_cmp = mean_pool(exact[1], geometry)
    lse = compressed_attention(exact[0], k_cmp, k_cmp, geometry, backend="reference")[1]
    blocks = select_blocks(exact[0], k_cmp, lse, geometry, backend="reference")
    chosen = (blocks.unsqueeze(-1) == s // 16).any(3) & (s <= t).unsqueeze(1)
    window = ((s <= t) & (s > t - 48)).unsqueeze(1).expand_as(chosen)
    compressed = (s[: k_cmp.shape[1]] * 8 + 15 <= t).unsqueeze(1).expand(1, -1, 2, -1)
    stages = {
        "selected": (lambda *x: selected_attention(*x, blocks, geometry, backend="torch")[0], chosen, length),
        "window": (lambda *x: window_attention(*x, geometry, backend="torch")[0], window, length),
        "compressed": (lambda *x: compressed_attention(*x, geometry, backend="torch")[0], compressed, k_cmp.shape[1]),
    }
    for stage, visible, num_keys in stages.values():
        inputs = [exact[0], exact[1][:, :num_keys], exact[2][:, :num_keys]]

        def run(function, to, inputs=inputs):
            leaves = [x.to(to).requires_grad_() for x in inputs]
            out = function(*leaves)
            return [x.double() for x in (out, *torch.autograd.grad(out, leaves, weight.to(to)))]

        def plain(*x, visible=visible):
            return plain_attention(*x, visible, 32**-0.5)

        truth = run(plain, torch.float64)
        with route(name):
            ours = run(stage, dtype)
        for allowed, x, y, best in zip((2, 3, 3, 3), ours, run(plain, dtype), truth, strict=True):
            assert (x - best).norm() <= allowed * (y - best).norm()


@pytest.mark.parametrize("name", ROUTES)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float64])
def test_logits_of_ten_thousand_do_not_overflow(dtype, name):
    geometry = BlockGeometry(8, 4, 8, 4, window_size=16)
    q, k, v = (
        torch.randn(1, 90, 4, 8, dtype=dtype),
        torch.randn(1, 90, 2, 8, dtype=dtype),
        torch.randn(1, 90, 2, 8, dtype=dtype),
    )
    pool = mean_pool(k, geometry, backend="torch")
    options = {"geometry": geometry, "scale": 3000.0}
    _, lse = compressed_attention(q, pool, pool, **options, backend="torch")
    # One choice for both: importances that underflow to 0 tie here and not there.
    blocks = select_blocks(q, pool, lse, **options, backend="torch")
    with route(name):
        for stage, tensors, extra in (
            (compressed_attention, [q, pool, pool], {}),
            (selected_attention, [q, k, v], {"block_indices": blocks}),
            (window_attention, [q, k, v], {}),
        ):
            values = results(stage, "torch", tensors, **extra, **options)
            assert values[1][torch.isfinite(values[1])].abs().max() > 1e4
            assert all(torch.isfinite(x).all() for x in (values[0], *values[2:]))
            if dtype == torch.float64:
                for x, y in zip(values, results(stage, "reference", tensors, **extra, **options), strict=True):
                    torch.testing.assert_close(x, y, rtol=1e-8, atol=1e-8)


def lowest_blocks(position: int, geometry: BlockGeometry) -> list[int]:
    """The choice where all candidates but the forced ones are equally important."""
    own = position // geometry.select_block_size
    forced = {j for j in range(geometry.num_init_blocks) if j <= own}
    forced |= {own - j for j in range(geometry.num_local_blocks) if own >= j}
    rest = [j for j in range(own + 1) if j not in forced]
    chosen = sorted([*forced, *rest[: geometry.num_selected_blocks - len(forced)]])
    return chosen + [-1] * (geometry.num_selected_blocks - len(chosen))


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
@pytest.mark.parametrize("sizes", [(32, 16, 64, 6), (16, 16, 64, 6), (16, 16, 16, 4, 1, 1), (4, 4, 4, 6, 1, 1)])
@pytest.mark.parametrize("length", [333, 1500])
def test_equal_keys_tie_to_the_lower_block(dtype, sizes, length):
    geometry = BlockGeometry(*sizes)
    q, key = torch.randn(1, length, 6, 64, dtype=dtype), torch.randn(1, 1, 2, 64, dtype=dtype)
    k_cmp = key.expand(1, geometry.num_compressed(length), 2, 64)
    _, lse = compressed_attention(q, k_cmp, k_cmp, geometry, backend="torch")
    blocks = select_blocks(q, k_cmp, lse, geometry, backend="torch")
    expected = torch.tensor([lowest_blocks(t, geometry) for t in range(length)], dtype=torch.int32)
    assert torch.equal(blocks, expected[None, :, None].expand_as(blocks))


def test_fp32_choices_are_those_of_fp64_where_scores_do_not_tie():
    geometry, length = BlockGeometry(), 1600
    q, k = torch.randn(1, length, 8, 64, dtype=torch.float64), torch.randn(1, length, 2, 64, dtype=torch.float64)
    k_cmp = mean_pool(k, geometry)
    _, lse = compressed_attention(q, k_cmp, k_cmp, geometry, backend="torch")
    exact = select_blocks(q, k_cmp, lse, geometry, backend="torch")
    ours = select_blocks(q.float(), k_cmp.float(), lse.float(), geometry, backend="torch")
    assert (ours != exact).any(-1).double().mean() < 1e-3


class Largest(TorchDispatchMode):
    """Records the elements of the largest tensor that any operation makes."""

    def __init__(self) -> None:
        super().__init__()
        self.numel = 0

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        result = func(*args, **(kwargs or {}))
        for leaf in tree_leaves(result):
            if isinstance(leaf, torch.Tensor):
                # Storage, so that an expanded view counts for what it holds.
                self.numel = max(self.numel, leaf.untyped_storage().nbytes() // leaf.element_size())
        return result


def largest_tensor(length: int, packed: bool) -> int:
    """The largest tensor in the bodies of all stages, forward and backward, at a length."""
    import nsa.ops.torch_native as backend

    geometry = BlockGeometry(8, 4, 16, 4, window_size=32)
    q, k, v = (torch.randn(1, length, n, 16) for n in (4, 1, 1))
    cu = torch.tensor([0, length // 2, length], dtype=torch.int32) if packed else None
    packing, call = (cu, geometry), Call(geometry, 0.25, cu)
    with Largest() as largest:
        k_cmp = backend.mean_pool_forward(k, *packing, geometry.max_num_compressed(length))[:, :]
        if cu is None:
            k_cmp = k_cmp[:, : geometry.num_compressed(length)]
        out, lse = backend.compressed_attention_forward(q, k_cmp, k_cmp, call)
        backend.compressed_attention_backward(out, None, q, k_cmp, k_cmp, out, lse, call)
        blocks = backend.select_blocks_forward(q, k_cmp, lse, call)
        out, lse = backend.selected_attention_forward(q, k, v, blocks, call)
        backend.selected_attention_backward(out, None, q, k, v, out, lse, blocks, call)
        out, lse = backend.window_attention_forward(q, k, v, call)
        backend.window_attention_backward(out, None, q, k, v, out, lse, call)
        backend.mean_pool_backward(k_cmp, *packing, length)
    return largest.numel


@pytest.mark.parametrize("packed", [False, True])
def test_no_tensor_grows_faster_than_the_sequence(packed):
    short, long = largest_tensor(2048, packed), largest_tensor(8192, packed)
    assert long <= 4.2 * short
    assert long < 8192 * 8192 // 16 // 2  # half of T x T/l'


def test_results_are_fresh_tensors():
    geometry = BlockGeometry(1, 1, 1, 2, 0, 1, 1)
    x = torch.randn(1, 6, 1, 4)
    cu = torch.tensor([0, 6], dtype=torch.int32)
    for bounds in (None, cu):
        assert mean_pool(x, geometry, bounds, backend="torch").data_ptr() != x.data_ptr()


@pytest.mark.parametrize("lengths", [[0], [0, 0, 0], [1], [7, 0, 1]])
def test_documents_shorter_than_every_block_are_legal(lengths):
    geometry = BlockGeometry(8, 4, 16, 4, window_size=20)
    cu, total = torch.tensor([0, *lengths]).cumsum(0).to(torch.int32), sum(lengths)
    q, k, gates = torch.randn(1, total, 4, 8), torch.randn(1, total, 2, 8), torch.rand(1, total, 4, 3)
    pool = mean_pool(k, geometry, cu, backend="torch")
    assert pool.shape == (1, 0, 2, 8)
    out = nsa_attention(q, k, k, pool, pool, gates, geometry, cu_seqlens=cu, backend="torch")
    assert out.shape == (1, total, 4, 8)
    assert torch.isfinite(out).all()


def test_many_documents_equal_each_alone():
    """Buckets of padded documents, views of equal ones, and gaps between the documents of a bucket."""
    torch.manual_seed(1)
    geometry = BlockGeometry(8, 4, 16, 4, window_size=12)
    lengths = [33, 64, 64, 35, 1, 64, 7, 0, 64, 64, 100, 36, 9]
    cu, total = torch.tensor([0, *lengths]).cumsum(0).to(torch.int32), sum(lengths)
    q, k, v, gates = (torch.randn(1, total, n, d, dtype=torch.float64) for n, d in ((4, 8), (2, 8), (2, 6), (4, 3)))

    def operator(q, k, v, gates, *, backend, cu=None):
        pools = (mean_pool(x, geometry, cu, backend=backend) for x in (k, v))
        return nsa_attention(q, k, v, *pools, gates, geometry, cu_seqlens=cu, backend=backend)

    packed = results(operator, "torch", [q, k, v, gates], cu=cu)
    alone = [
        operator(*(x[:, a:b] for x in (q, k, v, gates)), backend="torch") for a, b in itertools.pairwise(cu) if b > a
    ]
    torch.testing.assert_close(packed[0], torch.cat(alone, dim=1), rtol=1e-10, atol=1e-10)
    for x, y in zip(packed, results(operator, "reference", [q, k, v, gates], cu=cu), strict=True):
        torch.testing.assert_close(x, y, rtol=1e-10, atol=1e-10)
