"""Several processes for a test, as torchrun would start them: 2 gloo ranks on the CPU, one thread each.

    run_ranks('''
        with setup_parallel("cpu") as parallel:
            report(parallel.any(parallel.rank == 1))
    ''')   # -> [True, True]

The body sees what its own imports and `given` name, and `report(value)` hands a picklable value back to the test.
"""

from __future__ import annotations

import os
import pickle
import socket
import subprocess
import sys
import tempfile
import textwrap
from pathlib import Path
from typing import Any

TESTS = Path(__file__).parent
HEAD = """
import pickle, sys
import torch
torch.set_num_threads(1)
from nsa.train.parallel import setup_parallel
given = pickle.load(open(sys.argv[1], "rb"))
def report(value):
    with open(sys.argv[2], "wb") as file:
        pickle.dump(value, file)
"""


class RankFailure(AssertionError):
    """A rank ended with a nonzero code; the message has the codes and what the ranks printed."""

    def __init__(self, codes: list[int], errors: list[str]) -> None:
        self.codes, self.errors = codes, errors
        super().__init__(f"exit codes {codes}\n" + "\n".join(f"rank {i}: {text}" for i, text in enumerate(errors)))


def run_ranks(body: str, given: Any = None, *, world_size: int = 2, timeout_s: float = 150.0) -> list[Any]:
    """Run `body` in `world_size` fresh processes and return what each reported.

    Raises:
        RankFailure: a process ended with another code than 0.
        subprocess.TimeoutExpired: one did not end; all are killed.
    """
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port = probe.getsockname()[1]
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        (folder / "given.pickle").write_bytes(pickle.dumps(given))
        (folder / "body.py").write_text(HEAD + textwrap.dedent(body), encoding="utf-8")
        processes = [_start(folder, rank, world_size, port) for rank in range(world_size)]
        try:
            errors = [process.communicate(timeout=timeout_s)[1] for process in processes]
        finally:
            for process in processes:
                process.kill()
        codes = [process.returncode for process in processes]
        if any(codes):
            raise RankFailure(codes, errors)
        reports = [folder / f"report{rank}.pickle" for rank in range(world_size)]
        return [pickle.loads(path.read_bytes()) if path.exists() else None for path in reports]


def environment_of_rank(**changes: str) -> dict[str, str]:
    """Environment of a process that finds this checkout and the tests' helpers, with one thread."""
    path = os.pathsep.join([str(TESTS.parent / "src"), str(TESTS)])
    return {**os.environ, "PYTHONPATH": path, "OMP_NUM_THREADS": "1", **changes}


def _start(folder: Path, rank: int, world_size: int, port: int) -> subprocess.Popen[str]:
    ranks = {"RANK": str(rank), "LOCAL_RANK": str(rank), "WORLD_SIZE": str(world_size)}
    environment = environment_of_rank(MASTER_ADDR="127.0.0.1", MASTER_PORT=str(port), **ranks)
    command = [sys.executable, str(folder / "body.py"), str(folder / "given.pickle"), f"{folder}/report{rank}.pickle"]
    return subprocess.Popen(command, env=environment, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True)
