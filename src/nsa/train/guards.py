"""What stops or skips an optimizer step before the weights change.

NaN and infinity, sudden spikes, and a loss below what the data allows: a model that predicts better than the entropy
of its data has seen the answer, so that is an error and no success.
"""

from __future__ import annotations

import math
from collections import deque
from collections.abc import Mapping
from statistics import median
from typing import Any

from nsa.config.run import GuardSection
from nsa.runs.errors import TrainingError

SPIKE_HISTORY = 50  # losses whose median a spike is measured against
FLOOR_TOLERANCE = 0.01  # share of the floor that chance may take a mean loss below it


class StepGuard:
    """Judges each step by its loss and gradient norm.

    Args:
        config: what to do, and when.
    """

    def __init__(self, config: GuardSection) -> None:
        self.config = config
        self.num_skipped = 0
        self._skipped_in_a_row = 0
        self._losses: deque[float] = deque(maxlen=SPIKE_HISTORY)

    def allows(self, step: int, loss: float, grad_norm: float) -> bool:
        """Whether the optimizer may step; False skips this step.

        Args:
            step: the optimizer step that is about to happen.
            loss: mean nats per token of the step.
            grad_norm: global norm of its gradients before clipping.

        Raises:
            TrainingError: the run must end here; the weights are those of the step before.
        """
        self._check_floor(loss, f"the training loss of step {step}")
        finite = math.isfinite(loss) and math.isfinite(grad_norm)
        if finite and not self._is_spike(loss):
            self._losses.append(loss)
            self._skipped_in_a_row = 0
            return True
        what = f"loss {loss:.6g} and gradient norm {grad_norm:.6g}"
        if not finite and self.config.on_nonfinite == "stop":
            raise TrainingError(
                f"step {step} has {what}; the weights are still those of step {step - 1}. "
                f"Lower optim.lr or look at the data; with guards.on_nonfinite: skip a single bad batch is skipped"
            )
        self.num_skipped += 1
        self._skipped_in_a_row += 1
        if self._skipped_in_a_row > self.config.max_skipped_steps:
            raise TrainingError(
                f"step {step} has {what}, the {self._skipped_in_a_row}th skipped step in a row "
                f"(guards.max_skipped_steps {self.config.max_skipped_steps}); lower optim.lr or look at the data"
            )
        return False

    def state_dict(self) -> dict[str, Any]:
        """What the judgement of the coming steps depends on, as plain values."""
        return {
            "num_skipped": self.num_skipped,
            "skipped_in_a_row": self._skipped_in_a_row,
            "losses": list(self._losses),
        }

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """Go on from what `state_dict` gave."""
        self.num_skipped, self._skipped_in_a_row = state["num_skipped"], state["skipped_in_a_row"]
        self._losses = deque(state["losses"], maxlen=SPIKE_HISTORY)

    def check_evaluation(self, step: int, loss: float) -> None:
        """Raise `TrainingError` for a held-out loss that is not finite or lower than the data allows."""
        if not math.isfinite(loss):
            raise TrainingError(f"the held-out loss after step {step} is {loss}; lower optim.lr or look at the data")
        self._check_floor(loss, f"the held-out loss after step {step}")

    def _check_floor(self, loss: float, what: str) -> None:
        floor = self.config.entropy_floor_nats
        if floor is not None and loss < floor * (1 - FLOOR_TOLERANCE):
            raise TrainingError(
                f"{what} is {loss:.4f} nats per token, below the data's floor of {floor:.4f}: the model sees "
                f"what it should predict. Check labels, masks and the held-out documents; "
                f"if the floor itself is wrong, set guards.entropy_floor_nats"
            )

    def _is_spike(self, loss: float) -> bool:
        factor = self.config.spike_factor
        full = len(self._losses) == SPIKE_HISTORY
        return factor is not None and full and loss > factor * median(self._losses)
