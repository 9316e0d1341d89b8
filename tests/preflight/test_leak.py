"""Preflight finds a model that sees the future or a neighbour, and clears one that does not."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor

import nsa.attention
from nsa.attention import NSAAttention
from nsa.config.run import RunConfig
from nsa.gate import Gate
from nsa.hf.dense_nsa import DenseAttention
from nsa.preflight.leak import find_leaks, probe_length

CPU = torch.device("cpu")
BLOCKS = {"compress_block_size": 8, "compress_stride": 4, "select_block_size": 16, "num_selected_blocks": 4}


def config(**model: Any) -> RunConfig:
    train = {"sequence_length": 128, "batch_tokens": 256, "micro_batch_rows": 2}
    return RunConfig.model_validate({"model": BLOCKS | {"window_size": 20} | model, "train": train})


@pytest.mark.parametrize(
    "model",
    [
        {},
        {"compression": "conv", "num_attention_heads": 8, "num_key_value_heads": 4},
        {"compression": "mlp", "compress_rope": "after", "gate": "sigmoid", "shared_kv": True},
        {"layer_types": ("nsa", "full_attention", "sliding_attention", "nsa"), "head_dim": 16, "value_head_dim": 8},
        {"attention_backend": "reference", "hidden_size": 32},
        {"attention_backend": "triton"},
    ],
)
def test_a_causal_model_is_cleared(model: dict[str, Any]) -> None:
    assert find_leaks(config(**model), CPU) == []


def test_the_probe_is_as_long_as_every_branch_needs_and_no_longer() -> None:
    def length(sequence_length: int, **model: Any) -> int:
        train = {"sequence_length": sequence_length, "batch_tokens": sequence_length, "micro_batch_rows": 1}
        return probe_length(RunConfig.model_validate({"model": model, "train": train}))

    assert probe_length(config()) == 4 * 16 + 2 * 16 + 7
    assert length(512) == 512
    assert length(8192) == 1024 + 128 + 7
    assert length(8192, window_size=5000) == 1536


def test_the_random_state_stays() -> None:
    torch.manual_seed(3)
    before = torch.get_rng_state()
    find_leaks(config(), CPU)
    assert torch.equal(torch.get_rng_state(), before)


def see_next_token(attention: Callable[..., Tensor]) -> Callable[..., Tensor]:
    """The attention's input at t holds a little of what is at t + 1."""

    def forward(self: Any, x: Tensor, **arguments: Any) -> Tensor:
        return attention(self, x + 0.01 * x.roll(-1, 1), **arguments)

    return forward


def see_mean_of_row(attention: Callable[..., Tensor]) -> Callable[..., Tensor]:
    """A normalisation over the whole row."""

    def forward(self: Any, x: Tensor, **arguments: Any) -> Tensor:
        return attention(self, x - 0.01 * x.mean(dim=1, keepdim=True), **arguments)

    return forward


@pytest.mark.parametrize("leaky", [see_next_token, see_mean_of_row])
@pytest.mark.parametrize("kind", ["nsa", "full_attention"])
def test_a_view_of_the_future_is_found(leaky: Callable[..., Any], kind: str, monkeypatch: pytest.MonkeyPatch) -> None:
    owner = NSAAttention if kind == "nsa" else DenseAttention
    monkeypatch.setattr(owner, "forward", leaky(owner.forward))
    leaks = find_leaks(config(layer_types=(kind,)), CPU)
    assert any("depends on tokens after" in leak for leak in leaks)
    assert any("in packed documents" in leak for leak in leaks)


@pytest.mark.parametrize("branch", ["cmp", "slc", "win"])
def test_a_branch_that_sees_one_token_too_many_is_found(branch: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """Keys of one branch move one place towards the past, so that each query sees one that it must not."""
    operator = nsa.attention.nsa_attention

    def leaky(q: Tensor, k: Tensor, v: Tensor, k_cmp: Tensor, v_cmp: Tensor, *rest: Any, **options: Any) -> Any:
        if branch == "cmp":
            v_cmp = v_cmp.roll(-1, 1)
        elif branch == "slc":
            v = v.roll(-1, 1)
        else:
            options["v_win"] = options["v_win"].roll(-1, 1)
        return operator(q, k, v, k_cmp, v_cmp, *rest, **options)

    monkeypatch.setattr(nsa.attention, "nsa_attention", leaky)
    leaks = find_leaks(config(), CPU)
    assert any("depends on tokens after" in leak for leak in leaks)


def test_a_leak_into_a_gate_that_starts_at_zero_is_found(monkeypatch: pytest.MonkeyPatch) -> None:
    gate = Gate.forward
    monkeypatch.setattr(Gate, "forward", lambda self, x, *rest: gate(self, x.roll(-1, 1), *rest))
    assert find_leaks(config(), CPU)


def test_a_leak_of_the_second_kind_of_layer_is_found(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(DenseAttention, "forward", see_next_token(DenseAttention.forward))
    assert find_leaks(config(layer_types=("nsa", "full_attention", "nsa", "nsa")), CPU)


def test_a_neighbouring_document_that_is_seen_is_found(monkeypatch: pytest.MonkeyPatch) -> None:
    attention = NSAAttention.forward

    def forward(self: Any, x: Tensor, *, cu_seqlens: Tensor | None = None, **arguments: Any) -> Tensor:
        bounds = None if cu_seqlens is None else cu_seqlens[[0, -1]]
        return attention(self, x, cu_seqlens=bounds, **arguments)

    monkeypatch.setattr(NSAAttention, "forward", forward)
    leaks = find_leaks(config(), CPU)
    assert leaks
    assert all("in packed documents" in leak for leak in leaks)
    assert any("on earlier documents" in leak for leak in leaks)


def test_what_shows_in_one_draw_only_is_no_leak(monkeypatch: pytest.MonkeyPatch) -> None:
    """Rounding at a tie of two blocks' scores can look like a leak, but not twice."""
    operator, calls = nsa.attention.nsa_attention, []

    def once(q: Tensor, k: Tensor, v: Tensor, *rest: Any, **options: Any) -> Any:
        calls.append(None)
        return operator(q, k, v.roll(-1, 1) if len(calls) == 1 else v, *rest, **options)

    monkeypatch.setattr(nsa.attention, "nsa_attention", once)
    assert find_leaks(config(), CPU) == []
    assert len(calls) == 8  # four forward passes of each draw
