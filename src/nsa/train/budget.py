"""A run that fits into `train.max_minutes`: what its parts take here is measured, then its steps are chosen.

    config, deadline = fit_to_budget(config, parallel, start_s)
    trainer = Trainer(config, parallel)  # built anew: the run is exactly as if untimed

What is timed is thrown away. The config that comes out has no `max_minutes`, so that running it again or resuming it
times nothing.
"""

from __future__ import annotations

import gc
import math
import os
import time
from collections.abc import Iterator
from dataclasses import dataclass
from statistics import fmean
from typing import Any

import psutil
import torch

from nsa.eval.samples import SampleOptions, draw_samples
from nsa.train.config import RunConfig
from nsa.train.device import deterministic_algorithms
from nsa.train.observe.eta import Deadline, clock, duration
from nsa.train.parallel import Parallel
from nsa.train.trainer import Trainer

MIN_STEPS = 10  # fewer teach nothing; a run of fewer by its config is left as it is
# Of the budget, for imports, checkpoint, pictures, report and slower moments.
RESERVED_SHARE, RESERVED_S = 0.08, 3.0
TIMED_STEPS = 3
TIMED_TOKENS = 8  # of a sample
GAIN = 1.15  # more threads must make a step so many times as fast: they suffer more from other work on the cores


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


def fit_to_budget(config: RunConfig, parallel: Parallel, start_s: float) -> tuple[RunConfig, Deadline]:
    """The config with as many steps as fit into its `max_minutes` on this machine, and when the run is to end.

    Args:
        config: with `train.max_minutes`.
        parallel: this process among those of the run; all get the same answer.
        start_s: `time.perf_counter()` when the minutes began.

    Raises:
        ValueError: not even `MIN_STEPS` steps fit.
    """
    minutes = config.train.max_minutes
    assert minutes is not None
    if 60 * minutes * (1 - RESERVED_SHARE) <= RESERVED_S:
        raise ValueError(
            f"train.max_minutes {minutes:g} are {60 * minutes:.3g} s: the report alone takes as long; give 1 or more"
        )
    costs = parallel.broadcast(measure(config, parallel))
    spent_s = parallel.broadcast(time.perf_counter() - start_s)
    fitted = fit_steps(config, costs, spent_s)
    return fitted, Deadline(start_s, 60 * minutes, costs.samples_s, costs.step_s)


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


def measure(config: RunConfig, parallel: Parallel) -> Costs:
    """Time a few steps and the rest of a run on a trainer that is thrown away; each rank calls this."""
    choose = config.run.num_threads is None and parallel.device.type == "cpu" and parallel.world_size == 1
    if choose:
        config = _update(config, run={"num_threads": 1})
    start_s = clock()
    trainer = Trainer(config, parallel)
    build_s = clock() - start_s
    with deterministic_algorithms(config.run.deterministic and parallel.device.type == "cpu"):
        trainer.train_step()  # the first one compiles and allocates
        step_s = _choose_threads(trainer) if choose else _step_s(trainer)
        start_s = clock()
        trainer.measure_health()
        health_s = clock() - start_s
        evaluation_s = trainer.time_evaluation()
        samples_s = _samples_s(trainer)
    trainer.loader.close()
    del trainer
    gc.collect()
    if parallel.device.type == "cuda":
        torch.cuda.empty_cache()
    return Costs(step_s, evaluation_s, health_s, samples_s, build_s, torch.get_num_threads())


def _choose_threads(trainer: Trainer) -> float:
    """Set the number of threads that trains fastest, among those that are free now; returns the seconds of a step."""
    idle_s, start_s = _idle_s(), clock()
    best_s, best = _step_s(trainer), 1
    free = 1 + round((_idle_s() - idle_s) / (clock() - start_s))
    # One core is left to everything else: threads wait for each other, so that one which is interrupted stops them all.
    for count in _thread_counts(min(free, usable_cores() - 1)):
        torch.set_num_threads(count)
        trainer.train_step()
        step_s = _step_s(trainer)
        if step_s * GAIN > best_s:
            break
        best_s, best = step_s, count
    torch.set_num_threads(best)
    return best_s


def _thread_counts(most: int) -> Iterator[int]:
    """2, 4, 8, ... and the most."""
    count = 2
    while count < most:
        yield count
        count *= 2
    if most > 1:
        yield most


def usable_cores() -> int:
    """Cores, not their hardware threads, that this process may use."""
    cores = psutil.cpu_count(logical=False) or psutil.cpu_count() or 1
    return min(cores, len(_allowed_cpus()))


def _allowed_cpus() -> list[int]:
    return sorted(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else list(range(os.cpu_count() or 1))


def _idle_s() -> float:
    """Seconds for which the CPUs that this process may use were idle so far, summed."""
    times = psutil.cpu_times(percpu=True)
    return sum(times[cpu].idle for cpu in _allowed_cpus() if cpu < len(times))


def _step_s(trainer: Trainer) -> float:
    return fmean(trainer.train_step()[0].step_s for _ in range(TIMED_STEPS))


def _samples_s(trainer: Trainer) -> float:
    """Seconds of all prompts' samples, from a few tokens of each."""
    options = trainer.config.sample
    model = trainer.whole_model()
    if model is None or not options.max_new_tokens:
        return 0.0
    count = min(TIMED_TOKENS, options.max_new_tokens)
    start_s = clock()
    draw_samples(model, trainer.tokenizer, options.prompts, SampleOptions(count), seed=trainer.config.run.seed)
    return (clock() - start_s) * options.max_new_tokens / count


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
