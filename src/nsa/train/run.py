"""The main path of a run: build and check everything, make the run folder, train, report.

    trainer, folder = prepare(load_config("configs/train_showcase.yaml"))
    outcome = train(trainer, folder)

`fit` is the loop; `trainer.py` has what a run consists of and one optimizer step.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from nsa.train.config import RunConfig
from nsa.train.device import deterministic_algorithms
from nsa.train.load_config import dump_config
from nsa.train.observe.curves import draw_curves
from nsa.train.observe.environment import snapshot
from nsa.train.observe.recorder import Recorder
from nsa.train.observe.report import write_report
from nsa.train.observe.summary import data_index, describe, final_metrics
from nsa.train.run_folder import FailureStatus, RunFolder, check_unused, write_json
from nsa.train.stop import StopRequest
from nsa.train.trainer import Trainer


@dataclass(frozen=True)
class Outcome:
    """How a run ended.

    Attributes:
        folder: the run folder.
        stopped_by: the signal that ended it early, or None.
        metrics: the contents of `metrics.json`.
    """

    folder: RunFolder
    stopped_by: str | None
    metrics: dict[str, Any]


def prepare(config: RunConfig, command: Sequence[str] = ()) -> tuple[Trainer, RunFolder]:
    """Build and check everything, say what is about to run, and only then make the run folder.

    Raises:
        ValueError: the config asks for something impossible, or the run folder exists; nothing was written.
    """
    path = Path(config.run.folder) / config.run.name
    check_unused(path)
    trainer = Trainer(config)
    print(describe(trainer), flush=True)
    env = snapshot(trainer.device, command)
    folder = RunFolder.create(path, config_yaml=dump_config(config), env=env, data_index=data_index(trainer))
    return trainer, folder


def train(trainer: Trainer, folder: RunFolder) -> Outcome:
    """Run a whole training.

    Raises:
        TrainingError: a guard ended the run; everything written so far is whole, `status.json` says why.
    """
    config = trainer.config
    with (
        deterministic_algorithms(config.run.deterministic and trainer.device.type == "cpu"),
        FailureStatus(folder) as status,
        StopRequest() as stop,
        Recorder(folder, num_steps=config.train.steps, log_every_steps=config.train.log_every_steps) as recorder,
    ):
        fit(trainer, folder, recorder, stop, status)
        return finish(trainer, folder, stop.reason)


def fit(trainer: Trainer, folder: RunFolder, recorder: Recorder, stop: StopRequest, status: FailureStatus) -> None:
    """The loop: optimizer steps, with evaluations and checkpoints between them; ends with a checkpoint."""
    config, every = trainer.config, trainer.config.train.checkpoint_every_steps
    trainer.write_samples(folder, "before")
    recorder.evaluation(trainer.evaluate())
    while not (trainer.step == config.train.steps or stop.reason or trainer.early_stop):
        recorder.step(*trainer.train_step())
        status.step = trainer.step
        last = trainer.step == config.train.steps
        if last or trainer.step % config.eval.every_steps == 0:
            recorder.evaluation(trainer.evaluate())
        if every and trainer.step % every == 0:
            trainer.save(folder)
        if trainer.step % config.train.log_every_steps == 0:
            folder.write_status("running", step=trainer.step)
    if trainer.saved_step != trainer.step:
        trainer.save(folder)


def finish(trainer: Trainer, folder: RunFolder, stopped_by: str | None) -> Outcome:
    """Samples, metrics, picture and report; then the final status."""
    if stopped_by is None:
        trainer.write_samples(folder, "after")
    metrics = final_metrics(trainer, stopped_by)
    write_json(folder.metrics_json, metrics)
    draw_curves(folder, folder.curves_png)
    write_report(folder, trainer.config, metrics)
    state = "finished" if stopped_by is None else "stopped"
    folder.write_status(state, step=trainer.step, reason=stopped_by or trainer.early_stop)
    return Outcome(folder, stopped_by, metrics)
