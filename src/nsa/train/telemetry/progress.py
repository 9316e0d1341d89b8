"""The progress of a run on the terminal: a live bar there, and one line for each log step everywhere.

with Progress(num_steps=400) as progress:
    progress.advance(loss=2.1, tokens_per_s=12000)
    progress.line("step 10/400  loss 2.1000 ...")
"""

from __future__ import annotations

from collections.abc import Sequence
from types import TracebackType

import torch
from rich.console import Console
from rich.progress import (
    BarColumn,
    MofNCompleteColumn,
    Progress as RichProgress,
    TextColumn,
    TimeElapsedColumn,
    TimeRemainingColumn,
)

from nsa.runs.tables import StepRecord
from nsa.units import duration


class Progress:
    """A bar when the output is a terminal, plain lines always.

    Args:
        num_steps: optimizer steps of the whole run.
        console: where to write; standard output unless given.
        done: steps that lie behind already.
    """

    def __init__(self, num_steps: int, console: Console | None = None, *, done: int = 0) -> None:
        self.console = console or Console(soft_wrap=True, highlight=False)
        columns = (
            TextColumn("step"),
            MofNCompleteColumn(),
            BarColumn(bar_width=30),
            TextColumn("{task.description}"),
            TimeElapsedColumn(),
            TextColumn("left"),
            TimeRemainingColumn(),
        )
        disable = not self.console.is_terminal
        self._bar = RichProgress(*columns, console=self.console, disable=disable, transient=True)
        self._task = self._bar.add_task("", total=num_steps, completed=done)

    def advance(self, *, loss: float, tokens_per_s: float) -> None:
        """One optimizer step is done."""
        text = f"loss {loss:.3f}  {tokens_per_s:,.0f} tokens/s"
        self._bar.update(self._task, advance=1, description=text)

    def line(self, text: str) -> None:
        """Print a line above the bar."""
        self.console.print(text, markup=False)

    def __enter__(self) -> Progress:
        self._bar.start()
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self._bar.stop()


def log_line(record: StepRecord, *, num_steps: int, waits_s: Sequence[float], left_s: float) -> str:
    """The line of one log step: step, loss, learning rate, tokens/s, MFU, the waits for data since the last one, ETA.

    Args:
        record: the step.
        num_steps: optimizer steps of the whole run.
        waits_s: seconds of each wait for a batch since the last line; at least one.
        left_s: seconds to the last step.
    """
    p50, p95 = percentiles_ms(waits_s)
    mfu = "n/a" if record.mfu is None else f"{record.mfu:.1%}"
    return (
        f"step {record.step:>{len(str(num_steps))}}/{num_steps}  loss {record.loss:.4f}  lr {record.lr:.2e}  "
        f"{record.tokens_per_s:>9,.0f} tokens/s  mfu {mfu}  fetch p50 {p50:.2f} ms p95 {p95:.2f} ms  "
        f"eta {duration(left_s)}"
    )


def percentiles_ms(seconds: Sequence[float]) -> tuple[float, float]:
    """Median and 95th percentile of some waits, in milliseconds."""
    p50, p95 = (1000 * torch.tensor(seconds, dtype=torch.float64)).quantile(torch.tensor([0.5, 0.95]).double()).tolist()
    return p50, p95
