"""What a rank reports about itself while it trains: one context manager around the loop.

    with Telemetry(folder, config, parallel) as telemetry:
        with telemetry.training_step(1):
            record = trainer.train_step()
        telemetry.step(record, num_skipped=trainer.guard.num_skipped)

Every rank beats, dumps its stacks on SIGUSR1 and records its profiler windows; rank 0 also writes the tables,
TensorBoard and the terminal.
"""

from __future__ import annotations

import time
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from types import TracebackType

from nsa.config.run import RunConfig
from nsa.runs.curves import draw_curves
from nsa.runs.folder import RunFolder
from nsa.runs.heartbeat import Phase, heartbeat_path, stacks_path
from nsa.runs.tables import TRAINING_COLUMNS, EvalRecord, StepRecord
from nsa.train.model import training_route
from nsa.train.parallel import Parallel
from nsa.train.telemetry.eta import Deadline
from nsa.train.telemetry.health_probe import ModelHealth
from nsa.train.telemetry.heartbeat_writer import REPORTED, Heartbeat
from nsa.train.telemetry.profiler import StepWindows
from nsa.train.telemetry.recorder import Recorder, SilentRecorder
from nsa.train.telemetry.stacks import stacks_on_signal

REDRAW_AFTER_S = 120.0  # since the curves were drawn last, as that takes a second or two
IN_BEATS = tuple(name for name in TRAINING_COLUMNS if name in REPORTED)  # what a beat tells of a step


class Telemetry:
    """Heartbeat, stacks, windows and records of one rank.

    Args:
        folder: the run's folder.
        config: of the run.
        parallel: this process among those of the run.
        start_step: step of the checkpoint that the run resumes from; 0 for none.
        deadline: when the run is to end; none unless given.
    """

    def __init__(
        self,
        folder: RunFolder,
        config: RunConfig,
        parallel: Parallel,
        *,
        start_step: int = 0,
        deadline: Deadline | None = None,
    ) -> None:
        self.folder, self.config, self.parallel = folder, config, parallel
        self.start_step, self.deadline = start_step, deadline
        self.heartbeat = Heartbeat(
            heartbeat_path(folder.path, parallel.rank),
            rank=parallel.rank,
            world_size=parallel.world_size,
            num_steps=config.train.steps,
            start_step=start_step,
            every_s=config.observe.heartbeat_s,
            device=parallel.device,
        )
        self.windows = StepWindows(
            folder.path,
            rank=parallel.rank,
            device=parallel.device,
            profile_steps=config.observe.profile_steps,
            memory_snapshot_steps=config.observe.memory_snapshot_steps,
        )
        self._drawn_s = time.monotonic()
        route = training_route(config, parallel.device)
        self.heartbeat.count("fallbacks", int(route is not None and route.is_fallback))

    def __enter__(self) -> Telemetry:
        with ExitStack() as stack:
            stack.enter_context(stacks_on_signal(stacks_path(self.folder.path, self.parallel.rank)))
            stack.enter_context(self.heartbeat)
            self.recorder = stack.enter_context(self._recorder())
            stack.enter_context(self.windows)
            self._stack = stack.pop_all()
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self._stack.close()

    def phase(self, name: Phase) -> None:
        """The main thread begins with something."""
        self.heartbeat.update(phase=name)

    @contextmanager
    def training_step(self, step: int) -> Iterator[None]:
        """Around the optimizer step with this number, 1 for the first."""
        with self.windows.at(step):
            yield

    def step(self, record: StepRecord, *, num_skipped: int) -> None:
        """An optimizer step is done; `num_skipped` steps of the run were skipped by a guard so far."""
        self.heartbeat.update(waits_s=record.waits_s, **{name: getattr(record, name) for name in IN_BEATS})
        self.heartbeat.count("skipped_steps", num_skipped)
        self.recorder.step(record)

    def evaluation(self, record: EvalRecord) -> None:
        """An evaluation is done; now and then the curves are drawn up to here."""
        self.recorder.evaluation(record)
        if self.parallel.is_main and time.monotonic() - self._drawn_s >= REDRAW_AFTER_S:
            self._redraw()

    def health(self, health: ModelHealth | None) -> None:
        """Gates and selection were measured; None for a model that has none."""
        if health is not None:
            self.heartbeat.update(**health.beat_values())
            self.recorder.health(health)

    def note(self, text: str) -> None:
        """Print a line, on rank 0."""
        self.recorder.note(text)

    @contextmanager
    def dispensable(self, what: object) -> Iterator[None]:
        """Around writing what the run can do without: a full disk is reported, and the run continues."""
        try:
            yield
        except OSError as error:
            self.note(f"{what} cannot be written: {error}; the run continues without it")

    def finish(self) -> None:
        """The loop is over; what it reported last is in the file when this returns."""
        self.phase("finish")
        self.heartbeat.beat()

    def _redraw(self) -> None:
        """The curves so far; a run does not end because they cannot be drawn."""
        try:
            with self.dispensable(self.folder.curves_png):
                draw_curves(self.folder, self.folder.curves_png)
        except ValueError as error:
            self.note(f"{self.folder.curves_png} cannot be drawn: {error}; the run continues without it")
        self._drawn_s = time.monotonic()

    def _recorder(self) -> Recorder | SilentRecorder:
        if not self.parallel.is_main:
            return SilentRecorder()
        train = self.config.train
        options = {"num_steps": train.steps, "log_every_steps": train.log_every_steps}
        return Recorder(self.folder, **options, start_step=self.start_step, deadline=self.deadline)
