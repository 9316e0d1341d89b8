"""The training benchmark measures what it says: whole steps of both models, from medians."""

from __future__ import annotations

import dataclasses

import pytest

from nsa.bench.train import TrainBench, measure_train


def test_both_models_are_measured_in_whole_steps() -> None:
    bench = TrainBench(hidden_size=32, num_attention_heads=4, sequence_length=64, rows=2, warmup=1, repeats=3)
    nsa, dense = measure_train(bench)
    assert (nsa.attention, dense.attention) == ("nsa", "full_attention")
    assert nsa.tokens == dense.tokens == 128
    assert nsa.num_parameters > dense.num_parameters
    for row in (nsa, dense):
        assert row.tokens_per_s == pytest.approx(1000 * row.tokens / row.step_ms)


def test_the_default_is_the_one_layer_toy() -> None:
    values = dataclasses.asdict(TrainBench())
    sizes = (
        "num_hidden_layers",
        "hidden_size",
        "num_attention_heads",
        "num_key_value_heads",
        "sequence_length",
        "rows",
    )
    assert [values[name] for name in sizes] == [1, 128, 8, 2, 128, 8]
    assert values["geometry"] == (16, 8, 32, 8, 64)


def test_nothing_to_count_is_refused() -> None:
    with pytest.raises(ValueError, match="repeats must be at least 1"):
        measure_train(TrainBench(repeats=0))
