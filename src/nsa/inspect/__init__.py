"""Looking into a model: which blocks its queries select, and how often."""

from nsa.inspect.selection import (
    SelectionStatistics,
    nsa_layers,
    record_selection,
    selected_tokens,
    selection_record,
    selection_statistics,
)

__all__ = [
    "SelectionStatistics",
    "nsa_layers",
    "record_selection",
    "selected_tokens",
    "selection_record",
    "selection_statistics",
]
