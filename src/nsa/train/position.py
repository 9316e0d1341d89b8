"""Where a run stands, as `trainer.json` of a checkpoint keeps it: all but tensors and random numbers."""

from __future__ import annotations

from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from nsa.runs.checkpoints import TRAINER, step_of
from nsa.runs.errors import CheckpointError
from nsa.runs.folder import read_json
from nsa.runs.tables import EvalRecord


@dataclass(frozen=True)
class Position:
    """A point of a run from which it can resume; the same on all ranks.

    Attributes:
        step: optimizer steps done.
        tokens: input tokens of those steps, of all ranks.
        train_s: seconds of those steps.
        losses: newest training losses.
        evaluations: all held-out results.
        guard: `StepGuard.state_dict`.
        loader: `TrainLoader.state_dict`.
    """

    step: int
    tokens: int
    train_s: float
    losses: list[float]
    evaluations: list[EvalRecord]
    guard: dict[str, Any]
    loader: dict[str, Any]

    @classmethod
    def read(cls, checkpoint: Path) -> Position:
        """The position of a checkpoint.

        Raises:
            CheckpointError: it holds none, or that of another step.
        """
        path, step = checkpoint / TRAINER, step_of(checkpoint)
        stored = read_json(path) or {}
        if stored.get("step") != step:
            raise CheckpointError(f"{path} is not of step {step}; restore it from a copy")
        try:
            return cls(**{**stored, "evaluations": [EvalRecord(**record) for record in stored["evaluations"]]})
        except (KeyError, TypeError) as error:
            raise CheckpointError(
                f"{path} holds no position of a run that this version knows: {error!r}; restore it"
            ) from error

    def as_dict(self) -> dict[str, Any]:
        """Plain values, for JSON."""
        return asdict(self)
