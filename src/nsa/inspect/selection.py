"""Which blocks each query selects: recorded from a model, as records for each query, and as statistics.

    with record_selection(model) as selections:
        model(input_ids, use_cache=False)
    selection_statistics(selections[0], model.config.geometry)

Recording hangs a function into `NSAAttention.aux_sink` and takes it out again; outside the `with` nothing is paid.

Shapes: B rows, T queries, Hkv groups, n chosen blocks.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor, nn

from nsa.attention import NSAAttention
from nsa.geometry import BlockGeometry
from nsa.inspect.statistics import SelectionStatistics


@contextmanager
def record_selection(model: nn.Module, *, on_device: bool = False) -> Iterator[dict[int, Tensor]]:
    """Collect the chosen blocks of every NSA layer while the `with` lasts.

    Args:
        model: any module that holds `NSAAttention` layers, for example an `NSAForCausalLM`.
        on_device: leave the blocks where the model is, instead of moving them to the CPU.

    Yields:
        a dictionary that fills up: the layer's number among the model's decoder layers (among its NSA layers where it
        has no `layers` list) -> int32 `[B, T, Hkv, n]`, the queries of all forward passes one after another.

    Raises:
        ValueError: the model has no NSA layer.
    """
    layers = nsa_layers(model)
    if not layers:
        raise ValueError("the model has no NSA layer, so that nothing is selected")
    recorded: dict[int, Tensor] = {}
    before = {index: layer.aux_sink for index, layer in layers.items()}

    def sink_of(index: int) -> Any:
        def sink(aux: Any) -> None:
            blocks = aux.block_indices.detach()
            blocks = blocks if on_device else blocks.cpu()
            recorded[index] = torch.cat([recorded[index], blocks], dim=1) if index in recorded else blocks

        return sink

    try:
        for index, layer in layers.items():
            layer.aux_sink = sink_of(index)
        yield recorded
    finally:
        for index, layer in layers.items():
            layer.aux_sink = before[index]


def nsa_layers(model: nn.Module) -> dict[int, NSAAttention]:
    """The NSA layers of a model by their number in its `layers` list, or among themselves where it has none."""
    for module in model.modules():
        decoder = getattr(module, "layers", None)
        if isinstance(decoder, nn.ModuleList):
            found = {i: [m for m in layer.modules() if isinstance(m, NSAAttention)] for i, layer in enumerate(decoder)}
            return {i: attention[0] for i, attention in found.items() if attention}
    return dict(enumerate(m for m in model.modules() if isinstance(m, NSAAttention)))


def selected_tokens(block_indices: Tensor, geometry: BlockGeometry, positions: Tensor | None = None) -> Tensor:
    """Distinct tokens up to the query's own that each query's blocks hold, `[.., T, Hkv, n] -> [.., T, Hkv]`.

    Args:
        block_indices: chosen blocks, -1 for none.
        positions: position of each query, `[T]`; 0 to T-1 unless given.
    """
    position = _positions(block_indices, positions)[:, None, None]
    start = block_indices * geometry.select_block_size
    held = (position + 1 - start).clamp(max=geometry.select_block_size)
    return held.masked_fill(block_indices < 0, 0).sum(-1)


def selection_statistics(
    block_indices: Tensor, geometry: BlockGeometry, positions: Tensor | None = None
) -> SelectionStatistics:
    """Statistics of chosen blocks `[B, T, Hkv, n]`; stack the layers along B for several.

    Args:
        positions: position of each query, `[T]`; 0 to T-1 unless given.

    Raises:
        ValueError: there are no queries.
    """
    if block_indices.numel() == 0:
        raise ValueError(f"statistics need at least one query, not block indices {list(block_indices.shape)}")
    position = _positions(block_indices, positions)
    own = (position // geometry.select_block_size)[:, None, None]
    chosen = block_indices >= 0
    distance = (own - block_indices)[chosen]
    tokens = selected_tokens(block_indices, geometry, positions)
    return SelectionStatistics(
        num_rows=tokens.numel(),
        mean_selected_tokens=tokens.double().mean().item(),
        max_selected_tokens=int(tokens.max()),
        share_at_maximum=chosen.all(-1).double().mean().item(),
        mean_coverage=(tokens.double() / (position + 1).unsqueeze(-1)).mean().item(),
        blocks_chosen_share=_blocks_chosen_share(block_indices, own, geometry),
        mean_distance_blocks=distance.double().mean().item(),
        distance_histogram=_distance_histogram(distance),
    )


def _positions(block_indices: Tensor, positions: Tensor | None) -> Tensor:
    if positions is None:
        return torch.arange(block_indices.shape[-3], device=block_indices.device)
    return positions.to(block_indices.device)


def _blocks_chosen_share(block_indices: Tensor, own: Tensor, geometry: BlockGeometry) -> float:
    """1.0 where no block can be chosen freely."""
    first, last = geometry.num_init_blocks, int(own.max()) - geometry.num_local_blocks
    if last < first:
        return 1.0
    free = (block_indices >= first) & (block_indices <= own - geometry.num_local_blocks)
    return block_indices[free].unique().numel() / (last - first + 1)


def _distance_histogram(distance: Tensor) -> dict[str, int]:
    buckets = torch.bincount(torch.where(distance > 0, distance.double().log2().floor() + 1, 0).long())
    names = ["0", "1", *(f"{2**i}-{2 ** (i + 1) - 1}" for i in range(1, len(buckets)))]
    return dict(zip(names[: len(buckets)], buckets.tolist(), strict=True))
