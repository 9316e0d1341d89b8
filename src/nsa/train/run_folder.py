"""The folder of one run: what lies where, and writes that are either whole or absent.

runs/NAME/  config.yaml env.json status.json training.csv val.csv metrics.json curves.png report.md
            tb/ samples/before.txt samples/after.txt
            checkpoints/step_000500/ ... checkpoints/latest -> step_000500
"""

from __future__ import annotations

import json
import os
import time
from pathlib import Path
from types import TracebackType
from typing import Any, Literal

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
        self.training_csv = path / "training.csv"
        self.val_csv = path / "val.csv"
        self.metrics_json = path / "metrics.json"
        self.status_json = path / "status.json"
        self.curves_png = path / "curves.png"
        self.report_md = path / "report.md"
        self.samples = path / "samples"
        self.tensorboard = path / "tb"
        self.checkpoints = path / "checkpoints"

    @classmethod
    def create(cls, path: Path, *, config_yaml: str, env: dict[str, Any], data_index: dict[str, Any]) -> RunFolder:
        """Make the folder with `config.yaml`, `env.json`, `data_index.json` and `status.json`.

        Raises:
            ValueError: it exists already; nothing in it is touched.
        """
        check_unused(path)
        path.mkdir(parents=True)
        folder = cls(path)
        folder.samples.mkdir()
        write_text(folder.config_yaml, config_yaml)
        write_json(folder.env_json, env)
        write_json(folder.data_index_json, data_index)
        folder.write_status("running", step=0)
        return folder

    def write_status(self, state: State, *, step: int, reason: str | None = None) -> None:
        """Replace `status.json`; `reason` says why a run stopped or failed."""
        write_json(self.status_json, {"state": state, "step": step, "reason": reason, "unix_time_s": time.time()})

    def read_status(self) -> dict[str, Any]:
        """The contents of `status.json`."""
        return json.loads(self.status_json.read_text(encoding="utf-8"))


class FailureStatus:
    """A `with` block around training: whatever escapes it is recorded as the reason in `status.json`, then goes on.

    Attributes:
        step: the last step that was completed; the loop keeps it current.
    """

    def __init__(self, folder: RunFolder) -> None:
        self.folder = folder
        self.step = 0

    def __enter__(self) -> FailureStatus:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        if kind is not None:
            self.folder.write_status("failed", step=self.step, reason=f"{kind.__name__}: {error}")


def check_unused(path: Path) -> None:
    """Raise `ValueError` when there is already something at a new run's place."""
    if path.exists():
        raise ValueError(
            f"the run folder {path} exists already and is left as it is; "
            f"give another name (--run.name {path.name}-2), or remove the folder first"
        )


def write_text(path: Path, text: str) -> None:
    """Write a file so that a reader finds the old or the new contents, never a part."""
    temporary = path.with_name(f".{path.name}.part")
    temporary.write_text(text, encoding="utf-8")
    os.replace(temporary, path)


def write_json(path: Path, values: dict[str, Any]) -> None:
    """Write plain values as indented JSON, whole or not at all."""
    write_text(path, json.dumps(values, indent=2, ensure_ascii=False) + "\n")
