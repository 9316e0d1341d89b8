"""Gate and selection health of a model in training: one forward pass over one fixed held-out row, now and then.

    probe = HealthProbe(trainer.loss, next(iter(trainer.held_out)), config.model.geometry, trainer.device)
    health = probe.measure(step=100)
    print(health.gate.entropy_mean_nats, health.selection.mean_coverage)

A pass of its own costs the training step nothing: no hook, no second output and no graph break in what is compiled or
recomputed. It runs eagerly, without gradients, every `observe.health_every_steps`, always on the same tokens, so that
its numbers are comparable over the run.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from nsa.data.stream.packing import Batch
from nsa.geometry import BlockGeometry
from nsa.inspect.gates import record_gates
from nsa.inspect.selection import nsa_layers, record_selection, selection_statistics
from nsa.inspect.statistics import GateStatistics, SelectionStatistics, pool_gates, pool_selection
from nsa.loss import IGNORED_LABEL
from nsa.runs.tables import GATE_NUMBERS, SELECTION_NUMBERS


@dataclass(frozen=True)
class ModelHealth:
    """Statistics of a model's NSA layers at one step.

    Attributes:
        step: optimizer steps done.
        gates, selections: by the layer's number in the decoder.
    """

    step: int
    gates: dict[int, GateStatistics]
    selections: dict[int, SelectionStatistics]

    @property
    def gate(self) -> GateStatistics:
        """All layers together."""
        return pool_gates(list(self.gates.values()))

    @property
    def selection(self) -> SelectionStatistics:
        """All layers together."""
        return pool_selection(list(self.selections.values()))

    @property
    def worst_gate_layer(self) -> int:
        """The layer whose gates have the least entropy."""
        return min(self.gates, key=lambda layer: self.gates[layer].entropy_mean_nats)

    def rows(self) -> Iterator[dict[str, float | int]]:
        """A row of `health.csv` for each layer."""
        for layer, gate in self.gates.items():
            gates = {f"gate_{name}": getattr(gate, name) for name in GATE_NUMBERS}
            selection = {name: getattr(self.selections[layer], name) for name in SELECTION_NUMBERS}
            yield {"step": self.step, "layer": layer, **gates, **selection}

    def beat_values(self) -> dict[str, Any]:
        """What a heartbeat tells of it."""
        layer = self.worst_gate_layer
        return {
            "gate": self.gate,
            "selection": self.selection,
            "worst_gate_layer": layer,
            "worst_gate": self.gates[layer],
        }


class HealthProbe:
    """Measures a model on the first row of a batch.

    Args:
        loss: called with ids, labels and document bounds, runs the model.
        batch: held-out tokens; its first row is taken, up to its last label.
        geometry: of the model's blocks.
        device: where the model is.
        layers: decoder layers to measure; all NSA layers unless given.

    Raises:
        ValueError: one of `layers` is no NSA layer.
    """

    def __init__(
        self,
        loss: nn.Module,
        batch: Batch,
        geometry: BlockGeometry,
        device: torch.device,
        layers: Sequence[int] | None = None,
    ) -> None:
        held = list(nsa_layers(loss))
        if unknown := set(layers or ()) - set(held):
            names, known = (", ".join(map(str, sorted(numbers))) for numbers in (unknown, held))
            raise ValueError(
                f"observe.health_layers: {names} is no NSA layer of the model; those are {known or 'none'}"
            )
        self.loss, self.geometry = loss, geometry
        self.layers = held if layers is None else sorted(layers)
        self._ids, self._labels, bounds = _first_row(batch)
        starts, lengths = bounds[:-1], bounds.diff()
        self._positions = torch.arange(self._ids.shape[1]) - starts.repeat_interleave(lengths)
        self._bounds = bounds.to(device)
        self._ids, self._labels, self._positions = (x.to(device) for x in (self._ids, self._labels, self._positions))

    @torch.no_grad()
    def measure(self, step: int) -> ModelHealth | None:
        """Statistics after `step` steps; None for a model without NSA layers. All ranks of a run must call it."""
        if not self.layers:
            return None
        was_training = self.loss.training
        self.loss.eval()
        # Compiled code would ignore the hooks.
        with (
            torch.compiler.set_stance("force_eager"),
            record_gates(self.loss) as gates,
            record_selection(self.loss, on_device=True) as blocks,
        ):
            self.loss(self._ids, self._labels, self._bounds)
        self.loss.train(was_training)
        return ModelHealth(
            step,
            {layer: gates[layer] for layer in self.layers},
            {layer: selection_statistics(blocks[layer], self.geometry, self._positions) for layer in self.layers},
        )


def _first_row(batch: Batch) -> tuple[Tensor, Tensor, Tensor]:
    """Ids and labels `[1, T]` of the first row without padding at its end, and its documents' bounds."""
    ids, labels = batch.input_ids[:1], batch.labels[:1]
    length = int((labels[0] != IGNORED_LABEL).nonzero().max()) + 1
    bounds = torch.tensor([0], dtype=torch.int32) if batch.cu_seqlens is None else batch.cu_seqlens
    bounds = bounds[bounds < length]
    return ids[:, :length], labels[:, :length], torch.cat([bounds, bounds.new_tensor([length])])
