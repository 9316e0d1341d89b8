"""Dense layers over packed documents on a GPU: varlen_attn against documents in buckets, and what a step launches."""

from __future__ import annotations

import copy

import pytest
import torch
from torch import Tensor
from torch.autograd import DeviceType
from torch.profiler import ProfilerActivity, profile

from nsa.hf import dense_nsa
from tiny_models import tiny_model

TOKENS = 700
ENDS = (1, 130, 130, 400)


def bounds(*ends: int) -> Tensor:
    return torch.tensor([0, *ends, TOKENS], dtype=torch.int32, device="cuda")


@pytest.fixture
def buckets(monkeypatch: pytest.MonkeyPatch):
    """Calls a function with varlen_attn out of reach."""

    def without_varlen(run, *arguments):
        with monkeypatch.context() as patch:
            patch.setattr(dense_nsa, "varlen_serves", lambda q, v: False)
            return run(*arguments)

    return without_varlen


def results(q: Tensor, k: Tensor, v: Tensor, weights: Tensor) -> list[Tensor]:
    """Output of packed attention and the gradients of q, k and v."""
    out = dense_nsa.packed_attention(q, k, v, bounds(*ENDS), 300)
    return [out, *torch.autograd.grad(out, (q, k, v), weights)]


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16], ids=["bf16", "fp16"])
@pytest.mark.parametrize(
    ("heads", "kv_heads", "key_size", "value_size"),
    [(4, 4, 64, 64), (6, 2, 128, 128), (8, 2, 192, 128), (4, 1, 20, 36)],
)
def test_varlen_is_as_near_to_fp64_as_buckets_are(buckets, dtype, heads, kv_heads, key_size, value_size):
    torch.manual_seed(0)
    sizes = [(heads, key_size), (kv_heads, key_size), (kv_heads, value_size)]
    inputs = [torch.randn(1, TOKENS, *size, device="cuda", dtype=dtype).requires_grad_() for size in sizes]
    weights = torch.randn(1, TOKENS, heads, value_size, device="cuda", dtype=dtype)
    assert dense_nsa.varlen_serves(inputs[0], inputs[2])
    exact = buckets(results, *(x.detach().double().requires_grad_() for x in inputs), weights.double())
    plain = buckets(results, *inputs, weights)
    for i, (got, near, true) in enumerate(zip(results(*inputs, weights), plain, exact, strict=True)):
        error, allowed = ((x.double() - true).norm() / true.norm() for x in (got, near))
        assert error <= (3 if i else 2) * allowed + 1e-6, (i, error, allowed)


def step(model, ids: Tensor, documents: Tensor) -> Tensor:
    """Loss of packed documents under autocast, after its backward."""
    model.zero_grad()
    with torch.autocast("cuda", torch.bfloat16):
        loss = model(ids, cu_seqlens=documents, max_length_q=TOKENS, labels=ids).loss
    loss.backward()
    return loss.detach()


@pytest.fixture
def dense_model():
    return tiny_model("full_attention", "sliding_attention", "full_attention", attention_backend="auto").float().cuda()


def test_a_packed_step_compiles_whole_and_never_waits_for_the_gpu(dense_model, buckets):
    torch._dynamo.reset()
    ids = torch.randint(0, dense_model.config.vocab_size, (1, TOKENS), device="cuda")
    compiled = torch.compile(copy.deepcopy(dense_model), fullgraph=True)
    mixes = [bounds(*ENDS), bounds(10, 20, 30), bounds(600, 650)]
    for model in (dense_model, compiled):
        for documents in mixes:  # compiles kernels, which may wait
            step(model, ids, documents)
        torch.cuda.set_sync_debug_mode("error")
        try:
            losses = [step(model, ids, documents) for documents in mixes]
        finally:
            torch.cuda.set_sync_debug_mode("default")
        expected = torch.stack([buckets(step, dense_model, ids, documents) for documents in mixes])
        torch.testing.assert_close(torch.stack(losses), expected, rtol=1e-2, atol=0)
    torch._dynamo.reset()


def test_what_a_packed_step_launches_does_not_depend_on_the_documents(dense_model):
    ids = torch.randint(0, dense_model.config.vocab_size, (1, TOKENS), device="cuda")
    launched = []
    for documents in (bounds(1, 2, 3), bounds(200, 400, 600), bounds(5, 600, 603)):
        step(dense_model, ids, documents)
        with profile(activities=[ProfilerActivity.CUDA]) as profiler:
            step(dense_model, ids, documents)
            torch.cuda.synchronize()
        launched.append(sorted(e.name for e in profiler.events() if e.device_type == DeviceType.CUDA))
    assert launched[0]
    assert launched[0] == launched[1] == launched[2]
