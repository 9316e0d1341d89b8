"""The decode benchmark: what its rows say of reads, and that contexts are those asked for."""

import math

import pytest

from nsa import BlockGeometry
from nsa.bench.decode import measure_decode
from nsa.bench.settings import DecodeBench

SMALL = {
    "num_hidden_layers": 2,
    "hidden_size": 32,
    "num_attention_heads": 4,
    "prefill_chunk": 50,
    "warmup": 1,
    "repeats": 3,
}


def test_rows_hold_times_and_the_reads_that_the_geometry_predicts():
    rows = measure_decode(DecodeBench(contexts=(40, 120), **SMALL))
    assert [row.context for row in rows] == [40, 120]
    for row in rows:
        length = row.context + 4  # the tokens of warm-up and repeats
        assert row.reads_predicted == sum(BlockGeometry().predicted_reads(length).values())
        assert row.reads_done == BlockGeometry().num_compressed(length) + 2 * length  # every block fits
        times = (row.total_ms, row.cmp_ms, row.choose_ms, row.slc_ms, row.win_ms, row.dense_ms)
        assert all(ms > 0 for ms in times)


def test_the_dense_model_can_be_left_out():
    assert math.isnan(measure_decode(DecodeBench(contexts=(40,), dense=False, **SMALL))[0].dense_ms)


@pytest.mark.parametrize("contexts", [(), (0,), (64, 32), (32, 32)])
def test_contexts_must_ascend(contexts):
    with pytest.raises(ValueError, match="contexts must ascend from at least 1"):
        measure_decode(DecodeBench(contexts=contexts))
