"""What a run has come to, in words, also of one that is still in progress or was killed.

facts = run_facts(open_run_folder(Path("runs/showcase")))
print(facts.values["held-out loss"], facts.val_loss)
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from statistics import fmean
from typing import Any

import numpy as np

from nsa.config.yaml_file import read_yaml
from nsa.runs.curves import Curves, device_of, read_curves
from nsa.runs.folder import RunFolder, read_json
from nsa.runs.heartbeat import heartbeat_files, read_heartbeats
from nsa.runs.tables import FINAL_LOSSES
from nsa.runs.thresholds import Thresholds
from nsa.runs.watch import Watch
from nsa.units import duration

OF_THE_PLACE = ("run.name", "run.folder")  # keys in which all runs differ


@dataclass(frozen=True)
class RunFacts:
    """A run in a comparison.

    Attributes:
        name: of its folder.
        values: what there is to say, by the row of the table; "-" for what is not known.
        val_loss: the newest held-out loss in nats per token, NaN before the first.
        settings: its config as dotted keys and values.
        curves: its tables.
    """

    name: str
    values: dict[str, str]
    val_loss: float
    settings: dict[str, str]
    curves: Curves


def run_facts(folder: RunFolder) -> RunFacts:
    """Look into a run folder, whatever state the run is in.

    Raises:
        ValueError: the run has no tables, or one of its files is damaged.
    """
    if not folder.training_csv.is_file():
        raise ValueError(f"{folder.path} has no training.csv: its training has not begun; wait for the first step")
    curves = read_curves(folder)
    if folder.config_yaml.exists() and not folder.config_yaml.is_file():
        raise ValueError(f"{folder.config_yaml} is no file; move it away")
    settings = flat(read_yaml(folder.config_yaml)) if folder.config_yaml.exists() else {}
    metrics, env = read_json(folder.metrics_json) or {}, read_json(folder.env_json) or {}
    parameters = metrics.get("num_parameters", env.get("num_parameters"))
    training = curves.training
    seconds = float(np.nansum(training["step_s"]))
    val_loss = float(curves.val_loss[-1]) if len(curves.val_loss) else math.nan
    evaluated = f", after step {curves.val_steps[-1]:.0f}" if len(curves.val_steps) else ""
    tail = training["loss"][-FINAL_LOSSES:]
    values = {
        "state": _state(folder),
        "parameters": f"{parameters:,}" if isinstance(parameters, int) else "-",
        "steps": f"{training['step'][-1]:,.0f} of {settings.get('train.steps', '?')}" if len(training["step"]) else "0",
        "training tokens": f"{curves.last_token:,.0f}",
        "learning rate": settings.get("optim.lr", "-"),
        "training loss": _number(fmean(tail) if len(tail) else math.nan, ".4f"),
        "held-out loss": _number(val_loss, ".4f") + evaluated,
        "bits per byte": _number(curves.last_bits_per_byte, ".4f"),
        "tokens per second": _number(_middle(training["tokens_per_s"]), ",.0f"),
        "time in training steps": duration(seconds) if seconds else "-",
        "memory": _memory(folder),
        "device": device_of(folder) or "-",
    }
    return RunFacts(curves.name, values, val_loss, settings, curves)


def differences(runs: list[RunFacts]) -> dict[str, list[str]]:
    """Keys of the configs that are not the same for all, and each run's value; "-" where it has none."""
    keys = dict.fromkeys(key for run in runs for key in run.settings if key not in OF_THE_PLACE)
    values = {key: [run.settings.get(key, "-") for run in runs] for key in keys}
    return {key: found for key, found in values.items() if len(set(found)) > 1}


def flat(values: Any, prefix: str = "") -> dict[str, str]:
    """The leaves of nested mappings by dotted key, as text."""
    if not isinstance(values, dict):
        return {prefix: _text(values)} if prefix else {}
    found: dict[str, str] = {}
    for key, value in values.items():
        found |= flat(value, f"{prefix}.{key}" if prefix else str(key))
    return found


def _state(folder: RunFolder) -> str:
    """How the run stands; one whose processes are gone while its status is still "running" was killed."""
    status = folder.read_status()
    reason = f": {status['reason']}" if status.get("reason") else ""
    if status["state"] != "running":
        return f"{status['state']} after step {status['step']}{reason}"
    look = Watch(folder.path, Thresholds()).look()
    if look.processes and set(look.processes.values()) == {"gone"}:
        return "killed; `nsa resume` continues it"
    newest = max((beat.unix_time_s for beat in look.beats.values()), default=None)
    beaten = "no beat yet" if newest is None else f"last beat {duration(max(0.0, look.unix_time_s - newest))} ago"
    return f"running, {beaten}"


def _memory(folder: RunFolder) -> str:
    """The most that any rank of the run has held, by its heartbeats."""
    on_device = on_host = 0.0
    for path in heartbeat_files(folder.path).values():
        for beat in read_heartbeats(path):
            on_device = max(on_device, beat.gpu_reserved_gib or 0.0)
            on_host = max(on_host, beat.host_rss_gib or 0.0)
    if on_device:
        return f"{on_device:.2f} GiB a GPU"
    return f"{on_host:.2f} GiB on the host" if on_host else "-"


def _middle(values: Any) -> float:
    finite = values[np.isfinite(values)]
    return float(np.median(finite)) if len(finite) else math.nan


def _number(value: float, form: str) -> str:
    return "-" if math.isnan(value) else f"{value:{form}}"


def _text(value: Any) -> str:
    if isinstance(value, list):
        return ", ".join(map(_text, value)) or "none"
    if value is None:
        return "none"
    return str(value).lower() if isinstance(value, bool) else str(value)
