"""The folder of one run: what lies where, and writes that are either whole or absent.

runs/NAME/  config.yaml env.json preflight.json data_index.json status.json metrics.json
            training.csv val.csv health.csv tb/ heartbeat_rank0.jsonl stacks_rank0.txt profile/
            curves.png report.md report.html selection.json selection.png samples/before.txt samples/after.txt
            checkpoints/step_000500/ ... checkpoints/latest -> step_000500
            run.lock, and HALT when someone asks the run to stop
"""

from __future__ import annotations

import json
import os
import time
from pathlib import Path
from types import TracebackType
from typing import Any, Literal

from nsa.train.run_lock import RunLock

State = Literal["running", "finished", "stopped", "failed"]


class RunFolder:
    """Paths and small files of one run.

    Attributes:
        path: the folder itself.
    """

    def __init__(self, path: Path) -> None:
        self.path = path
        self.config_yaml = path / "config.yaml"
        self.env_json = path / "env.json"
        self.data_index_json = path / "data_index.json"
        self.preflight_json = path / "preflight.json"
        self.training_csv = path / "training.csv"
        self.val_csv = path / "val.csv"
        self.health_csv = path / "health.csv"
        self.metrics_json = path / "metrics.json"
        self.status_json = path / "status.json"
        self.curves_png = path / "curves.png"
        self.report_md = path / "report.md"
        self.report_html = path / "report.html"
        self.selection_json = path / "selection.json"
        self.selection_png = path / "selection.png"
        self.samples = path / "samples"
        self.tensorboard = path / "tb"
        self.checkpoints = path / "checkpoints"
        self.halt = path / "HALT"
        self.lock = RunLock(path / "run.lock")

    @classmethod
    def create(
        cls,
        path: Path,
        *,
        config_yaml: str,
        env: dict[str, Any],
        data_index: dict[str, Any],
        preflight: dict[str, Any] | None = None,
    ) -> RunFolder:
        """Make the folder with what is known before the first step, and lock it.

        Args:
            preflight: for `preflight.json`; the findings that it lets pass stand in every `status.json` from now on.

        Raises:
            ValueError: it exists already; nothing in it is touched.
        """
        check_unused(path)
        path.mkdir(parents=True)
        folder = cls(path)
        folder.lock.acquire()
        folder.samples.mkdir()
        write_text(folder.config_yaml, config_yaml)
        write_json(folder.env_json, env)
        write_json(folder.data_index_json, data_index)
        if preflight is not None:
            write_json(folder.preflight_json, preflight)
        folder.write_status("running", step=0)
        return folder

    def write_status(self, state: State, *, step: int, reason: str | None = None, rank: int | None = None) -> None:
        """Replace `status.json`; a failure stays until the run is begun again, whatever other ranks write after it.

        Args:
            state: how the run stands.
            step: optimizer steps done.
            reason: why it stopped or failed.
            rank: the rank that was asked to stop, or that failed first.
        """
        before = read_json(self.status_json) or {}
        if before.get("state") != "failed":
            self._put_status(state, step, reason, rank, before.get("resumed_from"))

    def begin_again(self, *, step: int, resumed_from: dict[str, Any]) -> None:
        """Replace `status.json` when a run is resumed, whatever it said; `resumed_from` stays in it from now on."""
        self._put_status("running", step, None, None, resumed_from)

    def read_status(self) -> dict[str, Any]:
        """The contents of `status.json`.

        Raises:
            ValueError: it is missing or damaged.
        """
        status = read_json(self.status_json)
        if status is None or not {"state", "step", "unix_time_s"} <= status.keys():
            raise ValueError(f"{self.status_json} is missing or damaged; `nsa resume {self.path}` writes a new one")
        return status

    def overridden(self) -> list[str]:
        """Names of the errors of preflight that the config lets pass."""
        findings = (read_json(self.preflight_json) or {}).get("findings", [])
        return [finding["code"] for finding in findings if finding["allowed"]]

    def _put_status(
        self, state: State, step: int, reason: str | None, rank: int | None, resumed_from: dict[str, Any] | None
    ) -> None:
        values = {"state": state, "step": step, "reason": reason, "rank": rank, "resumed_from": resumed_from}
        if (index := read_json(self.data_index_json)) is not None:
            values["data"] = index.get("description")
        values["preflight_overridden"] = self.overridden()
        write_json(self.status_json, {**values, "unix_time_s": time.time()})


class FailureStatus:
    """A `with` block around training: whatever escapes it is recorded as the reason in `status.json`, then goes on.

    Args:
        folder: the run's folder.
        rank: of this process.

    Attributes:
        step: the last step that was completed; the loop keeps it current.
    """

    def __init__(self, folder: RunFolder, rank: int = 0) -> None:
        self.folder, self.rank = folder, rank
        self.step = 0

    def __enter__(self) -> FailureStatus:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        if kind is None or error is None:
            return
        # A full disk may have stopped a table before the checkpoint in flight, whose note says more.
        reason = "; ".join([f"{kind.__name__}: {error}", *getattr(error, "__notes__", [])])
        folder = self.folder.path
        error.add_note(f"rank {self.rank}, after step {self.step}; once mended, go on with: nsa resume {folder}")
        try:
            self.folder.write_status("failed", step=self.step, reason=reason, rank=self.rank)
        except OSError as unwritten:
            error.add_note(f"{self.folder.status_json} could not be written: {unwritten}")


def check_unused(path: Path) -> None:
    """Raise `ValueError` when there is already something at a new run's place."""
    if path.exists():
        raise ValueError(
            f"the run folder {path} exists already and is left as it is; "
            f"give another name (--run.name {path.name}-2), or remove the folder first"
        )


def write_text(path: Path, text: str) -> None:
    """Write a file so that a reader finds the old or the new contents, never a part."""
    temporary = path.with_name(f".{path.name}.{os.getpid()}.part")  # several ranks may write one file
    temporary.write_text(text, encoding="utf-8")
    os.replace(temporary, path)


def read_json(path: Path) -> dict[str, Any] | None:
    """The object in a JSON file, or None where that is missing or damaged, as after a loss of power."""
    try:
        values = json.loads(path.read_text(encoding="utf-8"))
    except (FileNotFoundError, ValueError):
        return None
    return values if isinstance(values, dict) else None


def write_json(path: Path, values: dict[str, Any]) -> None:
    """Write plain values as indented JSON, whole or not at all."""
    write_text(path, json.dumps(values, indent=2, ensure_ascii=False) + "\n")
