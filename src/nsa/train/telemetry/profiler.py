"""Windows of steps in which a run records more: torch.profiler's trace, and the history of device memory.

    with StepWindows(run, rank=0, device=device, profile_steps=(20, 22)) as windows:
        for step in range(1, 100):
            with windows.at(step):
                train_step()

Traces go to `profile/`, one for each rank: `.json.gz` for chrome://tracing or Perfetto with a table of operators beside
it; memory histories are `.pickle` for https://pytorch.org/memory_viz.
"""

from __future__ import annotations

import sys
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from pathlib import Path
from types import TracebackType

import torch
from torch.profiler import ProfilerActivity, profile

MAX_MEMORY_EVENTS = 200_000  # allocations and frees that a history keeps: some 100 MB
TABLE_ROWS = 50  # operators in the table beside a trace

Window = tuple[int, int]


def check_windows(memory_snapshot_steps: Window | None, device: torch.device) -> None:
    """Raise `ValueError` for a window that this device cannot have."""
    if memory_snapshot_steps is not None and device.type != "cuda":
        raise ValueError(f"observe.memory_snapshot_steps records CUDA memory, and the run is on {device}; leave it out")


class StepWindows:
    """Starts and ends recordings at their steps; a context manager, whose end also ends what is being recorded.

    Args:
        run: the run folder.
        rank: of this process.
        device: of the model.
        profile_steps: first and last step of the trace; None for none.
        memory_snapshot_steps: the same for the memory history.
    """

    def __init__(
        self,
        run: Path,
        *,
        rank: int,
        device: torch.device,
        profile_steps: Window | None = None,
        memory_snapshot_steps: Window | None = None,
    ) -> None:
        self.folder, self.rank, self.device = run / "profile", rank, device
        self._windows = {self._profile: profile_steps, self._memory: memory_snapshot_steps}
        self._open: dict[int, ExitStack] = {}

    @contextmanager
    def at(self, step: int) -> Iterator[None]:
        """Around the step with this number, 1 for the first."""
        for record, window in self._windows.items():
            if window is not None and step == window[0]:
                self.folder.mkdir(exist_ok=True)
                stack = self._open.setdefault(window[1], ExitStack())
                stack.enter_context(record(f"rank{self.rank}_steps_{window[0]}_{window[1]}"))
        yield
        if step in self._open:
            self._open.pop(step).close()

    def __enter__(self) -> StepWindows:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        while self._open:
            self._open.popitem()[1].close()

    @contextmanager
    def _profile(self, name: str) -> Iterator[None]:
        on_cuda = self.device.type == "cuda"
        activities = [ProfilerActivity.CPU, *([ProfilerActivity.CUDA] if on_cuda else [])]
        # Without acc_events torch warns that events of other windows are lost; each has a profile of its own.
        with profile(activities=activities, record_shapes=True, acc_events=True) as recorded:
            yield
        sorting = "self_cuda_time_total" if on_cuda else "self_cpu_time_total"
        table = recorded.key_averages().table(sort_by=sorting, row_limit=TABLE_ROWS)
        with self._dispensable():
            recorded.export_chrome_trace(str(self.folder / f"trace_{name}.json.gz"))
            (self.folder / f"operators_{name}.txt").write_text(table, encoding="utf-8")

    @contextmanager
    def _memory(self, name: str) -> Iterator[None]:
        torch.cuda.memory._record_memory_history(max_entries=MAX_MEMORY_EVENTS)
        yield
        with self._dispensable():
            torch.cuda.memory._dump_snapshot(str(self.folder / f"memory_{name}.pickle"))
        torch.cuda.memory._record_memory_history(enabled=None)

    @contextmanager
    def _dispensable(self) -> Iterator[None]:
        """A disk that is full costs the recording and not the run."""
        try:
            yield
        except OSError as error:
            print(f"{self.folder} cannot be written: {error}; the run continues without it", file=sys.stderr)
