"""A run that fits into `train.max_minutes`: what its parts take here is measured, then its steps are chosen.

    config, deadline = fit_to_budget(config, parallel, start_s)
    trainer = Trainer(config, parallel)  # built anew: the run is exactly as if untimed

What is timed is thrown away. The config that comes out has no `max_minutes`, so that running it again or resuming it
times nothing.
"""

from __future__ import annotations

import gc
import os
import time
from collections.abc import Iterator
from statistics import fmean

import psutil
import torch

from nsa.config.run import RunConfig
from nsa.device import deterministic_algorithms
from nsa.eval.samples import SampleOptions, draw_samples
from nsa.preflight.budget import RESERVED_S, RESERVED_SHARE, Costs, _update, fit_steps
from nsa.train.parallel import Parallel
from nsa.train.telemetry.eta import Deadline, clock
from nsa.train.trainer import Trainer

TIMED_STEPS = 3
TIMED_TOKENS = 8  # of a sample
GAIN = 1.15  # more threads must make a step so many times as fast: they suffer more from other work on the cores


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
    return fmean(trainer.train_step().step_s for _ in range(TIMED_STEPS))


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
