"""How much each branch counts: the gates of a model recorded, and their statistics.

    with record_gates(model) as gates:
        model(input_ids, use_cache=False)
    print(gates[0].entropy_mean_nats)

Recording registers forward hooks and takes them out again; outside the `with` nothing is paid.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor, nn

from nsa.inspect.selection import nsa_layers
from nsa.inspect.statistics import COLLAPSED_WEIGHT, GateStatistics


@contextmanager
def record_gates(model: nn.Module) -> Iterator[dict[int, GateStatistics]]:
    """Statistics of every NSA layer's gates while the `with` lasts, complete when it ends.

    Args:
        model: any module that holds `NSAAttention` layers.

    Yields:
        a dictionary that is filled at the end: the layer's number as in `record_selection` -> its statistics over all
        forward passes.

    Raises:
        ValueError: the model has no NSA layer.
    """
    layers = nsa_layers(model)
    if not layers:
        raise ValueError("the model has no NSA layer, so that it has no gates")
    found: dict[int, GateStatistics] = {}
    sums: dict[int, list[Tensor]] = {index: [] for index in layers}

    def hook_of(index: int) -> Any:
        def hook(module: nn.Module, inputs: Any, gates: Tensor) -> None:
            sums[index].append(_sums(gates.detach()))

        return hook

    handles = [layer.gate.register_forward_hook(hook_of(index)) for index, layer in layers.items()]
    try:
        yield found
    finally:
        for handle in handles:
            handle.remove()
    found.update({index: _statistics(torch.stack(parts).sum(0)) for index, parts in sums.items() if parts})


def gate_statistics(gates: Tensor) -> GateStatistics:
    """Statistics of gates `[.., 3]`.

    Raises:
        ValueError: there are none.
    """
    if gates.numel() == 0 or gates.shape[-1] != 3:
        raise ValueError(f"statistics need at least one gate of 3 weights, not {list(gates.shape)}")
    return _statistics(_sums(gates))


def _sums(gates: Tensor) -> Tensor:
    """Number of rows and the sums over them of each statistic, `[7]` fp64 on the gates' device."""
    weights = gates.reshape(-1, 3).float()
    weights = weights / weights.sum(-1, keepdim=True).clamp_min(torch.finfo(torch.float32).tiny)
    largest = weights.amax(-1)
    rows = torch.stack(
        [torch.special.entr(weights).sum(-1), largest, *weights.unbind(-1), (largest > COLLAPSED_WEIGHT).float()]
    )
    return torch.cat([rows.new_full((1,), rows.shape[1], dtype=torch.float64), rows.sum(-1, dtype=torch.float64)])


def _statistics(sums: Tensor) -> GateStatistics:
    count, *totals = sums.tolist()
    return GateStatistics(int(count), *(total / count for total in totals))
