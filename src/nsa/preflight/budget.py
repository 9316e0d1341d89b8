"""How many steps fit into `train.max_minutes`, once the parts of a run are timed."""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Any

from nsa.config.run import RunConfig
from nsa.units import duration

MIN_STEPS = 10  # fewer teach nothing; a run of fewer by its config is left as it is

# Of the budget, for imports, checkpoint, pictures, report and slower moments.
RESERVED_SHARE, RESERVED_S = 0.08, 3.0


@dataclass(frozen=True)
class Costs:
    """Seconds of a run's parts on this machine.

    Attributes:
        step_s: of an optimizer step.
        evaluation_s: of all held-out documents.
        health_s: of a measurement of gates and selection.
        samples_s: of the samples of all prompts, once.
        build_s: of building model and data.
        num_threads: of CPU work, with which all this was measured.
    """

    step_s: float
    evaluation_s: float
    health_s: float
    samples_s: float
    build_s: float
    num_threads: int


def fit_steps(config: RunConfig, costs: Costs, spent_s: float) -> RunConfig:
    """The config with the steps that fit into its `max_minutes`.

    Args:
        config: with `train.max_minutes`.
        costs: of its parts.
        spent_s: seconds of the budget that are over already.

    Raises:
        ValueError: not even `MIN_STEPS` steps fit.
    """
    train, minutes = config.train, config.train.max_minutes
    assert minutes is not None
    fixed_s = spent_s + costs.build_s + _between_steps_s(config, costs)
    left_s = 60 * minutes * (1 - RESERVED_SHARE) - RESERVED_S - fixed_s
    steps = min(train.steps, math.floor(left_s / costs.step_s))
    least = min(MIN_STEPS, train.steps)
    if steps < least:
        needed = (fixed_s + RESERVED_S + least * costs.step_s) / (1 - RESERVED_SHARE) / 60
        raise ValueError(
            f"train.max_minutes {minutes:g} leaves {max(0.0, left_s):.0f} s for steps of {costs.step_s:.2f} s here; "
            f"{least} steps, with evaluations and samples, take {_rounded_up(needed):g} minutes: give "
            f"--train.max_minutes {_rounded_up(needed):g} or more, or a smaller model, batch or data.max_eval_tokens"
        )
    total_s = fixed_s + steps * costs.step_s
    how = "all" if steps == train.steps else f"{steps} of {train.steps}"
    note = (
        f"{how} steps fit into {minutes:g} minutes: {costs.step_s:.3g} s a step, {costs.evaluation_s:.3g} s an "
        f"evaluation, {costs.samples_s:.3g} s for samples, "
        f"with {costs.num_threads} thread(s); about {duration(total_s)} in all"
    )
    return _with_steps(config, steps, costs.num_threads, note)


def _between_steps_s(config: RunConfig, costs: Costs) -> float:
    """Seconds of evaluations, measurements and samples, of which there are as many however many steps there are."""
    num_evaluations = 1 + math.ceil(config.train.steps / config.eval.every_steps)
    every = config.observe.health_every_steps
    num_healths = math.ceil(config.train.steps / every) if every else 0
    return num_evaluations * costs.evaluation_s + num_healths * costs.health_s + 2 * costs.samples_s


def _with_steps(config: RunConfig, steps: int, num_threads: int, note: str) -> RunConfig:
    """`config` with other steps and everything that counts in them in proportion."""
    train = config.train

    def scaled(count: int) -> int:
        return max(1, round(count * steps / train.steps)) if count else 0

    checkpoint, keep = scaled(train.checkpoint_every_steps), scaled(train.keep_every_steps)
    if checkpoint and keep:
        keep = checkpoint * max(1, round(keep / checkpoint))  # only what is written can be kept
    return _update(
        config,
        run={"num_threads": num_threads},
        train={
            "steps": steps,
            "max_minutes": None,
            "fitted": note,
            "log_every_steps": scaled(train.log_every_steps),
            "checkpoint_every_steps": checkpoint,
            "keep_every_steps": keep,
        },
        optim={"warmup_steps": scaled(config.optim.warmup_steps)},
        eval={"every_steps": scaled(config.eval.every_steps)},
        observe={"health_every_steps": scaled(config.observe.health_every_steps)},
    )


def _update(config: RunConfig, **sections: dict[str, Any]) -> RunConfig:
    """`config` with some keys changed."""
    changed = {name: getattr(config, name).model_copy(update=values) for name, values in sections.items()}
    return config.model_copy(update=changed)


def _rounded_up(minutes: float) -> float:
    """A number of minutes to type: one decimal, not less."""
    return math.ceil(10 * minutes) / 10
