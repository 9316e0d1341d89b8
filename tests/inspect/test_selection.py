"""Recording what layers select, and its statistics, against counting token by token."""

import pytest
import torch

from nsa import BlockGeometry, NSAAttention
from nsa.inspect.selection import record_selection, selected_tokens, selection_statistics
from nsa.inspect.statistics import pool_selection, selection_record
from tiny_models import tiny_model

GEOMETRY = BlockGeometry(8, 4, 16, 4, window_size=20)
IDS = torch.arange(100)[None] * 7 % 61


@pytest.fixture(scope="module")
def recorded():
    """Choices of the NSA layers, numbers 0 and 2, over 100 tokens."""
    model = tiny_model("nsa", "full_attention", "nsa")
    with torch.no_grad(), record_selection(model) as selections:
        model(IDS, use_cache=False)
    return selections


def tokens_of(blocks, position):
    """Positions in the chosen blocks up to the query's own, one by one."""
    return [p for p in range(position + 1) if p // GEOMETRY.select_block_size in blocks]


def test_layers_are_recorded_by_their_number_in_the_decoder(recorded):
    assert {layer: blocks.shape for layer, blocks in recorded.items()} == {0: (1, 100, 2, 4), 2: (1, 100, 2, 4)}
    assert not torch.equal(recorded[0], recorded[2])


def test_prefill_and_decoding_record_the_same_as_one_pass(recorded):
    model = tiny_model("nsa", "full_attention", "nsa")
    with torch.no_grad(), record_selection(model) as selections:
        cache = model(IDS[:, :60], use_cache=True).past_key_values
        for i in range(60, 100):
            model(IDS[:, i : i + 1], past_key_values=cache)
    assert all(torch.equal(selections[layer], recorded[layer]) for layer in (0, 2))


def test_after_recording_the_layers_are_as_they_were_even_after_an_error():
    model = tiny_model()
    earlier = []
    model.model.layers[1].self_attn.aux_sink = earlier.append
    with pytest.raises(RuntimeError, match="stop"), record_selection(model) as selections:
        raise RuntimeError("stop")
    assert selections == {}
    assert model.model.layers[0].self_attn.aux_sink is None
    model(IDS)
    assert len(earlier) == 1


def test_any_module_with_nsa_layers_can_be_recorded():
    layer = NSAAttention(32, num_heads=4, num_kv_heads=2, geometry=GEOMETRY, backend="torch")
    with record_selection(torch.nn.Sequential(torch.nn.Linear(32, 32), layer)) as selections:
        layer(torch.randn(3, 50, 32))
    assert selections[0].shape == (3, 50, 2, 4)


def test_a_model_without_nsa_layers_is_refused():
    with pytest.raises(ValueError, match="no NSA layer"), record_selection(tiny_model("full_attention")):
        pass


def test_a_record_lists_each_token_that_is_attended_to_once(recorded):
    for position in (0, 15, 16, 63, 64, 99):
        for chosen in recorded[2][0, position].tolist():
            record = selection_record(chosen, position, GEOMETRY)
            expected = tokens_of(chosen, position)
            assert [p for start, end in record["ranges"] for p in range(start, end)] == expected
            assert all(a[1] < b[0] for a, b in zip(record["ranges"], record["ranges"][1:], strict=False))
            window = [p for p in range(position + 1) if p > position - 20]
            compressed = [i for i in range(100) if 4 * i + 8 <= position + 1]
            done = {"cmp": len(compressed), "slc": len(expected), "win": len(window)}
            assert record["reads"]["done"] == done | {"total": sum(done.values())}
            assert record["reads"]["predicted"]["total"] == sum(GEOMETRY.predicted_reads(position + 1).values())


def test_forced_blocks_are_those_that_every_group_has(recorded):
    record = selection_record([0, 3, 5, 6], 99, GEOMETRY)
    assert record["forced"] == [0, 5, 6]
    for position in range(100):
        groups = recorded[0][0, position].tolist()
        for chosen in groups:
            assert set(selection_record(groups[0], position, GEOMETRY)["forced"]) <= set(chosen)


def test_statistics_equal_what_counting_gives(recorded):
    blocks = torch.cat([recorded[0], recorded[2]])
    rows = [
        (position, blocks[layer, position, group].tolist())
        for layer in range(2)
        for position in range(100)
        for group in range(2)
    ]
    counts = [len(tokens_of(chosen, position)) for position, chosen in rows]
    distances = [position // 16 - j for position, chosen in rows for j in chosen if j >= 0]
    statistics = selection_statistics(blocks, GEOMETRY)
    assert statistics.num_rows == 400
    assert statistics.mean_selected_tokens == pytest.approx(sum(counts) / 400)
    assert statistics.max_selected_tokens == max(counts) == 64
    assert statistics.share_at_maximum == pytest.approx(sum(-1 not in chosen for _, chosen in rows) / 400)
    coverage = [count / (position + 1) for count, (position, _) in zip(counts, rows, strict=True)]
    assert statistics.mean_coverage == pytest.approx(sum(coverage) / 400)
    histogram = {"0": 0, "1": 0, "2-3": 0, "4-7": 0}
    for distance in distances:
        histogram[next(n for n, top in zip(histogram, (0, 1, 3, 7), strict=True) if distance <= top)] += 1
    assert statistics.distance_histogram == histogram
    assert statistics.mean_distance_blocks == pytest.approx(sum(distances) / len(distances))


def test_the_share_of_chosen_blocks_counts_free_choices_only():
    """One query in block 9 of 10: free are blocks 1..7; it chose 3 of its own will."""
    blocks = torch.tensor([[[[0, 3, 8, 9]]]], dtype=torch.int32)
    statistics = selection_statistics(blocks, GEOMETRY, torch.tensor([150]))
    assert statistics.blocks_chosen_share == pytest.approx(1 / 7)
    assert selected_tokens(blocks, GEOMETRY, torch.tensor([150])).tolist() == [[[16 * 3 + 7]]]


def test_statistics_of_nothing_are_refused():
    with pytest.raises(ValueError, match="at least one query"):
        selection_statistics(torch.zeros(1, 0, 2, 4, dtype=torch.int32), GEOMETRY)


def test_pooled_layers_are_the_statistics_of_all_their_rows(recorded):
    pooled = pool_selection([selection_statistics(blocks, GEOMETRY) for blocks in recorded.values()])
    together = selection_statistics(torch.cat(list(recorded.values())), GEOMETRY)
    for name in ("num_rows", "max_selected_tokens", "distance_histogram"):
        assert getattr(pooled, name) == getattr(together, name), name
    for name in ("mean_selected_tokens", "share_at_maximum", "mean_coverage", "mean_distance_blocks"):
        assert getattr(pooled, name) == pytest.approx(getattr(together, name)), name
