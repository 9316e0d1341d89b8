"""Where the numbers of a step and of an evaluation go: the tables, TensorBoard and the terminal."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager
from dataclasses import asdict
from pathlib import Path
from types import TracebackType
from typing import Any

from torch.utils.tensorboard import SummaryWriter

from nsa.runs.folder import RunFolder
from nsa.runs.tables import HEALTH_COLUMNS, TRAINING_COLUMNS, VALIDATION_COLUMNS, CsvWriter, EvalRecord, StepRecord
from nsa.train.telemetry.eta import Deadline, Eta
from nsa.train.telemetry.health_probe import ModelHealth
from nsa.train.telemetry.progress import Progress, log_line


class Recorder:
    """Writes each record everywhere that it belongs; a context manager.

    Args:
        folder: the run's folder.
        num_steps: optimizer steps of the whole run.
        log_every_steps: optimizer steps between lines on the terminal.
        start_step: continue the tables after this step, the checkpoint's: what came later is taken out of them; 0
            begins them anew.
        deadline: when the run is to end; none unless given.
    """

    def __init__(
        self,
        folder: RunFolder,
        *,
        num_steps: int,
        log_every_steps: int,
        start_step: int = 0,
        deadline: Deadline | None = None,
    ) -> None:
        self.num_steps, self.log_every_steps = num_steps, log_every_steps
        self._eta = Eta(num_steps, deadline)
        self._waits_s: list[float] = []
        resume_step = start_step or None
        purge_step = start_step + 1 if start_step else 0
        with ExitStack() as stack:
            self.progress = stack.enter_context(Progress(num_steps, done=start_step))
            self._training = stack.enter_context(
                CsvWriter(folder.training_csv, TRAINING_COLUMNS, resume_step=resume_step)
            )
            self._validation = stack.enter_context(
                CsvWriter(folder.val_csv, VALIDATION_COLUMNS, resume_step=resume_step)
            )
            self._health = stack.enter_context(CsvWriter(folder.health_csv, HEALTH_COLUMNS, resume_step=resume_step))
            self._board = stack.enter_context(Board(folder.tensorboard, purge_step=purge_step, note=self.note))
            self._stack = stack.pop_all()

    def step(self, record: StepRecord) -> None:
        """Record an optimizer step."""
        values = {name: getattr(record, name) for name in TRAINING_COLUMNS}
        self._training.write(**values)
        self._to_board("train", values, record.step)
        self._waits_s += record.waits_s
        self._eta.step(record.step, record.step_s)
        self.progress.advance(loss=record.loss, tokens_per_s=record.tokens_per_s)
        if record.step % self.log_every_steps == 0 or record.step in (1, self.num_steps):
            self.note(log_line(record, num_steps=self.num_steps, waits_s=self._waits_s, left_s=self._eta.left_s))
            if late := self._eta.late():
                self.note(late)
            self._waits_s = []

    def evaluation(self, record: EvalRecord) -> None:
        """Record an evaluation."""
        values = asdict(record)
        self._validation.write(**values)
        self._to_board("eval", values, record.step)
        self.note(
            f"held-out documents after step {record.step}: loss {record.val_loss:.4f}, perplexity "
            f"{record.val_ppl:.3f}, {record.val_bits_per_byte:.4f} bits per byte"
        )

    def health(self, health: ModelHealth) -> None:
        """Record a measurement of gates and selection."""
        for row in health.rows():
            self._health.write(**row)
            layer = row.pop("layer")
            for name, value in row.items():
                if name != "step":
                    self._board.add_scalar(f"health_{name}/layer_{layer}", value, health.step)
        self._to_board("gate", health.gate.as_dict(), health.step)
        self._to_board("selection", health.selection.as_dict(), health.step)

    def note(self, text: str) -> None:
        """Print a line."""
        self.progress.line(text)

    def __enter__(self) -> Recorder:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self._stack.close()

    def _to_board(self, group: str, values: dict[str, Any], step: int) -> None:
        """Add the numbers among some values to TensorBoard."""
        for name, value in values.items():
            if isinstance(value, int | float) and name != "step":
                self._board.add_scalar(f"{group}/{name}", value, step)


class Board:
    """TensorBoard's files; a context manager. A disk that takes no more ends the board, and not the run.

    Args:
        folder: of the files.
        purge_step: what older files say of this step and later ones is hidden.
        note: takes the line about a board that has ended.
    """

    def __init__(self, folder: Path, *, purge_step: int, note: Callable[[str], None]) -> None:
        self._folder, self._note = folder, note
        self._writer: SummaryWriter | None = None
        with self._ends():
            self._writer = SummaryWriter(str(folder), purge_step=purge_step)

    def add_scalar(self, name: str, value: float, step: int) -> None:
        """Add a point to a curve."""
        if self._writer is not None:
            with self._ends():
                self._writer.add_scalar(name, value, step)

    def __enter__(self) -> Board:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        if self._writer is not None:
            with self._ends():
                self._writer.close()

    @contextmanager
    def _ends(self) -> Iterator[None]:
        try:
            yield
        except OSError as error:
            self._writer = None
            self._note(f"{self._folder} cannot be written: {error}; the run continues without it")


class SilentRecorder:
    """The `Recorder` of a rank that writes and prints nothing."""

    def step(self, record: StepRecord) -> None:
        """Nothing."""

    def evaluation(self, record: EvalRecord) -> None:
        """Nothing."""

    def health(self, health: ModelHealth) -> None:
        """Nothing."""

    def note(self, text: str) -> None:
        """Nothing."""

    def __enter__(self) -> SilentRecorder:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        """Nothing to close."""
