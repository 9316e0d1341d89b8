"""The bounds of a healthy run, in one place: `health.py` judges by them, for the watch, the report and the smoke check.

nsa watch runs/NAME --thresholds.stall_s 600
"""

from __future__ import annotations

import math
from dataclasses import dataclass, fields

AT_MOST = {
    "throughput_drop": 1.0,
    "gate_entropy_mean_nats": math.log(3),  # that of a gate that weighs its three branches alike
    "gate_max_mean": 1.0,
    "gate_collapse_share": 1.0,
}
AT_LEAST = {"throughput_min_beats": 1, "memory_min_beats": 4, "loss_beats": 1}


@dataclass(frozen=True)
class Thresholds:
    """Bounds of a healthy run; units are in the names.

    Raises:
        ValueError: a bound with which its alarm could never ring, or would always: not finite, negative, or a share
            above 1.
    """

    stall_s: float = 180.0
    """Seconds without progress in the phases "fetch" and "step" that are a stall."""
    warmup_steps: int = 3
    """Steps in which kernels and the model may still compile: `slow_phase_stall_s` holds, and speed is not judged."""
    slow_phase_stall_s: float = 1800.0
    """Seconds without progress in all other phases and during the warm-up that are a stall."""
    silent_s: float = 60.0
    """Seconds without a beat, of a process that has not ended, after which it counts as silent."""

    throughput_drop: float = 0.10
    """Share by which the recent tokens per second may lie below the run's own median."""
    throughput_window_s: float = 120.0
    """Seconds that count as recent, for the tokens per second."""
    throughput_min_beats: int = 10
    """Beats with a step of their own that the recent time and the time before it need for a judgement."""

    memory_growth: float = 0.10
    """Share by which memory may grow from the second quarter of a process's life to its last one."""
    memory_growth_gib: float = 0.5
    """Growth in GiB below which memory counts as flat, whatever its share."""
    memory_min_beats: int = 40
    """Beats after the warm-up that a judgement of memory needs."""

    loss_rise_nats: float = 0.5
    """Nats per token by which the recent loss may lie above the lowest one before."""
    loss_beats: int = 10
    """Beats with a step of their own whose median is one loss to compare."""

    gate_entropy_mean_nats: float = 0.5
    """Least mean entropy of the gates; ln 3 = 1.099 when all branches weigh the same."""
    gate_max_mean: float = 0.9
    """Greatest mean of the largest of the three gate weights."""
    gate_collapse_share: float = 0.05
    """Greatest share of gates that leave one branch only (`nsa.inspect.statistics.COLLAPSED_WEIGHT`)."""

    stacks_after_s: float = 30.0
    """Seconds that a finding lasts before the watch asks for the stacks of its process."""
    halt_after_s: float = 120.0
    """Seconds that a finding lasts before the watch halts the run."""
    halt_wait_s: float = 300.0
    """Seconds that a halted run may take to write its checkpoint and end, before the watch gives it up."""

    def __post_init__(self) -> None:
        for name in (field.name for field in fields(self)):
            value, least, most = getattr(self, name), AT_LEAST.get(name, 0), AT_MOST.get(name, math.inf)
            if not (math.isfinite(value) and least <= value <= most):
                bounds = f"at least {least}" if most == math.inf else f"from {least} to {most:.4g}"
                raise ValueError(f"thresholds.{name} is {value:g}; it must be a finite number, {bounds}")
