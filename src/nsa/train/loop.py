"""The main path of a run: train, measure, evaluate, save, report.

    trainer, folder = prepare(config, parallel=parallel)  # nsa.launch.start
    outcome = train(trainer, folder)

`fit` is the loop; `trainer.py` has what a run consists of and one optimizer step. Every rank runs all of this; only
rank 0 prints and writes the shared files of the run folder.
"""

from __future__ import annotations

from contextlib import closing
from dataclasses import dataclass
from typing import Any

from nsa.device import deterministic_algorithms
from nsa.inspect.picture import draw_selection
from nsa.runs.curves import draw_curves
from nsa.runs.errors import TrainingError
from nsa.runs.folder import FailureStatus, RunFolder, write_json
from nsa.runs.health import judge_run
from nsa.runs.page import write_page
from nsa.runs.report import write_report
from nsa.runs.thresholds import Thresholds
from nsa.train.checkpoint.save import Checkpointer
from nsa.train.stop import Stop, StopRequest
from nsa.train.summary import final_metrics
from nsa.train.telemetry.output import lasting_output
from nsa.train.telemetry.telemetry import Telemetry
from nsa.train.trainer import Trainer


class ReportError(TrainingError):
    """Training is over and its checkpoint whole, but its files cannot be read into a report; names the file."""


@dataclass(frozen=True)
class Outcome:
    """How a run ended.

    Attributes:
        folder: the run folder.
        stopped_by: what asked it to end early, a signal or HALT, or None.
        metrics: the contents of `metrics.json`.
    """

    folder: RunFolder
    stopped_by: str | None
    metrics: dict[str, Any]


def train(trainer: Trainer, folder: RunFolder) -> Outcome:
    """Run a whole training, or the rest of one.

    Args:
        trainer: at its start, or at a checkpoint.
        folder: of this run, locked by `prepare` or `prepare_resume`; the lock is given back. Its tables continue after
            the trainer's step.

    Raises:
        TrainingError: a guard ended the run, or a checkpoint could not be written; everything written so far is whole,
            `status.json` says why.
    """
    config, parallel = trainer.config, trainer.parallel
    with (
        lasting_output(),
        closing(folder.lock),
        deterministic_algorithms(config.run.deterministic and trainer.device.type == "cpu"),
        FailureStatus(folder, parallel.rank, lambda: trainer.step) as status,
        StopRequest(folder.halt, parallel) as stop,
        Telemetry(folder, config, parallel, start_step=trainer.step, deadline=trainer.deadline) as telemetry,
        trainer.checkpointer(folder) as checkpointer,
    ):
        trainer.on_phase = telemetry.phase
        asked = fit(trainer, folder, telemetry, checkpointer, stop)
        return finish(trainer, folder, telemetry, asked, status)


def fit(
    trainer: Trainer,
    folder: RunFolder,
    telemetry: Telemetry,
    checkpointer: Checkpointer,
    stop: StopRequest,
) -> Stop | None:
    """The loop: optimizer steps, with measurements, evaluations and checkpoints between them; ends with a checkpoint.

    Returns:
        Why the run was stopped before its end, the same on all ranks; None if it was not.
    """
    config, every = trainer.config, trainer.config.train.checkpoint_every_steps
    measure = config.observe.health_every_steps
    if not trainer.evaluations:
        telemetry.phase("sample")
        with telemetry.dispensable(folder.samples / "before.txt"):
            trainer.write_samples(folder, "before")
        evaluate(trainer, telemetry)
    asked = None
    while trainer.step < config.train.steps and not trainer.early_stop:
        if asked := stop.agreed(failed=checkpointer.failed):
            break
        with telemetry.training_step(trainer.step + 1):
            record = trainer.train_step()
        telemetry.step(record, num_skipped=trainer.guard.num_skipped)
        last = trainer.step == config.train.steps
        if measure and (last or trainer.step % measure == 0):
            telemetry.health(trainer.measure_health())
        if last or trainer.step % config.eval.every_steps == 0:
            evaluate(trainer, telemetry)
        if every and trainer.step % every == 0:
            telemetry.phase("checkpoint")
            trainer.save(checkpointer)
        if trainer.parallel.is_main and trainer.step % config.train.log_every_steps == 0:
            with telemetry.dispensable(folder.status_json):
                folder.write_status("running", step=trainer.step)
    telemetry.phase("checkpoint")
    if trainer.step > checkpointer.saved_step:
        trainer.save(checkpointer)
    checkpointer.wait()
    return asked


def evaluate(trainer: Trainer, telemetry: Telemetry) -> None:
    """Score the held-out documents and record it."""
    telemetry.phase("evaluate")
    telemetry.evaluation(trainer.evaluate())


def finish(
    trainer: Trainer, folder: RunFolder, telemetry: Telemetry, asked: Stop | None, status: FailureStatus
) -> Outcome:
    """Samples, metrics, picture and report; then the final status, which does not depend on them."""
    stopped_by = asked.reason if asked else None
    status.ended = {
        "state": "finished" if stopped_by is None else "stopped",
        "step": trainer.step,
        "reason": stopped_by or trainer.early_stop,
        "rank": asked.rank if asked else None,
    }
    telemetry.finish()
    trainer.write_samples(folder, "after")
    selection = trainer.look_at_selection()
    metrics = final_metrics(trainer, stopped_by)
    if trainer.parallel.is_main:
        try:
            metrics["findings"] = [str(finding) for finding in judge_run(folder.path, Thresholds())]
            write_json(folder.metrics_json, metrics)
            draw_curves(folder, folder.curves_png)
            write_report(folder, trainer.config, metrics)
            if selection is not None:
                selection.save(folder.selection_json)
                draw_selection(selection, folder.selection_png)
            write_page(folder)
        except (ValueError, KeyError, TypeError, AttributeError) as error:
            raise ReportError(f"the report of {folder.path} could not be written: {error}") from error
        folder.write_status(**status.ended)
    return Outcome(folder, stopped_by, metrics)
