"""Tests here need a CUDA device; `make test-gpu` runs them."""

from __future__ import annotations

import pytest
import torch


@pytest.fixture(autouse=True)
def new_kernels(monkeypatch: pytest.MonkeyPatch) -> None:
    """The kernel runs here that is kept back until these tests have passed on a GPU."""
    queries = pytest.importorskip("nsa.ops.triton.hopper_union_queries")
    monkeypatch.setattr(queries, "IS_TESTED", True)


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    for item in items:
        if "tests/gpu" in item.path.as_posix():
            item.add_marker(pytest.mark.gpu)
            if not torch.cuda.is_available():
                item.add_marker(pytest.mark.skip(reason="no CUDA device"))
