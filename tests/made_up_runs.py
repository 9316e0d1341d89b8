"""Run folders with tables and no training, for the tests of those who read them."""

from __future__ import annotations

import json
import math
from collections.abc import Sequence
from pathlib import Path

from nsa.runs.folder import RunFolder, State, write_json
from nsa.runs.tables import HEALTH_COLUMNS, TRAINING_COLUMNS, VALIDATION_COLUMNS, CsvWriter

GATES = {"gate_entropy_mean_nats": 1.0, "gate_max_mean": 0.5, "gate_collapse_share": 0.0}


def write_run(path: Path, losses: Sequence[float], *, state: State = "finished", lr: float = 1e-3) -> Path:
    """A run folder with one step and one evaluation for each loss after the first evaluation."""
    path.mkdir(parents=True)
    folder = RunFolder(path)
    with (
        CsvWriter(folder.training_csv, TRAINING_COLUMNS) as training,
        CsvWriter(folder.val_csv, VALIDATION_COLUMNS) as validation,
    ):
        for step, loss in enumerate(losses):
            if step:
                rest = dict.fromkeys(("grad_norm", "mfu", "step_s", "fetch_s"), 1.0)
                training.write(step=step, tokens=step * 100, loss=loss, lr=lr, tokens_per_s=100.0, **rest)
            validation.write(step=step, val_loss=loss, val_ppl=math.exp(loss), val_bits_per_byte=loss / math.log(2))
    write_json(folder.env_json, {"device": "cpu", "device_name": "a CPU", "num_threads": 2, "num_parameters": 1000})
    folder.config_yaml.write_text(f"run: {{name: {path.name}}}\noptim: {{lr: {lr}}}\ntrain: {{steps: 9}}\n")
    if state != "running":
        metrics = {"val_loss": losses[-1], "num_parameters": 1000, "tokens": 100 * (len(losses) - 1)}
        folder.metrics_json.write_text(json.dumps(metrics))
    folder.write_status(state, step=len(losses) - 1)
    return path


def write_health(run: Path, rows: Sequence[dict[str, float]]) -> None:
    """A `health.csv` with healthy gates where the rows do not say otherwise."""
    with CsvWriter(run / "health.csv", HEALTH_COLUMNS) as writer:
        for row in rows:
            writer.write(**(dict.fromkeys(HEALTH_COLUMNS, 0.1) | {"max_selected_tokens": 9} | GATES | row))
