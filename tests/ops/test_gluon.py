"""The Gluon kernels for Hopper give the reference's results in an emulator that takes every freedom of the device."""

from __future__ import annotations

from collections.abc import Iterator

import pytest
import torch

pytest.importorskip("triton")

from triton.runtime.jit import JITFunction

from gluon_emulator import emulate
from ops.gluon_cases import CASES, MODULES, Comparison, imitate

SEEDS = range(3)


@pytest.fixture(autouse=True)
def poisoned_memory() -> Iterator[None]:
    """What is allocated holds NaN."""
    torch.use_deterministic_algorithms(True)
    yield
    torch.use_deterministic_algorithms(False)


def limit(name: str, dtype: torch.dtype) -> float:
    """Of each row: what is multiplied and the results are rounded to 11 or 8 bits. One wrong key is of order 0.1."""
    if name.endswith("lse"):
        return 2e-6
    return 5e-3 if dtype == torch.float16 else 4e-2


@pytest.mark.parametrize("name", CASES)
def test_hopper_kernels_equal_the_reference_under_every_schedule(name: str, monkeypatch: pytest.MonkeyPatch):
    case = CASES[name]
    imitate(case, monkeypatch)
    first = None
    for seed in SEEDS:
        comparison = Comparison(case)
        with emulate(seed) as emulator:
            errors = comparison.run()
        wrong = {what: error for what, error in errors.items() if not error < limit(what, case.dtype)}
        assert not wrong, f"seed {seed}"
        assert comparison.planned <= emulator.launched
        assert emulator.launched >= case.kernels
        first = first or errors
        assert errors == first, "an order of partitions or programs changes bits"


def test_every_gluon_kernel_has_a_case():
    functions = [x for module in MODULES for x in vars(module).values() if isinstance(x, JITFunction) and x.is_gluon()]
    kernels = {function.__name__ for function in functions if function.__name__.endswith("_kernel")}
    assert kernels == set().union(*(case.kernels for case in CASES.values()))
