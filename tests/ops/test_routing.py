"""The routing report names what runs, where and why."""

import json

import pytest
import torch

from nsa import BlockGeometry
from nsa.ops.routing import routing_report


def tensors(T: int = 64, H: int = 4, Hkv: int = 2, D: int = 16) -> list[torch.Tensor]:
    return [torch.zeros(1, T, heads, D) for heads in (H, Hkv, Hkv)]


@pytest.mark.parametrize(
    ("backend", "chosen", "reason"),
    [
        ("auto", "torch", "triton cannot run: it needs a CUDA device"),
        ("torch", "torch", "asked for"),
        ("reference", "reference", "asked for"),
    ],
)
def test_the_report_says_which_backend_runs_and_why(backend, chosen, reason):
    report = routing_report(*tensors(), BlockGeometry(), backend=backend)
    assert report.backend == chosen
    assert report.reason.startswith(reason)
    assert len(report.operators) == (0 if chosen == "reference" else 4)
    values = json.loads(json.dumps(report.as_dict()))
    assert values["versions"]["torch"] == torch.__version__
    for text in (chosen, torch.__version__, report.stages[0].kernels, report.device, *report.operators):
        assert text in str(report)


def test_a_backend_that_cannot_run_is_an_error():
    with pytest.raises(ValueError, match="'triton' cannot run here"):
        routing_report(*tensors(), BlockGeometry(), backend="triton")
