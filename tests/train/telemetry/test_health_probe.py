"""Gate and selection health: measured on one held-out row as it is trained on, without touching the training."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import pytest
import torch

from nsa.data import Batch
from nsa.inspect.gates import gate_statistics
from nsa.inspect.selection import record_selection, selection_statistics
from nsa.inspect.statistics import pool_gates
from nsa.loss import NextTokenLoss
from nsa.runs.tables import HEALTH_COLUMNS
from nsa.train.telemetry.health_probe import HealthProbe
from nsa.train.trainer import Trainer
from tiny_models import tiny_model

CPU = torch.device("cpu")


def batch(*documents: int, rows: int = 2, padding: int = 0) -> Batch:
    """Rows of documents of these lengths, the padding a document of its own."""
    length = sum(documents) + padding
    ids = torch.arange(rows * length).view(rows, length) * 7 % 61
    labels = ids.roll(-1, 1)
    if padding:
        labels[:, -padding:] = -100
    pieces = [*documents, padding] if padding else list(documents)
    bounds = torch.tensor([0, *pieces * rows]).cumsum(0).int()
    return Batch(ids, labels, bounds)


def probe_of(model: Any, batch: Batch, **options: Any) -> HealthProbe:
    return HealthProbe(NextTokenLoss(model), batch, model.config.geometry, CPU, **options)


def test_a_packed_row_is_measured_as_its_documents_alone() -> None:
    model = tiny_model("nsa", "full_attention", "nsa")
    health = probe_of(model, batch(30, 70)).measure(step=5)
    assert health is not None
    assert (health.step, sorted(health.gates), sorted(health.selections)) == (5, [0, 2], [0, 2])
    ids, gates, blocks = batch(30, 70).input_ids[:1], [], []
    handle = model.model.layers[2].self_attn.gate.register_forward_hook(lambda m, i, out: gates.append(out))
    with torch.no_grad():
        for piece in (ids[:, :30], ids[:, 30:]):
            with record_selection(model) as found:
                model(piece, use_cache=False)
            blocks.append(found[2])
    handle.remove()
    positions = torch.cat([torch.arange(30), torch.arange(70)])
    expected = selection_statistics(torch.cat(blocks, dim=1), model.config.geometry, positions)
    assert health.selections[2] == expected
    assert health.gates[2].as_dict() == pytest.approx(gate_statistics(torch.cat(gates, dim=1)).as_dict())


def test_padding_at_the_end_does_not_count() -> None:
    model = tiny_model("nsa")
    health = probe_of(model, batch(40, padding=24)).measure(step=0)
    assert health is not None
    assert health.selections[0].num_rows == 40 * 2
    assert health.gates[0].num_rows == 40 * 4


def test_rows_without_bounds_are_one_document_each() -> None:
    model = tiny_model("nsa")
    whole = batch(64)
    health = probe_of(model, whole).measure(step=0)
    assert probe_of(model, replace(whole, cu_seqlens=None)).measure(step=0) == health


def test_all_layers_together_and_the_worst_one() -> None:
    model = tiny_model("nsa", "nsa", "nsa")
    with torch.no_grad():
        model.model.layers[1].self_attn.gate.down.bias.view(-1, 3)[:, 2] += 50
    health = probe_of(model, batch(64)).measure(step=3)
    assert health is not None
    assert health.worst_gate_layer == 1
    assert health.gates[1].collapse_share == 1
    values = health.beat_values()
    assert values["gate"] == pool_gates([health.gates[layer] for layer in range(3)])
    assert values["worst_gate"] == health.gates[1]
    rows = list(health.rows())
    assert [tuple(row) for row in rows] == [HEALTH_COLUMNS] * 3
    assert [(row["step"], row["layer"]) for row in rows] == [(3, 0), (3, 1), (3, 2)]
    assert rows[1]["gate_share_win"] == health.gates[1].share_win
    assert rows[1]["mean_coverage"] == health.selections[1].mean_coverage


def test_single_layers_can_be_measured_and_others_are_refused() -> None:
    model = tiny_model("nsa", "full_attention", "nsa")
    health = probe_of(model, batch(64), layers=(2,)).measure(step=0)
    assert health is not None
    assert list(health.gates) == list(health.selections) == [2]
    with pytest.raises(ValueError, match=r"observe\.health_layers: 1, 7 is no NSA layer of the model; those are 0, 2"):
        probe_of(model, batch(64), layers=(0, 1, 7))


def test_a_model_without_nsa_layers_has_no_health() -> None:
    assert probe_of(tiny_model("full_attention"), batch(64)).measure(step=0) is None


def test_a_compiled_model_is_measured_too_and_not_compiled_again() -> None:
    model = tiny_model("nsa", "nsa")
    plain = probe_of(model, batch(64)).measure(step=0)
    for layer in model.model.layers:
        layer.forward = torch.compile(layer.forward, fullgraph=True, backend="eager")
    probe = probe_of(model, batch(64))

    def train() -> None:
        row = batch(64)
        probe.loss(row.input_ids, row.labels, row.cu_seqlens).backward()

    train()
    compiled = torch._dynamo.utils.counters["stats"]["unique_graphs"]
    assert probe.measure(step=0) == plain
    with torch._dynamo.config.patch(error_on_recompile=True):
        train()
    assert torch._dynamo.utils.counters["stats"]["unique_graphs"] == compiled


def test_measuring_keeps_nothing_for_a_backward_pass() -> None:
    model, outputs = tiny_model("nsa"), []
    model.model.layers[0].register_forward_hook(lambda module, inputs, out: outputs.append(out))
    probe_of(model, batch(64)).measure(step=0)
    assert [out.requires_grad for out in outputs] == [False]


def test_measuring_leaves_the_training_as_it_is(tiny) -> None:
    def losses(measured: bool) -> list[float]:
        trainer, found = Trainer(tiny(train={"steps": 4})), []
        for _ in range(4):
            found.append(trainer.train_step().loss)
            if measured:
                assert trainer.measure_health() is not None
                assert trainer.loss.training
                assert all(parameter.grad is None for parameter in trainer.model.parameters())
        return found

    assert losses(True) == losses(False)
