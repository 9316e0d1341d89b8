"""Looking into a model: which blocks its queries select, and how its gates weigh the branches."""

from nsa.inspect.gates import GateStatistics, gate_statistics, pool_gates, record_gates
from nsa.inspect.selection import (
    SelectionStatistics,
    nsa_layers,
    pool_selection,
    record_selection,
    selected_tokens,
    selection_record,
    selection_statistics,
)

__all__ = [
    "GateStatistics",
    "SelectionStatistics",
    "gate_statistics",
    "nsa_layers",
    "pool_gates",
    "pool_selection",
    "record_gates",
    "record_selection",
    "selected_tokens",
    "selection_record",
    "selection_statistics",
]
