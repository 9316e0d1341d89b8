"""What gates and selection come to, as plain numbers: read from a run's files, or worked out by `gates.py` and
`selection.py`. Nothing here needs torch.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Sequence
from dataclasses import asdict, dataclass, fields
from typing import Any

from nsa.geometry import BlockGeometry

COLLAPSED_WEIGHT = 0.95  # a gate that gives one branch more than this share of its weight has collapsed onto it


@dataclass(frozen=True)
class GateStatistics:
    """How the gates of a layer, or of several together, weigh the branches; a row is one gate of one token and head.

    Weights are shares of the three weights' sum, so that sigmoid gates are judged like softmax gates.

    Attributes:
        num_rows: rows counted.
        entropy_mean_nats: mean entropy of a row; ln 3 = 1.099 for equal weights, 0 for one branch alone.
        max_mean: mean of a row's largest weight; 1/3 to 1.
        share_cmp, share_slc, share_win: mean weight of the compressed, selected and window branch.
        collapse_share: share of rows whose largest weight exceeds `COLLAPSED_WEIGHT`.
    """

    num_rows: int
    entropy_mean_nats: float
    max_mean: float
    share_cmp: float
    share_slc: float
    share_win: float
    collapse_share: float

    def as_dict(self) -> dict[str, Any]:
        """Plain values for JSON."""
        return asdict(self)


def pool_gates(layers: Sequence[GateStatistics]) -> GateStatistics:
    """Statistics of several layers together, each weighed by its rows."""
    total = sum(layer.num_rows for layer in layers)
    means = {
        field.name: sum(getattr(layer, field.name) * layer.num_rows for layer in layers) / total
        for field in fields(GateStatistics)
        if field.name != "num_rows"
    }
    return GateStatistics(num_rows=total, **means)


@dataclass(frozen=True)
class SelectionStatistics:
    """How a layer, or several together, select; a row is one query of one group.

    Attributes:
        num_rows: rows counted.
        mean_selected_tokens, max_selected_tokens: tokens that a row's blocks hold, up to the query's own.
        share_at_maximum: share of rows with all n blocks chosen.
        mean_coverage: mean share of a query's context that its blocks hold.
        blocks_chosen_share: share of the blocks after the forced initial ones that some later query chose beyond its
            forced ones.
        mean_distance_blocks: mean number of blocks between a chosen block and the query's own.
        distance_histogram: how often a chosen block lay so many blocks before the query's own: "0", "1", "2-3", "4-7",
            and so on by powers of two.
    """

    num_rows: int
    mean_selected_tokens: float
    max_selected_tokens: int
    share_at_maximum: float
    mean_coverage: float
    blocks_chosen_share: float
    mean_distance_blocks: float
    distance_histogram: dict[str, int]

    def as_dict(self) -> dict[str, Any]:
        """Plain values for JSON."""
        return asdict(self)


def pool_selection(layers: Sequence[SelectionStatistics]) -> SelectionStatistics:
    """Statistics of several layers together, each weighed by its rows; `blocks_chosen_share` is their mean."""
    total = sum(layer.num_rows for layer in layers)

    def mean(name: str) -> float:
        return sum(getattr(layer, name) * layer.num_rows for layer in layers) / total

    histogram: Counter[str] = Counter()
    for layer in layers:
        histogram.update(layer.distance_histogram)
    return SelectionStatistics(
        num_rows=total,
        mean_selected_tokens=mean("mean_selected_tokens"),
        max_selected_tokens=max(layer.max_selected_tokens for layer in layers),
        share_at_maximum=mean("share_at_maximum"),
        mean_coverage=mean("mean_coverage"),
        blocks_chosen_share=mean("blocks_chosen_share"),
        mean_distance_blocks=mean("mean_distance_blocks"),
        distance_histogram=dict(histogram),
    )


def selection_record(block_indices: list[int], position: int, geometry: BlockGeometry) -> dict[str, Any]:
    """What one query of one group attends to and reads, as plain values for JSON.

    Args:
        block_indices: its chosen blocks, -1 for none.
        position: of the query.

    Returns:
        `blocks`; `forced`, those that every query at this position has; `ranges`, the blocks as merged token ranges
        `[start, end)` up to the query; `reads` by branch, predicted by the geometry and done.
    """
    size, length = geometry.select_block_size, position + 1
    blocks = [j for j in block_indices if j >= 0]
    ranges: list[list[int]] = []
    for j in blocks:
        start, end = j * size, min((j + 1) * size, length)
        if ranges and ranges[-1][1] == start:
            ranges[-1][1] = end
        else:
            ranges.append([start, end])
    predicted = geometry.predicted_reads(length)
    done = predicted | {"slc": sum(end - start for start, end in ranges)}
    return {
        "blocks": blocks,
        "forced": [j for j in blocks if is_forced(j, position, geometry)],
        "ranges": ranges,
        "reads": {
            "predicted": predicted | {"total": sum(predicted.values())},
            "done": done | {"total": sum(done.values())},
        },
    }


def is_forced(block: int, position: int, geometry: BlockGeometry) -> bool:
    """Whether every query at `position` selects `block`, whatever the scores say."""
    own = position // geometry.select_block_size
    return block < geometry.num_init_blocks or own - geometry.num_local_blocks < block <= own
