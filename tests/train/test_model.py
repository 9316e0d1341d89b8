"""What a run's model is built from: what runs its NSA layers, as its folder keeps it."""

from __future__ import annotations

import json
from typing import Any

import pytest
import torch
from torch._subclasses.fake_tensor import FakeTensorMode

from nsa.config.run import RunConfig
from nsa.launch.start import prepare
from nsa.ops.routing import RoutingReport
from nsa.train.model import training_route

CPU = torch.device("cpu")


def route(device: torch.device = CPU, **model: Any) -> RoutingReport | None:
    return training_route(RunConfig.model_validate({"model": model}), device)


def test_the_route_says_what_runs_and_why() -> None:
    found = route(head_dim=32, value_head_dim=16)
    assert found is not None
    assert (found.backend, found.is_fallback) == ("torch", False)
    assert found.reason.startswith("triton cannot run: it needs a CUDA device")
    assert route(layer_types=["full_attention"]) is None


def test_a_backend_asked_for_is_told_as_such_or_refused() -> None:
    found = route(attention_backend="reference")
    assert found is not None
    assert (found.backend, found.reason) == ("reference", "asked for")
    with pytest.raises(ValueError, match="backend 'triton' cannot run here"):
        route(attention_backend="triton")


@pytest.mark.parametrize(("backend", "is_fallback"), [("auto", True), ("torch", False)])
def test_on_a_gpu_what_is_no_kernel_is_a_fallback_unless_it_was_asked_for(
    monkeypatch: pytest.MonkeyPatch, backend: str, is_fallback: bool
) -> None:
    """The GPU is made up; a value head is too large for the kernels."""
    monkeypatch.setattr(torch.cuda, "get_device_name", lambda device: "GPU")
    with FakeTensorMode():
        found = route(torch.device("cuda"), value_head_dim=512, attention_backend=backend)
    assert found is not None
    assert (found.backend, found.is_fallback) == ("torch", is_fallback)


def test_a_run_keeps_the_route_and_prints_it(tiny, capsys: pytest.CaptureFixture) -> None:
    _, folder = prepare(tiny())
    folder.lock.close()
    stored = json.loads(folder.env_json.read_text())["routing"]
    assert (stored["backend"], stored["is_fallback"]) == ("torch", False)
    assert stored["stages"][0]["kernels"] == "nsa.ops.torch_native"
    assert "NSA by torch (triton cannot run: it needs a CUDA device" in capsys.readouterr().out


def test_a_dense_run_has_no_route(tiny, capsys: pytest.CaptureFixture) -> None:
    _, folder = prepare(tiny(model={"layer_types": ["full_attention"]}))
    folder.lock.close()
    assert json.loads(folder.env_json.read_text())["routing"] is None
    assert "no NSA layer" in capsys.readouterr().out
