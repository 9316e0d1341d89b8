"""The prefill benchmark measures what it says, on small sizes."""

import math

import pytest
import torch

from nsa import mean_pool
from nsa.bench import prefill
from nsa.bench.prefill import measure_prefill
from nsa.bench.settings import PrefillBench

SMALL = {"num_heads": 4, "head_dim": 8, "value_head_dim": 8, "geometry": (8, 4, 16, 4, 1, 2, 32), "repeats": 1}


def test_a_row_for_each_length_with_every_column():
    rows = measure_prefill(PrefillBench(lengths=(40, 80), memory=False, **SMALL))
    assert [row.length for row in rows] == [40, 80]
    for row in rows:
        values = {name: value for name, value in vars(row).items() if not name.endswith("_gib")}
        assert all(value > 0 for value in values.values()), values
        assert row.speedup == pytest.approx(row.dense_total_ms / row.nsa_total_ms)
        assert math.isnan(row.nsa_peak_gib)


def test_what_is_switched_off_is_nan():
    (row,) = measure_prefill(PrefillBench(lengths=(40,), memory=False, dense=False, stages=False, **SMALL))
    assert row.nsa_total_ms > 0
    assert math.isnan(row.dense_total_ms)
    assert math.isnan(row.cmp_forward_ms)


@pytest.mark.parametrize(("make", "num_inputs"), [(prefill.nsa_steps, 4), (prefill.dense_steps, 3)])
def test_the_backward_step_makes_every_gradient(make, num_inputs, monkeypatch):
    made = []
    original = torch.autograd.grad
    monkeypatch.setattr(torch.autograd, "grad", lambda *args: made.extend(original(*args)))
    steps = make(PrefillBench(**SMALL), 40)
    steps["forward"]()
    steps["backward"]()
    assert len(made) == num_inputs
    assert all(torch.isfinite(x).all() and x.abs().max() > 0 for x in made)


def test_peak_memory_is_that_of_the_scores_where_they_are_materialised():
    """Plain attention holds T x T matrices; the measured peak must hold some of them and not many more."""
    bench = PrefillBench(num_heads=4, head_dim=8, value_head_dim=8, dense_backend="math")
    peak = prefill.peak_gib(bench, 1024, "dense")
    matrix_gib = 4 * 1024 * 1024 * 4 / 2**30
    assert 2 * matrix_gib < peak < 12 * matrix_gib


def test_without_pooling_compressed_keys_and_values_are_inputs(monkeypatch):
    pooled = []
    monkeypatch.setattr(
        prefill, "mean_pool", lambda x, *args, **kwargs: pooled.append(x) or mean_pool(x, *args, **kwargs)
    )
    steps = prefill.nsa_steps(PrefillBench(pool=False, **SMALL), 40)
    assert len(pooled) == 2
    steps["forward"]()
    steps["backward"]()
    assert len(pooled) == 2


def test_neighbours_are_alike_and_as_large_as_before():
    alike, apart = (prefill._inputs(PrefillBench(alike=n, **SMALL), 4000)[0].detach() for n in (16, 1))
    cosine = torch.nn.functional.cosine_similarity
    assert cosine(alike[:, 1:], alike[:, :-1], dim=-1).mean() > 0.85
    assert cosine(apart[:, 1:], apart[:, :-1], dim=-1).mean().abs() < 0.05
    assert alike[:, 16:].std() == pytest.approx(1, abs=0.1)


@pytest.mark.parametrize(
    "changes", [{"lengths": ()}, {"lengths": (0,)}, {"alike": 0}, {"repeats": 0}, {"num_kv_heads": 3}]
)
def test_sizes_that_do_not_fit_are_refused(changes):
    with pytest.raises(ValueError, match="must be"):
        measure_prefill(PrefillBench(**{"lengths": (40,), "memory": False, **SMALL, **changes}))
