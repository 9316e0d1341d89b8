"""The folder of one run: what lies where, and writes that are either whole or absent.

runs/NAME/  config.yaml env.json preflight.json data_index.json status.json metrics.json
            training.csv val.csv health.csv tb/ heartbeat_rank0.jsonl stacks_rank0.txt profile/
            curves.png report.md report.html selection.json selection.png samples/before.txt samples/after.txt
            checkpoints/step_000500/ ... checkpoints/latest -> step_000500
            run.lock, and HALT when someone asks the run to stop
"""

from __future__ import annotations

import errno
import json
import os
import shutil
import time
from collections.abc import Callable
from pathlib import Path
from types import TracebackType
from typing import Any, Literal, get_args

from nsa.runs.lock import RunLock
from nsa.terminal import printable, redacted

MAX_NAME_BYTES = 200  # most disks allow 255, of which temporary names need some
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

    @property
    def tables(self) -> tuple[Path, ...]:
        """The files that get a row at a time."""
        return self.training_csv, self.val_csv, self.health_csv

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
        """Make the folder with what is known before the first step, whole or not at all, and lock it.

        Args:
            preflight: for `preflight.json`; the findings that it lets pass stand in every `status.json` from now on.

        Raises:
            ValueError: it exists already; nothing in it is touched.
        """
        check_unused(path)
        temporary = path.with_name(f".{path.name}.{os.getpid()}.part")
        temporary.mkdir(parents=True)
        try:
            begun = cls(temporary)
            begun.lock.acquire()
            begun.samples.mkdir()
            write_text(begun.config_yaml, config_yaml)
            write_json(begun.env_json, env)
            write_json(begun.data_index_json, data_index)
            if preflight is not None:
                write_json(begun.preflight_json, preflight)
            begun.write_status("running", step=0)
            os.rename(temporary, path)
        except BaseException:
            shutil.rmtree(temporary)
            raise
        sync(path.parent)
        folder = cls(path)
        folder.lock = begun.lock.moved(path)
        return folder

    def write_status(
        self,
        state: State,
        *,
        step: int,
        reason: str | None = None,
        rank: int | None = None,
        report_failure: str | None = None,
    ) -> None:
        """Replace `status.json`; a failure stays until the run is begun again, whatever other ranks write after it.

        Args:
            state: how the run stands.
            step: optimizer steps done.
            reason: why it stopped or failed.
            rank: the rank that was asked to stop, or that failed first.
            report_failure: why a run that has ended has no whole report.
        """
        before = read_json(self.status_json) or {}
        if before.get("state") != "failed":
            self._put_status(state, step, reason, rank, before.get("resumed_from"), report_failure)

    def begin_again(self, *, step: int, resumed_from: dict[str, Any]) -> None:
        """Replace `status.json` when a run is resumed, whatever it said; `resumed_from` stays in it from now on."""
        self._put_status("running", step, None, None, resumed_from, None)

    def read_status(self) -> dict[str, Any]:
        """The contents of `status.json`.

        Raises:
            ValueError: it is missing or damaged.
        """
        status = read_json(self.status_json) or {}
        is_number = isinstance(status.get("step"), int) and isinstance(status.get("unix_time_s"), int | float)
        if status.get("state") not in get_args(State) or not is_number:
            raise ValueError(f"{self.status_json} is missing or damaged; `nsa resume {self.path}` writes a new one")
        return status

    def overridden(self) -> list[str]:
        """Names of the errors of preflight that the config lets pass."""
        findings = (read_json(self.preflight_json) or {}).get("findings")
        known = [finding for finding in findings if isinstance(finding, dict)] if isinstance(findings, list) else []
        return [str(finding.get("code")) for finding in known if finding.get("allowed")]

    def _put_status(
        self,
        state: State,
        step: int,
        reason: str | None,
        rank: int | None,
        resumed_from: dict[str, Any] | None,
        report_failure: str | None,
    ) -> None:
        values = {"state": state, "step": step, "reason": reason, "rank": rank, "resumed_from": resumed_from}
        if report_failure is not None:
            values["report_failure"] = report_failure
        if (index := read_json(self.data_index_json)) is not None:
            values["data"] = index.get("description")
        values["preflight_overridden"] = self.overridden()
        # One of many: a loss of power may take it, but not make a step wait for the disk.
        often = state == "running"
        write_json(self.status_json, {**values, "unix_time_s": time.time()}, durable=not often)


class FailureStatus:
    """A `with` block around training: whatever escapes it is recorded as the reason in `status.json`, then goes on.

    Args:
        folder: the run's folder.
        rank: of this process.
        step: the last step that was completed, when asked.

    Attributes:
        ended: arguments of the final `RunFolder.write_status`, from when training is over: what fails later is the
            report.
    """

    def __init__(self, folder: RunFolder, rank: int, step: Callable[[], int]) -> None:
        self.folder, self.rank, self.step = folder, rank, step
        self.ended: dict[str, Any] | None = None

    def __enter__(self) -> FailureStatus:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        if kind is None or error is None:
            return
        # A full disk may have stopped a table before the checkpoint in flight, whose note says more.
        reason = printable(redacted("; ".join([f"{kind.__name__}: {error}", *getattr(error, "__notes__", [])])))
        folder = self.folder.path
        if self.ended is None:
            error.add_note(f"rank {self.rank}, after step {self.step()}; once mended: nsa resume {folder}")
            status = {"state": "failed", "step": self.step(), "reason": reason, "rank": self.rank}
        else:
            error.add_note(
                f"training has {self.ended['state']} after step {self.ended['step']} and its checkpoint is whole; only "
                f"the report is missing: nsa resume {folder} writes it"
            )
            status = {**self.ended, "report_failure": reason}
        try:
            self.folder.write_status(**status)
        except OSError as unwritten:
            error.add_note(f"{self.folder.status_json} could not be written: {unwritten}")


def check_unused(path: Path) -> None:
    """Raise `ValueError` when there is already something at a new run's place, or it can hold no folder."""
    if "\0" in str(path):
        raise ValueError(f"run.folder {str(path.parent)!r} holds a zero character; give a path without it")
    if len(os.fsencode(path.name)) > MAX_NAME_BYTES:
        raise ValueError(f"run.name {path.name[:20]}... has {len(path.name)} letters; give at most {MAX_NAME_BYTES}")
    if _is_there(path):
        raise ValueError(
            f"the run folder {path} exists already and is left as it is; "
            f"give another name (--run.name {path.name}-2), or remove the folder first"
        )
    there = next(parent for parent in path.absolute().parents if os.path.lexists(parent))
    if not there.is_dir():
        raise ValueError(f"{there} is not a folder, so that no run can lie in {path.parent}; give another --run.folder")
    if not os.access(there, os.W_OK | os.X_OK):
        raise PermissionError(errno.EACCES, "a run folder cannot be made there", str(there))


def _is_there(path: Path) -> bool:
    """Whether there is anything at a path, a dangling link too; raises `OSError` for a path that cannot be."""
    try:
        path.lstat()
    except (FileNotFoundError, NotADirectoryError):
        return False
    return True


def write_text(path: Path, text: str, *, durable: bool = True) -> None:
    """Write a file so that a reader finds the old or the new contents, never a part.

    Args:
        durable: also after a loss of power, for which this waits for the disk.
    """
    temporary = path.with_name(f".{path.name}.{os.getpid()}.part")  # several ranks may write one file
    temporary.unlink(missing_ok=True)
    try:
        with temporary.open("x", encoding="utf-8") as file:
            file.write(text)
            file.flush()
            if durable:
                os.fsync(file.fileno())
        os.replace(temporary, path)
    except OSError:
        temporary.unlink(missing_ok=True)
        raise
    if durable:
        sync(path.parent)


def sync(path: Path) -> None:
    """Wait until a file's contents, or a folder's entries, are on the disk."""
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


def read_json(path: Path) -> dict[str, Any] | None:
    """The object in a JSON file, or None where that is missing or damaged, as after a loss of power."""
    if not path.is_file():
        return None
    try:
        values = json.loads(path.read_text(encoding="utf-8"))
    except (FileNotFoundError, ValueError, RecursionError):
        return None
    return values if isinstance(values, dict) else None


def write_json(path: Path, values: dict[str, Any], *, durable: bool = True) -> None:
    """Write plain values as indented JSON, whole or not at all; `durable` as for `write_text`."""
    write_text(path, json.dumps(values, indent=2, ensure_ascii=False) + "\n", durable=durable)
