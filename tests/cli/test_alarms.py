"""Each alarm end to end: a run with a fault, `nsa watch` over it, and what is on disk afterwards.

The fault is Python code that runs in the training process before `nsa train` does. Thresholds are shortened by the
watch's own options.
"""

from __future__ import annotations

import json
import math
import os
import signal
import socket
import subprocess
import sys
import textwrap
import time
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest
from torch import Tensor

import nsa
from nsa.cli import main
from nsa.runs.checkpoints import newest_checkpoint
from nsa.runs.heartbeat import heartbeat_path, read_heartbeats
from nsa.runs.tables import TRAINING_COLUMNS, VALIDATION_COLUMNS, read_csv
from nsa.train.trainer import Trainer

LONG = ["--train.steps", "100000", "--train.checkpoint_every_steps", "4", "--observe.heartbeat_s", "0.1"]
SOON = [
    *("--interval_s", "0.1", "--thresholds.stall_s", "1", "--thresholds.warmup_steps", "2"),
    *("--thresholds.stacks_after_s", "0.3", "--thresholds.halt_after_s", "1", "--thresholds.halt_wait_s", "2"),
]
MUTEX = """
import ctypes

def hang_in_c():
    mutex = ctypes.create_string_buffer(64)  # zeros: an open lock; the second call waits for ever, signal or not
    for _ in range(2):
        ctypes.CDLL(None).pthread_mutex_lock(mutex)
"""

Start = Callable[..., subprocess.Popen[str]]


@pytest.fixture
def start(tiny_config: Path) -> Iterator[Start]:
    """`start(fault, *options, **environment)`: a training process with a fault; killed when the test ends."""
    processes: list[subprocess.Popen[str]] = []

    def begin(fault: str, *options: str, **environment: str) -> subprocess.Popen[str]:
        code = f"{textwrap.dedent(fault)}\nimport sys\nfrom nsa.cli import main\nsys.exit(main())"
        command = [sys.executable, "-c", code, "train", str(tiny_config), *LONG, *options]
        environment |= {"PYTHONPATH": str(Path(nsa.__file__).parents[1]), "OMP_NUM_THREADS": "1"}
        process = subprocess.Popen(command, env=environment, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True)
        processes.append(process)
        return process

    yield begin
    for process in processes:
        process.kill()
        process.communicate()


@pytest.fixture
def run(tiny_config: Path) -> Path:
    return tiny_config.parent / "runs" / "tiny"


def wait_for(condition: Callable[[], object], process: subprocess.Popen[str]) -> None:
    """Until the condition holds, while the process lives."""
    deadline = time.monotonic() + 120
    while not condition():
        assert process.poll() is None, process.communicate()
        assert time.monotonic() < deadline, "it takes too long"
        time.sleep(0.05)


def step_of(run: Path, rank: int = 0) -> int:
    path = heartbeat_path(run, rank)
    beats = read_heartbeats(path) if path.is_file() else []
    return beats[-1].step if beats else -1


def check_artifacts(run: Path, num_steps: int) -> None:
    """The tables have every step that was done, and the newest checkpoint is whole."""
    steps = [row["step"] for row in read_csv(run / "training.csv", TRAINING_COLUMNS)]
    assert steps == list(range(1, num_steps + 1))
    assert read_csv(run / "val.csv", VALIDATION_COLUMNS)[0]["step"] == 0
    assert newest_checkpoint(run).name == f"step_{num_steps // 4 * 4:06d}"


def flat(text: str) -> str:
    return " ".join(text.split())


def test_a_hung_loader_is_told_dumped_and_given_up(run: Path, start: Start, capsys: pytest.CaptureFixture) -> None:
    fault = """
        from nsa.data.stream import loader
        import threading

        def read_from_a_dead_disk(self, count=[0], take=loader.TrainLoader.__next__):
            count[0] += 1
            if count[0] > 12:  # two batches a step
                threading.Event().wait()
            return take(self)

        loader.TrainLoader.__next__ = read_from_a_dead_disk
    """
    process = start(fault)
    wait_for(lambda: step_of(run) == 6, process)
    assert main(["watch", str(run), *SOON]) == 1
    out = flat(capsys.readouterr().out)
    assert "alarm: stall: rank 0, step 6: no progress for 1 s (at most 1): the loader gives no batch. Look at" in out
    assert f"stacks: rank 0 (process {process.pid}) writes its stacks to {run}/stacks_rank0.txt" in out
    assert f"kill its processes ({process.pid} on {socket.gethostname()}) and `nsa resume` it" in out
    assert "in read_from_a_dead_disk" in (run / "stacks_rank0.txt").read_text()
    assert "stall: rank 0, step 6" in (run / "HALT").read_text()
    assert process.poll() is None
    process.kill()
    process.wait()
    assert main(["watch", str(run), "--once", "--thresholds.silent_s", "0"]) == 1
    assert "is gone: killed, out of memory, or its machine restarted. `nsa resume`" in flat(capsys.readouterr().out)
    check_artifacts(run, num_steps=6)


def test_a_rank_that_hangs_in_c_is_told_from_those_that_wait_for_it(
    run: Path, start: Start, capsys: pytest.CaptureFixture
) -> None:
    fault = MUTEX + textwrap.dedent("""
        import os
        from nsa.train import trainer

        def backward(self, micro_batches, num_valid, usual=trainer.Trainer._backward):
            if self.step == 5 and self.parallel.rank == 1:
                hang_in_c()
            return usual(self, micro_batches, num_valid)

        trainer.Trainer._backward = backward
    """)
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        address = {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(free.getsockname()[1]), "WORLD_SIZE": "2"}
    ranks = [start(fault, RANK=str(rank), LOCAL_RANK=str(rank), **address) for rank in (0, 1)]
    wait_for(lambda: step_of(run, 0) == step_of(run, 1) == 5, ranks[1])
    assert main(["watch", str(run), *SOON]) == 1
    out = flat(capsys.readouterr().out)
    for rank, process in enumerate(ranks):
        assert f"stall: rank {rank}, step 5: no progress for" in out
        assert f"kill process {process.pid} on {socket.gethostname()} and `nsa resume`" in out
    assert "in hang_in_c" in (run / "stacks_rank1.txt").read_text()
    waiting = (run / "stacks_rank0.txt").read_text()
    assert "in hang_in_c" not in waiting
    assert "in train_step" in waiting
    check_artifacts(run, num_steps=5)


def test_a_nan_ends_the_run_with_its_step_and_remedy(
    run: Path, tiny_config: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture
) -> None:
    usual = Trainer._backward

    def backward(self: Trainer, micro_batches: list, num_valid: float) -> Tensor:
        return usual(self, micro_batches, num_valid) * (math.nan if self.step == 5 else 1)

    monkeypatch.setattr(Trainer, "_backward", backward)
    assert main(["train", str(tiny_config), *LONG]) == 1
    error = capsys.readouterr().err
    assert "nsa train: failed: step 6 has loss nan" in error
    assert "the weights are still those of step 5. Lower optim.lr" in error
    assert main(["watch", str(run)]) == 1
    assert "failed by rank 0: TrainingError: step 6 has loss nan" in flat(capsys.readouterr().out)
    check_artifacts(run, num_steps=5)


def test_nans_that_are_skipped_are_seen_by_the_watch_which_halts_the_run(
    run: Path, start: Start, capsys: pytest.CaptureFixture
) -> None:
    fault = """
        from nsa.train import trainer

        def backward(self, micro_batches, num_valid, usual=trainer.Trainer._backward):
            return usual(self, micro_batches, num_valid) * (float("nan") if self.step >= 5 else 1)

        trainer.Trainer._backward = backward
    """
    process = start(fault, "--guards.on_nonfinite", "skip", "--guards.max_skipped_steps", "100000")
    wait_for(lambda: step_of(run) > 6, process)
    assert main(["watch", str(run), *SOON, "--thresholds.halt_wait_s", "60"]) == 3
    out = flat(capsys.readouterr().out)
    assert "alarm: nonfinite: rank 0, step" in out
    assert "loss nan. Lower optim.lr or look at the data, and resume from a checkpoint before this step" in out
    assert "counters: rank 0, step" in out
    assert process.wait(timeout=120) == 3
    status = json.loads((run / "status.json").read_text())
    assert (status["state"], newest_checkpoint(run).name) == ("stopped", f"step_{status['step']:06d}")
    assert len(read_csv(run / "training.csv", TRAINING_COLUMNS)) == status["step"]


def test_collapsed_gates_are_seen_by_the_watch_which_halts_the_run(
    run: Path, start: Start, capsys: pytest.CaptureFixture
) -> None:
    fault = """
        from nsa.train import trainer
        import torch

        def build_collapsed(*arguments, usual=trainer.build_model, **options):
            model = usual(*arguments, **options)
            with torch.no_grad():
                model.model.layers[0].self_attn.gate.down.bias.view(-1, 3)[:, 2] = 50
            return model

        trainer.build_model = build_collapsed
    """
    process = start(fault, "--observe.health_every_steps", "2")
    wait_for(lambda: step_of(run) > 2, process)
    assert main(["watch", str(run), *SOON, "--thresholds.halt_wait_s", "60"]) == 3
    out = flat(capsys.readouterr().out)
    assert "alarm: gates: rank 0, step" in out
    assert "100.0% of them collapsed, at most 5.0% (shares 0.00 compressed, 0.00 selected, 1.00 window)" in out
    assert "Raise model.gate_temperature or lower optim.lr; health.csv has every layer" in out
    assert process.wait(timeout=120) == 3
    status = json.loads((run / "status.json").read_text())
    assert newest_checkpoint(run).name == f"step_{status['step']:06d}"
    assert "collapsed" in (run / "report.md").read_text()


def test_a_drop_in_throughput_is_seen_by_the_watch_and_halts_nothing(
    run: Path, start: Start, capsys: pytest.CaptureFixture
) -> None:
    fault = """
        from nsa.train import trainer
        import time

        def slow_down(self, micro_batches, num_valid, usual=trainer.Trainer._backward):
            time.sleep(0.05 if self.step < 60 else 0.5)
            return usual(self, micro_batches, num_valid)

        trainer.Trainer._backward = slow_down
    """
    process = start(fault, "--eval.every_steps", "50000", "--train.checkpoint_every_steps", "1000")
    wait_for(lambda: step_of(run) > 60, process)
    window = ["--thresholds.throughput_window_s", "4", "--thresholds.throughput_min_beats", "4"]
    drop = ["--thresholds.throughput_drop", "0.5"]

    def alarm() -> bool:
        return main(["watch", str(run), "--once", "--json", *window, *drop]) == 1

    wait_for(alarm, process)
    found = json.loads(capsys.readouterr().out.splitlines()[-1])["findings"]
    (finding,) = [one for one in found if one["name"] == "throughput"]
    assert (finding["rank"], finding["level"]) == (0, "stacks")
    assert finding["step"] > 60
    assert "tokens/s over the last 4 s" in finding["message"]
    assert "below the run's median of" in finding["message"]
    assert "look at the data's disk or network" in finding["remedy"]
    assert not (run / "HALT").exists()
    os.kill(process.pid, signal.SIGTERM)
    assert process.wait(timeout=120) == 3
