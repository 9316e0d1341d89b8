"""When a run will end: from its newest steps, and from its share of evaluations, checkpoints and all else.

eta = Eta(num_steps=400)
eta.step(1, step_s=0.4)
print(duration(eta.left_s))
"""

from __future__ import annotations

import time
from collections import deque
from dataclasses import dataclass
from statistics import fmean

from nsa.units import duration

RECENT_STEPS = 50  # whose mean is what a step takes now
TOLERANCE = 0.1  # share of the minutes by which a run may be late without a word

clock = time.perf_counter


@dataclass(frozen=True)
class Deadline:
    """When a run with a budget of time is to end.

    Attributes:
        start_s: `time.perf_counter()` when the budget began.
        budget_s: seconds of it.
        closing_s: seconds that the run takes after its last step.
        step_s: seconds of a step when the budget was made.
    """

    start_s: float
    budget_s: float
    closing_s: float
    step_s: float


class Eta:
    """What is left of a run until its last step.

    Args:
        num_steps: optimizer steps of the whole run.
        deadline: when it is to end; none unless given.
    """

    def __init__(self, num_steps: int, deadline: Deadline | None = None) -> None:
        self.num_steps, self.deadline = num_steps, deadline
        self._recent_s: deque[float] = deque(maxlen=RECENT_STEPS)
        self._start_s, self._steps_s, self._count, self._left = 0.0, 0.0, 0, num_steps
        self._told = False

    def step(self, step: int, step_s: float) -> None:
        """Optimizer step number `step` is done and took `step_s` seconds."""
        if not self._count:
            self._start_s = clock() - step_s
        self._recent_s.append(step_s)
        self._steps_s, self._count, self._left = self._steps_s + step_s, self._count + 1, self.num_steps - step

    @property
    def left_s(self) -> float:
        """Seconds to the last step, what lies between the steps included; at least one step must be done."""
        other_s = max(0.0, clock() - self._start_s - self._steps_s) / self._count
        return self._left * (fmean(self._recent_s) + other_s)

    def late(self) -> str | None:
        """A line, once, when the run will end well after its deadline: it does not give up steps in silence."""
        deadline = self.deadline
        if deadline is None or self._told:
            return None
        total_s = clock() - deadline.start_s + self.left_s + deadline.closing_s
        if total_s <= (1 + TOLERANCE) * deadline.budget_s:
            return None
        self._told = True
        now_s = fmean(self._recent_s)
        return (
            f"note: this run will take about {duration(total_s)} instead of {duration(deadline.budget_s)}: a step took "
            f"{deadline.step_s:.3g} s when the steps were fitted, and takes {now_s:.3g} s now. It keeps its "
            f"{self.num_steps} steps, so that its config gives the same result again; `nsa halt` ends it now, with all "
            "that it has"
        )
