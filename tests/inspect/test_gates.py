"""Gate statistics against counting by hand, and their recording from a model."""

import math

import pytest
import torch

from nsa import NSAAttention
from nsa.inspect.gates import gate_statistics, record_gates
from nsa.inspect.statistics import pool_gates
from tiny_models import tiny_model

IDS = torch.arange(50)[None] * 7 % 61


def test_statistics_of_gates_that_can_be_counted_by_hand():
    rows = [(1 / 3, 1 / 3, 1 / 3), (1.0, 0.0, 0.0), (0.0, 0.96, 0.04), (0.06, 0.0, 0.94)]
    found = gate_statistics(torch.tensor(rows).view(1, 2, 2, 3))
    entropies = [-sum(weight * math.log(weight) for weight in row if weight) for row in rows]
    assert found.num_rows == 4
    assert found.entropy_mean_nats == pytest.approx(sum(entropies) / 4)
    assert found.max_mean == pytest.approx(sum(max(row) for row in rows) / 4)
    shares = [sum(row[branch] for row in rows) / 4 for branch in range(3)]
    assert [found.share_cmp, found.share_slc, found.share_win] == pytest.approx(shares)
    assert found.collapse_share == 0.5


def test_sigmoid_gates_are_judged_by_their_shares_and_closed_ones_are_no_error():
    weights = torch.tensor([[0.8, 0.4, 0.4]])
    found, halved = gate_statistics(weights), gate_statistics(weights / 2)
    assert found.max_mean == pytest.approx(0.5)
    assert found.share_win == pytest.approx(0.25)
    assert halved.as_dict() == pytest.approx(found.as_dict())
    assert gate_statistics(torch.zeros(1, 1, 2, 3)).entropy_mean_nats == 0


def test_layers_are_recorded_by_their_number_over_all_passes_and_left_as_they_were():
    model = tiny_model("nsa", "full_attention", "nsa")
    gates = []
    handle = model.model.layers[2].self_attn.gate.register_forward_hook(lambda m, i, out: gates.append(out))
    with torch.no_grad(), record_gates(model) as found:
        model(IDS, use_cache=False)
        model(IDS.flip(1), use_cache=False)
    handle.remove()
    assert set(found) == {0, 2}
    expected = gate_statistics(torch.cat(gates, dim=1))
    assert found[2].num_rows == expected.num_rows == 2 * 50 * 4
    assert found[2].entropy_mean_nats == pytest.approx(expected.entropy_mean_nats)
    assert found[2].collapse_share == expected.collapse_share
    assert not model.model.layers[0].self_attn.gate._forward_hooks


def test_an_untrained_gate_weighs_the_branches_alike():
    layer = NSAAttention(32, num_heads=4, num_kv_heads=2, backend="torch")
    with record_gates(torch.nn.Sequential(layer)) as found:
        layer(torch.randn(1, 40, 32))
    assert found[0].entropy_mean_nats == pytest.approx(math.log(3), abs=1e-6)
    assert found[0].max_mean == pytest.approx(1 / 3, abs=1e-6)
    assert found[0].collapse_share == 0


def test_pooled_layers_are_weighed_by_their_rows():
    few, many = torch.rand(1, 3, 2, 3), torch.rand(1, 9, 2, 3)
    pooled = pool_gates([gate_statistics(few), gate_statistics(many)])
    expected = gate_statistics(torch.cat([few, many], dim=1))
    for name, value in expected.as_dict().items():
        assert getattr(pooled, name) == pytest.approx(value), name


def test_nothing_to_count_is_refused():
    with pytest.raises(ValueError, match="at least one gate of 3 weights"):
        gate_statistics(torch.zeros(0, 3))
    with pytest.raises(ValueError, match="no NSA layer"), record_gates(torch.nn.Linear(2, 2)):
        pass
