"""What preflight can find: a stable name for each problem, and a finding with its numbers and remedy.

>>> Finding("no-checkpoints", "error", "50000 steps without a checkpoint", "set train.checkpoint_every_steps").line()
'error   no-checkpoints: 50000 steps without a checkpoint; set train.checkpoint_every_steps'
"""

from __future__ import annotations

import difflib
from collections.abc import Iterable
from dataclasses import dataclass
from typing import Literal

Level = Literal["error", "warning", "info"]

# The name of each problem -> what it means. docs/before_a_run.md lists them.
CODES = {
    "backend-missing": "the NSA backend that is asked for cannot run on the device",
    "batch-not-divisible": "batch_tokens cannot be shared evenly among the processes",
    "bf16-on-cpu": "the CPU has no fast bf16",
    "budget-too-small": "hardly a step fits into train.max_minutes",
    "checkpoints-too-rare": "a crash would lose more than an hour of work",
    "data-replaced": "synthetic data stand in for a source that cannot be opened",
    "data-repeats": "the run reads the training documents many times",
    "data-source": "the data cannot be read, or does not give a batch",
    "device-missing": "the device that is asked for is not here",
    "disk-too-small": "the checkpoints do not fit on the disk",
    "entropy-floor": "the entropy floor is above the loss of a uniform guess",
    "fp32-on-bf16-gpu": "fp32 on a GPU that computes bf16 many times faster",
    "heldout-overlap": "a held-out document is trained on",
    "leak": "an output depends on later tokens or on another document",
    "learning-rate": "the learning rate is far from any that trains",
    "memory": "the step does not fit into the device's memory",
    "model": "no model can be built from the config",
    "no-checkpoints": "a long run without checkpoints",
    "no-early-stop": "a run of days that never ends early",
    "no-evaluation": "no evaluation before the end of the run",
    "nothing-compressed": "the rows are shorter than a compressed block",
    "run-folder-used": "the run folder exists",
    "selection-covers-all": "selection or window cover whole rows: nothing is sparse",
    "speed-unknown": "the time that the run takes cannot be estimated",
    "tokenizer": "the tokenizer cannot be loaded, or does not fit the data",
    "warmup-too-long": "the learning rate never reaches its peak",
}

# What the trainer refuses by itself, whatever preflight is told.
NOT_OVERRIDABLE = frozenset(
    {
        "backend-missing",
        "batch-not-divisible",
        "budget-too-small",
        "data-source",
        "device-missing",
        "model",
        "run-folder-used",
        "tokenizer",
    }
)


@dataclass(frozen=True)
class Finding:
    """One problem of a run.

    Attributes:
        code: its stable name, a key of `CODES`.
        level: "error" refuses the run, "warning" and "info" do not.
        message: what is wrong, with the numbers.
        remedy: what to do.
        allowed: whether the config overrides it (`preflight.allow`).
    """

    code: str
    level: Level
    message: str
    remedy: str
    allowed: bool = False

    @property
    def refuses(self) -> bool:
        """Whether the run may not start."""
        return self.level == "error" and not self.allowed

    @property
    def overridable(self) -> bool:
        """Whether `preflight.allow` may name it."""
        return self.code not in NOT_OVERRIDABLE

    def line(self) -> str:
        """Level, name, problem and remedy in one line."""
        level = "allowed" if self.allowed else self.level
        return f"{level:<7} {self.code}: {self.message}; {self.remedy}"


def check_allowed(codes: Iterable[str]) -> None:
    """Raise `ValueError` for a name that is unknown or cannot be overridden."""
    for code in codes:
        if code not in CODES:
            near = difflib.get_close_matches(code, CODES, n=1, cutoff=0.0)
            raise ValueError(f"preflight.allow names {code!r}, which no check finds; did you mean {near[0]!r}?")
        if code in NOT_OVERRIDABLE:
            raise ValueError(f"preflight.allow names {code!r}, which cannot be overridden: {CODES[code]}")
