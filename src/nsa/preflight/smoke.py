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

from nsa.calibration import Calibration, calibrate
from nsa.preflight.doctor import check_kernels, kernel_line
from nsa.runs.folder import RunFolder, write_json
from nsa.runs.halt import ask_to_halt
from nsa.runs.tables import TRAINING_COLUMNS, Row, column, read_csv

MAX_BASELINE_BYTES = 2**20
STEPS = 120
HALT_AFTER_STEPS = 50
BATCH_TOKENS = 2048
LAST_STEPS = 20  # whose mean is the training loss
SLOW_STEPS = 5  # first ones, after the start and after resuming, that no speed is taken from
TIMEOUT_S = 600.0
NUM_THREADS = 1
ANY_SPEED = ("--thresholds.throughput_drop", "1")  # a machine that others use too is healthy
COMPARED = {"val_loss": False, "train_loss": False, "tokens_per_s": True}  # figure -> whether larger is better
SPEED = "tokens_per_s"  # the figure that is compared on the same machine only, which is one where these agree
SAME_MACHINE = ("device", "num_cpus", "num_threads", "torch")
CALIBRATION_PERCENT = 10.0  # and whose calibration differs by no more


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
        calibration: how fast the machine was when it did nothing else, before and after the run whichever was slower;
            None in baselines of earlier versions.
    """

    val_loss: float
    train_loss: float
    tokens_per_s: float
    machine: dict[str, Any]
    calibration: Calibration | None = None


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
        self._calibration: Calibration | None = None

    def run(self) -> Iterator[StepResult]:
        """Every step in order; ends with the first that fails."""
        self.folder.mkdir(parents=True, exist_ok=True)
        self._calibration = calibrate(torch.device(self.device), NUM_THREADS)
        self.config_path.write_text(yaml.safe_dump(smoke_config(self.folder, self.device)), encoding="utf-8")
        steps: dict[str, Callable[[], str | None]] = {
            "kernels against the reference": self._kernels,
            "preflight": lambda: self._command(0, "preflight", str(self.config_path)),
            f"train, halted after {HALT_AFTER_STEPS} steps": self._train_and_halt,
            "resume to the end": lambda: self._command(0, "resume", str(self.run_path)),
            "every step once, no step lost": self._rows_are_whole,
            "generate": self._generate,
            "health of the run": lambda: self._command(0, "watch", str(self.run_path), "--once", *ANY_SPEED),
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
        seconds = column(rows, "step_s")
        steady = seconds[SLOW_STEPS:HALT_AFTER_STEPS] + seconds[HALT_AFTER_STEPS + SLOW_STEPS :]
        after = calibrate(torch.device(self.device), NUM_THREADS)
        metrics = json.loads(self.run_folder.metrics_json.read_text(encoding="utf-8"))
        env = json.loads(self.run_folder.env_json.read_text(encoding="utf-8"))
        return Figures(
            val_loss=metrics["val_loss"],
            train_loss=mean(column(rows[-LAST_STEPS:], "loss")),
            tokens_per_s=BATCH_TOKENS / median(steady),
            machine=_machine(env),
            calibration=after.slowest(self._calibration or after),
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
        "run": {"name": "smoke", "folder": str(folder), "device": device, "num_threads": NUM_THREADS},
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
            "batch_tokens": BATCH_TOKENS,
            "micro_batch_rows": 8,
            "precision": "bf16" if device == "cuda" else "fp32",
            "checkpoint_every_steps": 40,
            "log_every_steps": 10,
        },
        "eval": {"every_steps": 60, "rows": 8},
        "sample": {"max_new_tokens": 16},
        "observe": {"heartbeat_s": 1.0, "health_every_steps": 40},
    }


def _machine(env: dict[str, Any]) -> dict[str, Any]:
    """What of a run's `env.json` tells machines apart."""
    versions = {"python": env["python"], "torch": env["packages"]["torch"], "nsa": env["nsa"]}
    return {"device": env["device_name"], "num_cpus": env["num_cpus"], "num_threads": env["num_threads"], **versions}


def compare(now: Figures, baseline: Figures | None, tolerance_percent: float) -> list[ComparedRow]:
    """Each figure beside the baseline's; speed is judged only where the machine is the same, and as fast as then."""
    rows = []
    for name, larger_is_better in COMPARED.items():
        value, before = getattr(now, name), None if baseline is None else getattr(baseline, name)
        if baseline is None or before is None:
            rows.append(ComparedRow(name, value, None, None, "not compared"))
            continue
        change = 100 * (value / before - 1)
        if name == SPEED and another_machine(now, baseline):
            rows.append(ComparedRow(name, value, before, change, "not compared"))
            continue
        allowed = tolerance_percent + (_lost_percent(now, baseline) if name == SPEED else 0)
        worse = not (-change if larger_is_better else change) <= allowed  # NaN is worse
        rows.append(ComparedRow(name, value, before, change, "worse" if worse else "ok"))
    return rows


def another_machine(now: Figures, baseline: Figures) -> str | None:
    """Why two speeds cannot be compared, or None: both are of one machine, which was as fast both times."""
    for name in SAME_MACHINE:
        if (here := now.machine.get(name)) != (there := baseline.machine.get(name)):
            return f"{name} is {here} here and {there} there"
    if now.calibration is None or baseline.calibration is None:
        return "the baseline does not say how fast its machine was; --update_baseline writes one that does"
    differ = now.calibration.differs_percent(baseline.calibration)
    if differ <= CALIBRATION_PERCENT:
        return None
    here, there = (
        f"{one.gflops:.3g} GFLOP/s and {one.gib_per_s:.3g} GiB/s" for one in (now.calibration, baseline.calibration)
    )
    return f"this machine does {here} with nothing else to do, the baseline's did {there}: another one, or a busy one"


def _lost_percent(now: Figures, baseline: Figures) -> float:
    """How much slower the machine itself is than it was."""
    if now.calibration is None or baseline.calibration is None:
        return 0.0
    return max(0.0, now.calibration.slower_percent(baseline.calibration))


def read_baseline(path: Path) -> Figures:
    """The figures in a file.

    Raises:
        ValueError: it cannot be read or holds something else.
    """
    try:
        if path.stat().st_size > MAX_BASELINE_BYTES or not path.is_file():
            raise ValueError("it is no file of a few figures")
        values = json.loads(path.read_text(encoding="utf-8"))
        if not isinstance(values, dict):
            raise ValueError(f"it holds a {type(values).__name__}, not figures")
        calibration = values.pop("calibration", None)
        figures = Figures(**values, calibration=None if calibration is None else Calibration(**calibration))
        _check_values(figures)
    except (OSError, ValueError, TypeError, RecursionError) as error:
        raise ValueError(f"the baseline {path} cannot be used: {error}; --update_baseline writes a new one") from error
    return figures


def _check_values(figures: Figures) -> None:
    """A baseline that is wrong is found before a minute's work, and not compared as if it were right."""
    values = {name: getattr(figures, name) for name in COMPARED}
    values |= {} if figures.calibration is None else asdict(figures.calibration)
    for name, value in values.items():
        if isinstance(value, bool) or not isinstance(value, int | float) or not 0 < value < math.inf:
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
