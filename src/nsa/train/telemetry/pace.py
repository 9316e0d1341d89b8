"""How fast a run trains: tokens and operations per second over its newest steps, without what lies between them.

pace = Pace(num_steps=10)
tokens_per_s, flops_per_s = pace.add(step_s=0.4, tokens=4096, flops=1e9)
"""

from __future__ import annotations

from collections import deque


class Pace:
    """The rates of the newest optimizer steps together; evaluations and checkpoints between them do not count.

    The first step of a process, which compiles and warms up, counts only until there is another.

    Args:
        num_steps: how many of the newest steps make a rate; `train.log_every_steps`, so that each log line has the rate
            since the last one.
    """

    def __init__(self, num_steps: int) -> None:
        self._newest: deque[tuple[float, float, float]] = deque(maxlen=num_steps)
        self._count = 0

    def add(self, *, step_s: float, tokens: float, flops: float) -> tuple[float, float]:
        """A step is done; returns tokens and operations per second of the newest steps."""
        self._count += 1
        if self._count == 2:
            self._newest.clear()
        self._newest.append((step_s, tokens, flops))
        seconds, all_tokens, all_flops = map(sum, zip(*self._newest, strict=True))
        return all_tokens / seconds, all_flops / seconds
