"""The main path of a run: build and check everything, make the run folder, train, report.

    config = load_config("configs/train_showcase.yaml")
    with setup_parallel(config.run.device, config.train.parallel) as parallel:
        trainer, folder = prepare(config, parallel=parallel)
        outcome = train(trainer, folder)

`fit` is the loop; `trainer.py` has what a run consists of and one optimizer step. Every rank runs all of this; only
rank 0 prints and writes the shared files of the run folder.
"""

from __future__ import annotations

import time
from collections.abc import Sequence
from contextlib import closing
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from nsa.inspect.picture import draw_selection
from nsa.terminal import printable
from nsa.train.budget import fit_to_budget
from nsa.train.checkpoint_save import Checkpointer
from nsa.train.config import RunConfig
from nsa.train.device import deterministic_algorithms
from nsa.train.guards import TrainingError
from nsa.train.load_config import dump_config
from nsa.train.observe.curves import draw_curves
from nsa.train.observe.environment import snapshot
from nsa.train.observe.health import judge_run
from nsa.train.observe.output import lasting_output
from nsa.train.observe.page import write_page
from nsa.train.observe.report import write_report
from nsa.train.observe.summary import data_index, describe, final_metrics, kernel_values, routing_values
from nsa.train.observe.telemetry import Telemetry
from nsa.train.observe.thresholds import Thresholds
from nsa.train.parallel import Parallel, on_main, one_process
from nsa.train.preflight.report import examine, examine_corpus
from nsa.train.run_folder import FailureStatus, RunFolder, check_unused, write_json
from nsa.train.stop import Stop, StopRequest
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


def prepare(
    config: RunConfig, command: Sequence[str] = (), parallel: Parallel | None = None
) -> tuple[Trainer, RunFolder]:
    """Build and check everything, say what is about to run, and only then make the run folder.

    With `train.max_minutes` its parts are timed first, and the run has as many steps as fit.

    Args:
        command: as typed, for `env.json`.
        parallel: this process among those of the run; the only one unless given.

    Raises:
        ValueError: preflight refuses the run, the config asks for something impossible, or the run folder exists;
            nothing was written.
    """
    start_s, deadline = time.perf_counter(), None
    path = Path(config.run.folder) / config.run.name
    check_unused(path)
    report = examine(config, world_size=parallel.world_size if parallel else 1, thorough=False)
    report.raise_if_refused()
    if config.train.max_minutes is not None:
        parallel = parallel or one_process(config.run.device)
        if parallel.is_main:
            print(f"timing a few steps, to end within {config.train.max_minutes:g} minutes", flush=True)
        config, deadline = fit_to_budget(config, parallel, start_s)
    trainer = Trainer(config, parallel)
    trainer.start_s, trainer.deadline = start_s, deadline
    report = examine_corpus(report, trainer.corpus, trainer.tokenizer)
    report.raise_if_refused()
    folder = RunFolder(path)
    trainer.parallel.barrier()  # all ranks have looked before one makes the folder
    if trainer.parallel.is_main:
        lines = [describe(trainer), *(finding.line() for finding in report.findings)]
        print(printable("\n".join(lines)), flush=True)

    def begin() -> None:
        nonlocal folder
        folder = RunFolder.create(
            path,
            config_yaml=dump_config(config),
            env=snapshot(trainer.device, command)
            | {"routing": routing_values(trainer), "kernels": kernel_values(trainer)}
            | {"num_parameters": trainer.model.num_parameters(), "config": config.model_dump(mode="json")},
            data_index=data_index(trainer),
            preflight=report.values(),
        )

    on_main(trainer.parallel, begin)
    return trainer, folder


def train(trainer: Trainer, folder: RunFolder, *, resumed: bool = False) -> Outcome:
    """Run a whole training, or the rest of one.

    Args:
        trainer: at its start, or at a checkpoint.
        folder: of this run, locked by `prepare` or `prepare_resume`; the lock is given back.
        resumed: continue the tables of the folder after the trainer's step.

    Raises:
        TrainingError: a guard ended the run, or a checkpoint could not be written; everything written so far is whole,
            `status.json` says why.
    """
    config, parallel = trainer.config, trainer.parallel
    # A run that begins again before its first checkpoint keeps no row, not even the evaluation of step 0.
    resume_step = (trainer.step or -1) if resumed else None
    with (
        lasting_output(),
        closing(folder.lock),
        deterministic_algorithms(config.run.deterministic and trainer.device.type == "cpu"),
        FailureStatus(folder, parallel.rank) as status,
        StopRequest(folder.halt, parallel) as stop,
        Telemetry(folder, config, parallel, resume_step=resume_step, deadline=trainer.deadline) as telemetry,
        trainer.checkpointer(folder) as checkpointer,
    ):
        trainer.on_phase = telemetry.phase
        asked = fit(trainer, folder, telemetry, checkpointer, stop, status)
        return finish(trainer, folder, telemetry, asked, status)


def fit(
    trainer: Trainer,
    folder: RunFolder,
    telemetry: Telemetry,
    checkpointer: Checkpointer,
    stop: StopRequest,
    status: FailureStatus,
) -> Stop | None:
    """The loop: optimizer steps, with measurements, evaluations and checkpoints between them; ends with a checkpoint.

    Returns:
        Why the run was stopped before its end, the same on all ranks; None if it was not.
    """
    config, every = trainer.config, trainer.config.train.checkpoint_every_steps
    measure = config.observe.health_every_steps
    loaded_step = status.step = trainer.step
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
            record, waits_s = trainer.train_step()
        telemetry.step(record, waits_s, num_skipped=trainer.guard.num_skipped)
        status.step = trainer.step
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
    if trainer.step not in (loaded_step, checkpointer.saved_step):
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
