"""The loss in chunks equals the plain loss, with gradients, and holds no tensor of all logits."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor, nn
from torch.nn import functional as F
from torch.utils._python_dispatch import TorchDispatchMode

from nsa.loss import NextTokenLoss, chunked_cross_entropy, softmax_step
from tiny_models import tiny_model


def example(num_tokens: int = 37, size: int = 12, vocab_size: int = 101) -> tuple[Tensor, Tensor, Tensor]:
    torch.manual_seed(0)
    hidden = torch.randn(num_tokens, size, dtype=torch.float64, requires_grad=True)
    weight = torch.randn(vocab_size, size, dtype=torch.float64, requires_grad=True)
    labels = torch.randint(0, vocab_size, (num_tokens,))
    labels[::5] = -100
    return hidden, weight, labels


@pytest.mark.parametrize("chunk_tokens", [1, 8, 37, 64])
def test_the_loss_in_chunks_and_its_gradients_are_those_of_the_plain_loss(chunk_tokens: int) -> None:
    hidden, weight, labels = example()
    plain = F.cross_entropy(hidden @ weight.t(), labels, reduction="sum")
    chunked = chunked_cross_entropy(hidden, weight, labels, chunk_tokens)
    torch.testing.assert_close(chunked, plain, rtol=1e-12, atol=0)
    for ours, theirs in zip(
        torch.autograd.grad(chunked * 0.25, (hidden, weight)),
        torch.autograd.grad(plain * 0.25, (hidden, weight)),
        strict=True,
    ):
        torch.testing.assert_close(ours, theirs, rtol=1e-11, atol=1e-12)


def test_under_autocast_the_error_is_that_of_the_plain_loss() -> None:
    """Against fp64: products in bf16, statistics in fp32, on both sides."""
    hidden, weight, labels = example(200, 64, 1000)
    exact = F.cross_entropy(hidden @ weight.t(), labels, reduction="sum")
    exact_grads = torch.autograd.grad(exact, (hidden, weight))
    single, single_weight = (x.detach().float().requires_grad_() for x in (hidden, weight))
    errors = []
    for loss in (
        lambda: F.cross_entropy((single @ single_weight.t()).float(), labels, reduction="sum"),
        lambda: chunked_cross_entropy(single, single_weight, labels, 64),
    ):
        with torch.autocast("cpu", torch.bfloat16):
            value = loss()
        grads = torch.autograd.grad(value, (single, single_weight))
        assert value.dtype == torch.float32
        assert [g.dtype for g in grads] == [torch.float32, torch.float32]
        errors.append(
            [abs(value.item() - exact.item()) / exact.item()]
            + [((g - e).norm() / e.norm()).item() for g, e in zip(grads, exact_grads, strict=True)]
        )
    plain, ours = errors
    assert all(mine <= 2 * theirs + 1e-6 for mine, theirs in zip(ours, plain, strict=True)), (ours, plain)


@pytest.mark.parametrize("tied", [True, False])
def test_a_model_learns_the_same_from_both(tied: bool) -> None:
    """Packed documents, tied and untied output layer: the embedding's gradient has both its parts."""
    model = tiny_model(tie_word_embeddings=tied).train()
    ids = torch.randint(0, 61, (2, 30))
    labels, bounds = torch.randint(0, 61, (2, 30)), torch.tensor([0, 20, 30, 60], dtype=torch.int32)
    labels[0, :3] = -100
    grads = []
    for max_logits in (10**6, 61 * 8):
        model.zero_grad()
        NextTokenLoss(model, max_logits=max_logits)(ids, labels, bounds).backward()
        grads.append({name: p.grad for name, p in model.named_parameters() if p.grad is not None})
    assert set(grads[0]) == set(grads[1]) == {name for name, _ in model.named_parameters()}
    for name in grads[0]:
        torch.testing.assert_close(
            grads[1][name], grads[0][name], rtol=1e-9, atol=1e-11, msg=lambda m, n=name: f"{n}: {m}"
        )


def test_rows_without_bounds_are_documents() -> None:
    model = tiny_model()
    ids, labels = torch.randint(0, 61, (2, 30)), torch.randint(0, 61, (2, 30))
    loss = NextTokenLoss(model)
    packed = loss(ids, labels, torch.tensor([0, 30, 60], dtype=torch.int32))
    torch.testing.assert_close(loss(ids, labels), packed, rtol=1e-10, atol=0)


class LargestTensor(TorchDispatchMode):
    """Remembers the most elements of any result."""

    def __init__(self) -> None:
        super().__init__()
        self.num_elements = 0

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        result = func(*args, **(kwargs or {}))
        if isinstance(result, Tensor):
            self.num_elements = max(self.num_elements, result.numel())
        return result


@pytest.mark.parametrize(("max_logits", "num_calls"), [(61 * 60, 1), (61 * 60 - 1, 0)])
def test_the_output_layer_is_called_as_a_whole_only_where_its_logits_are_few(max_logits: int, num_calls: int) -> None:
    model, calls = tiny_model(), []
    model.lm_head.register_forward_hook(lambda *call: calls.append(call[-1].shape))
    ids = torch.randint(0, 61, (2, 30))
    NextTokenLoss(model, max_logits=max_logits)(ids, ids)
    assert len(calls) == num_calls


@pytest.mark.parametrize("with_gradient", [True, False])
def test_no_tensor_holds_all_logits(with_gradient: bool) -> None:
    hidden, weight, labels = example(256, 8, 500)
    with torch.set_grad_enabled(with_gradient), LargestTensor() as largest:
        loss = chunked_cross_entropy(hidden, weight, labels, 16)
        if with_gradient:
            loss.backward()
    assert 16 * 500 <= largest.num_elements <= 16 * 512


def test_padding_columns_count_for_nothing() -> None:
    logits = torch.randn(3, 8)
    labels = torch.tensor([1, -100, 4])
    nats, gradient = softmax_step(logits, labels, 5)
    expected = F.cross_entropy(logits[:, :5], labels, reduction="sum")
    torch.testing.assert_close(nats, expected)
    assert not gradient[:, 5:].any()
    assert not gradient[1].any()


def test_the_loss_of_a_model_without_output_layer_takes_its_logits() -> None:
    class Uniform(nn.Module):
        def forward(self, input_ids, **_):
            return type("Output", (), {"logits": torch.zeros(*input_ids.shape, 7)})

    loss = NextTokenLoss(Uniform())(torch.zeros(2, 3, dtype=torch.long), torch.ones(2, 3, dtype=torch.long))
    torch.testing.assert_close(loss, 6 * torch.tensor(7.0).log())
