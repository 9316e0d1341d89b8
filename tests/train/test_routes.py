"""The routing report: every stage with its backend and reason, and what counts as a fallback."""

from __future__ import annotations

import json

import pytest
import torch

from nsa.config.run import ModelSection
from nsa.launch.start import prepare
from nsa.train import routes as module
from nsa.train.routes import describe_routes, routes

CPU = torch.device("cpu")


def test_every_stage_has_its_backend_and_why() -> None:
    found = routes(ModelSection(head_dim=32, value_head_dim=16), CPU, "bf16")
    assert [route.stage for route in found] == [
        *("mean of keys", "mean of values", "compressed attention", "choice of blocks"),
        *("selected attention", "window attention", "gated sum"),
    ]
    assert {(route.backend, route.device, route.dtype) for route in found} == {("torch", "cpu", "bfloat16")}
    assert [route.head_dim for route in found] == [32, 16, 32, 32, 32, 32, 32]
    assert not any(route.is_fallback for route in found)
    assert describe_routes(found).startswith("torch, triton cannot run: it needs a CUDA device")


def test_learned_compression_and_dense_models_have_fewer_stages() -> None:
    assert "mean of keys" not in [route.stage for route in routes(ModelSection(compression="conv"), CPU, "fp32")]
    dense = routes(ModelSection(layer_types=("full_attention",)), CPU, "fp32")
    assert dense == []
    assert describe_routes(dense) == "no NSA layer"


def test_a_backend_asked_for_is_told_as_such_or_refused() -> None:
    found = routes(ModelSection(attention_backend="reference"), CPU, "fp32")
    assert describe_routes(found) == "reference, asked for"
    with pytest.raises(ValueError, match="backend 'triton' cannot run here"):
        routes(ModelSection(attention_backend="triton"), CPU, "fp32")


def test_on_a_gpu_whatever_is_not_a_kernel_is_a_fallback(monkeypatch: pytest.MonkeyPatch) -> None:
    """The GPU is made up: only the probe tensors would need one."""
    empty = torch.empty
    monkeypatch.setattr(torch, "empty", lambda *sizes, device, **options: empty(*sizes, **options))

    def explain(backend: str, probe: torch.Tensor) -> tuple[str, str]:
        return ("torch", "head too large") if probe.shape[-1] > 256 else ("triton", "on a CUDA device")

    monkeypatch.setattr(module, "explain_backend", explain)
    found = routes(ModelSection(head_dim=64, value_head_dim=512), torch.device("cuda"), "bf16")
    assert [route.stage for route in found if not route.is_fallback] == ["mean of keys"]
    assert "mean of keys: triton (on a CUDA device); mean of values: torch (head too large)" in describe_routes(found)


def test_a_run_keeps_the_report_and_prints_it(tiny, capsys: pytest.CaptureFixture) -> None:
    _, folder = prepare(tiny())
    folder.lock.close()
    facts = json.loads(folder.env_json.read_text())
    assert facts["kernels"]["backend"] == "torch"
    assert facts["kernels"]["stages"][0]["kernels"] == "nsa.ops.torch_native"
    stored = facts["routing"]
    assert stored[0]["stage"] == "mean of keys"
    assert "NSA backend torch, triton cannot run" in capsys.readouterr().out
