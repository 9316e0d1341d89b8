"""The transformers model on the GPU, where "auto" takes the Triton kernels, against the same model on the CPU."""

from __future__ import annotations

import copy
from collections import Counter

import pytest
import torch
from torch import Tensor
from torch._dynamo.testing import CompileCounterWithBackend
from torch.profiler import ProfilerActivity, profile

from nsa.inspect.selection import record_selection
from tiny_models import tiny_model


@pytest.fixture
def models():
    """One model on the CPU and its copy on the GPU, fp32."""
    torch.manual_seed(0)
    model = tiny_model(attention_backend="auto").float().eval()
    return model, copy.deepcopy(model).cuda()


@torch.no_grad()
def test_logits_of_packed_documents_equal_the_cpus(models):
    cpu, gpu = models
    ids = torch.randint(0, cpu.config.vocab_size, (1, 200))
    cu_seqlens = torch.tensor([0, 3, 90, 90, 200], dtype=torch.int32)
    expected = cpu(input_ids=ids, cu_seqlens=cu_seqlens, use_cache=False).logits
    got = gpu(input_ids=ids.cuda(), cu_seqlens=cu_seqlens.cuda(), use_cache=False).logits
    torch.testing.assert_close(got.cpu(), expected, rtol=1e-3, atol=1e-3)


@torch.no_grad()
def test_greedy_generation_from_left_padding_equals_the_cpus(models):
    cpu, gpu = models
    ids = torch.randint(3, cpu.config.vocab_size, (2, 60))
    mask = torch.ones_like(ids)
    mask[0, :17] = 0
    options = {"max_new_tokens": 20, "do_sample": False, "pad_token_id": 0, "eos_token_id": None}
    expected = cpu.generate(ids, attention_mask=mask, **options)
    got = gpu.generate(ids.cuda(), attention_mask=mask.cuda(), **options)
    assert torch.equal(got.cpu(), expected)


def test_gradients_of_packed_documents_equal_the_cpus(models):
    cpu, gpu = models
    ids = torch.randint(0, cpu.config.vocab_size, (1, 150))
    cu_seqlens = torch.tensor([0, 40, 150], dtype=torch.int32)
    cpu(input_ids=ids, cu_seqlens=cu_seqlens, labels=ids).loss.backward()
    gpu(input_ids=ids.cuda(), cu_seqlens=cu_seqlens.cuda(), labels=ids.cuda()).loss.backward()
    for (name, expected), got in zip(cpu.named_parameters(), gpu.parameters(), strict=True):
        torch.testing.assert_close(
            got.grad.cpu(), expected.grad, rtol=1e-2, atol=1e-4, msg=lambda m, n=name: f"{n}: {m}"
        )


def kernels_of_a_step(model: torch.nn.Module, ids: Tensor, cu_seqlens: Tensor) -> tuple[Counter[str], list[Tensor]]:
    """The kernels that a training step launches, by name, and its logits and gradients."""
    model.zero_grad()
    torch.cuda.synchronize()
    with profile(activities=[ProfilerActivity.CUDA]) as profiler:
        result = model(ids, labels=ids, cu_seqlens=cu_seqlens, use_cache=False)
        result.loss.backward()
        torch.cuda.synchronize()
    launched = Counter(event.name for event in profiler.events() if event.device_type.name == "CUDA")
    return launched, [result.logits, *(x.grad for x in model.parameters())]


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_a_watched_model_launches_the_same_kernels_with_the_same_results(models, dtype):
    model = models[1].to(dtype)
    ids = torch.randint(0, model.config.vocab_size, (1, 300), device="cuda")
    cu_seqlens = torch.tensor([0, 40, 300], dtype=torch.int32, device="cuda")
    kernels_of_a_step(model, ids, cu_seqlens)  # compiles
    kernels, plain = kernels_of_a_step(model, ids, cu_seqlens)
    with record_selection(model, on_device=True) as blocks:
        watched_kernels, watched = kernels_of_a_step(model, ids, cu_seqlens)
    assert len(blocks) == 2
    assert any("forward" in name for name in kernels)
    assert watched_kernels == kernels
    for x, y in zip(watched, plain, strict=True):
        assert torch.equal(x, y)


@pytest.mark.parametrize("packed", [False, True])
def test_training_compiles_once_for_the_first_length_and_once_for_all_others(models, packed):
    _, model = models
    torch._dynamo.reset()
    counter = CompileCounterWithBackend("inductor")
    compiled = torch.compile(model, backend=counter, fullgraph=True)
    for length in (70, 91, 128, 150, 333):
        ids = torch.randint(0, model.config.vocab_size, (1, length), device="cuda")
        ends = [0, 20, 40, length] if length % 2 else [0, 31, length]
        options = {"cu_seqlens": torch.tensor(ends, dtype=torch.int32, device="cuda")} if packed else {}
        losses = []
        for forward in (model, compiled):
            model.zero_grad()
            loss = forward(ids, labels=ids, **options).loss
            loss.backward()
            losses.append(loss.detach())
        torch.testing.assert_close(*losses, rtol=1e-3, atol=1e-3)
    assert counter.frame_count <= 2 + packed
