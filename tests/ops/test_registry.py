"""The registered operators: correct schemas, fakes and autograd, under torch.compile and selective checkpointing."""

import functools

import pytest
import torch
from torch.utils.checkpoint import CheckpointPolicy, checkpoint, create_selective_checkpoint_contexts

from nsa import BlockGeometry, compressed_attention, mean_pool, nsa_attention, select_blocks
from nsa.ops import torch_native
from nsa.ops.call import Call

GEOMETRY = BlockGeometry(8, 4, 16, 4, window_size=12)
OPS = torch.ops.nsa
DIFFERENTIABLE = ["mean_pool", "compressed_attention", "selected_attention", "window_attention"]


def example(packed: bool):
    """Inputs of every operator: q, k, v, compressed k and v, blocks, cu_seqlens."""
    torch.manual_seed(0)
    cu = torch.tensor([0, 3, 20, 20, 40], dtype=torch.int32) if packed else None
    batch = 1 if packed else 2
    q, k, v = (torch.randn(batch, 40, n, d, requires_grad=True) for n, d in ((4, 8), (2, 8), (2, 6)))
    k_cmp, v_cmp = (mean_pool(x.detach(), GEOMETRY, cu, backend="torch").requires_grad_() for x in (k, v))
    lse = compressed_attention(q, k_cmp, v_cmp, GEOMETRY, cu_seqlens=cu, backend="torch")[1]
    blocks = select_blocks(q, k_cmp, lse, GEOMETRY, cu_seqlens=cu, backend="torch")
    return q, k, v, k_cmp, v_cmp, lse.detach(), blocks, cu


def calls(packed: bool):
    """Every operator of the registry by name with legal arguments."""
    q, k, v, k_cmp, v_cmp, lse, blocks, cu = example(packed)
    geometry, constants = GEOMETRY.as_tuple(), (*Call(GEOMETRY, 0.3, cu).flatten(), "torch")
    forward = {
        "mean_pool": (k, cu, geometry, k_cmp.shape[1], "torch"),
        "compressed_attention": (q, k_cmp, v_cmp, *constants),
        "select_blocks": (q.detach(), k_cmp.detach(), lse, *constants),
        "selected_attention": (q, k, v, blocks, *constants),
        "window_attention": (q, k, v, *constants),
    }
    backward = {"mean_pool_backward": (torch.randn_like(k_cmp), cu, geometry, 40, "torch")}
    for name, rest in (
        ("compressed_attention", constants),
        ("selected_attention", (blocks, *constants)),
        ("window_attention", constants),
    ):
        tensors = [x.detach() for x in forward[name][:3]]
        out, row_lse = getattr(OPS, name)(*(x.detach() if isinstance(x, torch.Tensor) else x for x in forward[name]))
        for kind, dlse in (("", None), (" with dlse", torch.randn_like(row_lse))):
            grads = (torch.randn_like(out), dlse, *tensors, out, row_lse)
            backward[f"{name}_backward{kind}"] = (*grads, *rest)
    return {**forward, **backward}


@pytest.mark.parametrize("packed", [False, True])
@pytest.mark.parametrize("name", list(calls(False)))
def test_opcheck(name, packed):
    torch.library.opcheck(getattr(OPS, name.split()[0]), calls(packed)[name])


def operator(q, k, v, gates, cu, num_compressed, backend="torch"):
    pools = (mean_pool(x, GEOMETRY, cu, num_compressed=num_compressed, backend=backend) for x in (k, v))
    return nsa_attention(q, k, v, *pools, gates, GEOMETRY, cu_seqlens=cu, backend=backend)


@pytest.mark.parametrize("packed", [False, True])
def test_compiled_without_graph_breaks_equals_eager(packed):
    q, k, v, k_cmp, *_, cu = example(packed)
    gates = torch.rand(*q.shape[:3], 3, requires_grad=True)
    compiled = torch.compile(operator, fullgraph=True, backend="aot_eager")
    outputs = [f(q, k, v, gates, cu, k_cmp.shape[1]) for f in (operator, compiled)]
    grads = [torch.autograd.grad(out.sin().sum(), (q, k, v, gates)) for out in outputs]
    for eager, ours in zip((outputs[0], *grads[0]), (outputs[1], *grads[1]), strict=True):
        torch.testing.assert_close(ours, eager, rtol=0, atol=0)


def test_selective_checkpointing_runs_each_kernel_once(monkeypatch):
    q, k, v, k_cmp, *_ = example(False)
    gates = torch.rand(*q.shape[:3], 3)
    count = {}
    for name in [f"{stage}_forward" for stage in (*DIFFERENTIABLE, "select_blocks")]:
        original = getattr(torch_native, name)

        def counted(*args, name=name, original=original):
            count[name] = count.get(name, 0) + 1
            return original(*args)

        monkeypatch.setattr(torch_native, name, counted)
    ours = {getattr(OPS, name).default for name in (*DIFFERENTIABLE, "select_blocks")}

    def save_kernels(context, op, *args, **kwargs):
        return CheckpointPolicy.MUST_SAVE if op in ours else CheckpointPolicy.PREFER_RECOMPUTE

    contexts = functools.partial(create_selective_checkpoint_contexts, save_kernels)
    arguments = (q, k, v, gates, None, k_cmp.shape[1])
    expected = torch.autograd.grad(operator(*arguments).sin().sum(), (q, k, v))
    once = dict(count)
    count.clear()
    out = checkpoint(operator, *arguments, use_reentrant=False, context_fn=contexts)
    actual = torch.autograd.grad(out.sin().sum(), (q, k, v))
    assert count == once
    for x, y in zip(actual, expected, strict=True):
        torch.testing.assert_close(x, y, rtol=0, atol=0)


def test_every_differentiable_stage_of_the_backend_has_its_backward():
    for name in DIFFERENTIABLE:
        assert callable(getattr(torch_native, f"{name}_forward"))
        assert callable(getattr(torch_native, f"{name}_backward"))


def test_a_gradient_of_the_log_sum_exp_alone_flows():
    q, k, v, *_ = example(False)
    _, lse = OPS.window_attention(q, k, v, *Call(GEOMETRY, 0.3).flatten(), "torch")
    dq, dk = torch.autograd.grad(lse.sum(), (q, k))
    assert dq.abs().max() > 0
    assert dk.abs().max() > 0
