"""Dense attention over packed documents: what goes to varlen_attn on a GPU, and that both ways agree.

varlen_attn has no kernel for the CPU; a plain stand-in computes what it promises here, and holds its arguments against
the kernels' limits. tests/gpu has the true one.
"""

from __future__ import annotations

import inspect
from itertools import pairwise
from types import SimpleNamespace

import pytest
import torch
from torch import Tensor
from torch.nn.attention.varlen import varlen_attn

from nsa.hf import dense_nsa
from nsa.loss import NextTokenLoss
from tiny_models import tiny_model

BOUNDS = torch.tensor([0, 3, 40, 40, 41, 70], dtype=torch.int32)


class PlainVarlen:
    """Softmax over what each query of each document sees, and the `max_seqlen` of every call."""

    def __init__(self) -> None:
        self.longest: list[int] = []

    def __call__(
        self, q: Tensor, k: Tensor, v: Tensor, q_bounds: Tensor, k_bounds: Tensor, max_q: int, max_k: int, **options
    ) -> Tensor:
        inspect.signature(varlen_attn).bind(q, k, v, q_bounds, k_bounds, max_q, max_k, **options)
        assert options.pop("window_size") == (-1, 0)
        assert options.pop("enable_gqa", True)
        scale = options.pop("scale")
        assert not options
        # By identity: cuDNN is causal only where queries and keys have the same bounds.
        assert q_bounds is k_bounds
        assert q_bounds.dtype == torch.int32
        assert max_q == max_k
        assert q.ndim == 3
        assert q.shape[2] == k.shape[2] == v.shape[2]
        assert q.shape[2] % 8 == 0
        assert all(x.stride(2) == 1 for x in (q, k, v))
        assert int(q_bounds.diff().max()) <= max_q
        self.longest.append(max_q)
        k, v = (x.repeat_interleave(q.shape[1] // k.shape[1], dim=1) for x in (k, v))
        out = []
        for start, end in pairwise(q_bounds.tolist()):
            scores = torch.einsum("qhd,khd->hqk", q[start:end], k[start:end]) * scale
            hidden = torch.ones(end - start, end - start, dtype=torch.bool).triu(1)
            weights = scores.masked_fill(hidden, float("-inf")).softmax(dim=-1)
            out.append(torch.einsum("hqk,khd->qhd", weights, v[start:end]))
        return torch.cat(out)


@pytest.fixture
def varlen(monkeypatch: pytest.MonkeyPatch) -> PlainVarlen:
    """As on a GPU, with the stand-in."""
    stand_in = PlainVarlen()
    monkeypatch.setattr(dense_nsa, "varlen_attn", stand_in)
    monkeypatch.setattr(dense_nsa, "varlen_serves", lambda q, v: True)
    return stand_in


def heads(key_size: int, value_size: int) -> list[Tensor]:
    generator = torch.Generator().manual_seed(0)
    sizes = [(4, key_size), (2, key_size), (2, value_size)]
    return [torch.randn(1, 70, *size, generator=generator, dtype=torch.float64).requires_grad_() for size in sizes]


@pytest.mark.parametrize(("key_size", "value_size"), [(16, 16), (24, 16), (8, 16), (6, 10)])
def test_varlen_and_buckets_agree_forward_and_backward(
    varlen: PlainVarlen, monkeypatch: pytest.MonkeyPatch, key_size: int, value_size: int
) -> None:
    inputs, results = heads(key_size, value_size), []
    weights = torch.randn(1, 70, 4, value_size, dtype=torch.float64)
    for served in (True, False):
        monkeypatch.setattr(dense_nsa, "varlen_serves", lambda q, v, served=served: served)
        out = dense_nsa.packed_attention(*inputs, BOUNDS)
        results.append([out, *torch.autograd.grad((out * weights).sum(), inputs)])
    assert varlen.longest == [70]
    for ours, theirs in zip(*results, strict=True):
        torch.testing.assert_close(ours, theirs, rtol=1e-10, atol=1e-12)


def test_a_model_is_told_the_longest_document_by_transformers_collators_and_by_the_loss(varlen: PlainVarlen) -> None:
    model = tiny_model("full_attention", "nsa", "sliding_attention", "full_attention")
    ids = torch.randint(61, (1, 70))
    logits = model(ids, cu_seqlens=BOUNDS).logits
    assert torch.equal(model(ids, cu_seq_lens_q=BOUNDS, max_length_q=37).logits, logits)
    NextTokenLoss(model)(ids.view(2, 35), ids.view(2, 35), torch.tensor([0, 30, 35, 70], dtype=torch.int32)).backward()
    assert varlen.longest == [70, 70, 37, 37, 35, 35]


def test_packed_training_compiles_without_a_break_where_varlen_serves(monkeypatch: pytest.MonkeyPatch) -> None:
    """Traced alone: the stand-in would read the bounds."""
    monkeypatch.setattr(dense_nsa, "varlen_attn", lambda q, k, v, *_, **__: q * k.mean() + v.mean())
    monkeypatch.setattr(dense_nsa, "varlen_serves", lambda q, v: True)
    model = tiny_model("full_attention")
    torch._dynamo.reset()
    compiled = torch.compile(model, backend="eager", fullgraph=True)
    ids = torch.randint(61, (1, 70))
    options = {"input_ids": ids, "cu_seqlens": BOUNDS, "max_length_q": 37, "labels": ids}
    torch.testing.assert_close(compiled(**options).loss, model(**options).loss)
    torch._dynamo.reset()


@pytest.mark.parametrize(
    ("changes", "served"),
    [
        ({}, True),
        ({"dtype": torch.float16}, True),
        ({"dtype": torch.float32}, False),
        ({"value_dtype": torch.float32}, False),
        ({"is_cuda": False}, False),
        ({"size": 256}, True),
        ({"size": 264}, False),
        ({"major": 7}, False),
    ],
)
def test_varlen_serves_half_precision_on_gpus_since_ampere(
    monkeypatch: pytest.MonkeyPatch, changes: dict, served: bool
) -> None:
    facts = {"dtype": torch.bfloat16, "is_cuda": True, "size": 64, "major": 8, **changes}
    properties = SimpleNamespace(major=facts["major"])
    monkeypatch.setattr(torch.cuda, "get_device_properties", lambda device: properties)
    q = SimpleNamespace(is_cuda=facts["is_cuda"], device=None, dtype=facts["dtype"], shape=(1, 5, 2, facts["size"]))
    v = SimpleNamespace(dtype=facts.get("value_dtype", facts["dtype"]), shape=(1, 5, 2, 64))
    assert dense_nsa.varlen_serves(q, v) is served  # pyright: ignore[reportArgumentType]
