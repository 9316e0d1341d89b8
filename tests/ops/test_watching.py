"""To watch a model changes nothing: the same operators run, and give the same outputs and gradients."""

from __future__ import annotations

from collections import Counter
from typing import Any

import pytest
import torch
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode

from fused_backend import stand_in_for_triton
from nsa import BlockGeometry, mean_pool, nsa_attention
from nsa.inspect.selection import record_selection
from nsa.ops.call import Call
from nsa.ops.routing import operators_of
from tiny_models import tiny_model

GEOMETRY = BlockGeometry(8, 4, 16, 4, window_size=12)


class Operators(TorchDispatchMode):
    """Counts the calls of our operators."""

    def __init__(self) -> None:
        super().__init__()
        self.calls: Counter[str] = Counter()

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        if func.namespace == "nsa":
            self.calls[func.name()] += 1
        return func(*args, **(kwargs or {}))


@pytest.fixture(params=["torch", "triton"])
def backend(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> str:
    """One that goes by stages, and one with an operator for all of them."""
    if request.param == "triton":
        stand_in_for_triton(monkeypatch)
    return request.param


def step(model: torch.nn.Module, ids: Tensor, cu_seqlens: Tensor | None) -> tuple[list[Tensor], Counter[str]]:
    """Logits and gradients, and the operators that ran."""
    model.zero_grad()
    with Operators() as operators:
        result = model(ids, labels=ids, cu_seqlens=cu_seqlens, use_cache=False)
        result.loss.backward()
    return [result.logits, *(x.grad for x in model.parameters())], operators.calls


@pytest.mark.parametrize("bounds", [None, [0, 5, 60, 100]])
def test_a_watched_model_runs_the_same_operators_with_the_same_results(backend, bounds):
    model = tiny_model("nsa", "full_attention", "nsa", attention_backend=backend)
    ids = torch.randint(61, (2 if bounds is None else 1, 100))
    cu_seqlens = None if bounds is None else torch.tensor(bounds, dtype=torch.int32)
    plain, calls = step(model, ids, cu_seqlens)
    with record_selection(model) as blocks:
        watched, watched_calls = step(model, ids, cu_seqlens)
    assert blocks[0].shape == (*ids.shape, 2, 4)
    assert watched_calls == calls
    assert calls["nsa::attention"] == (2 if backend == "triton" else 0)
    assert calls["nsa::window_attention"] == (0 if backend == "triton" else 2)
    for x, y in zip(watched, plain, strict=True):
        assert torch.equal(x, y)


def test_aux_is_of_the_call_and_carries_no_gradient(backend):
    q, k, v = (torch.randn(1, 50, n, 8, requires_grad=True) for n in (4, 2, 2))
    pools = [mean_pool(x, GEOMETRY, backend=backend) for x in (k, v)]
    arguments = (q, k, v, *pools, torch.rand(1, 50, 4, 3), GEOMETRY)
    out, aux = nsa_attention(*arguments, backend=backend, return_aux=True)
    _, expected = nsa_attention(*arguments, backend="reference", return_aux=True)
    assert out.requires_grad
    assert not any(x.requires_grad for x in (*aux, *expected))
    for x, y in zip(aux, expected, strict=True):
        torch.testing.assert_close(x, y)


def test_the_operator_for_a_whole_call_passes_opcheck(monkeypatch):
    stand_in_for_triton(monkeypatch)
    q, k, v, k_win, v_win = (torch.randn(1, 40, n, d, requires_grad=True) for n, d in ((4, 8), *((2, 8), (2, 6)) * 2))
    cu_seqlens = torch.tensor([0, 3, 40], dtype=torch.int32)
    pools = [mean_pool(x.detach(), GEOMETRY, cu_seqlens).requires_grad_() for x in (k, v)]
    gates = torch.rand(1, 40, 4, 3, requires_grad=True)
    tail = (*Call(GEOMETRY, 0.3, cu_seqlens).flatten(), "triton")
    torch.library.opcheck(torch.ops.nsa.attention.default, (q, k, v, *pools, k_win, v_win, gates, *tail))


def test_routing_names_the_operators_that_run(backend):
    q, k, v = (torch.zeros(1, 50, n, 8) for n in (4, 2, 2))
    pools = [mean_pool(x, GEOMETRY, backend=backend) for x in (k, v)]
    with Operators() as operators:
        nsa_attention(q, k, v, *pools, torch.rand(1, 50, 4, 3), GEOMETRY, backend=backend)
    assert tuple(operators.calls) == operators_of(backend)
