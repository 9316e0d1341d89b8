"""Beats of a made-up run, for the tests of those who read them."""

from __future__ import annotations

import os
import socket
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from dataclasses import replace
from pathlib import Path
from typing import Any

import psutil

from nsa.inspect.statistics import GateStatistics
from nsa.runs.heartbeat import SCHEMA, Beat, heartbeat_path

NOW_S = 1_800_000_000.0
EVEN_GATE = GateStatistics(100, 1.09, 0.34, 0.34, 0.33, 0.33, 0.0)
COLLAPSED_GATE = GateStatistics(100, 0.02, 0.99, 0.0, 0.01, 0.99, 0.97)


def beat(**changes: Any) -> Beat:
    """A healthy beat of this process, at step 50 of 100."""
    values: dict[str, Any] = {
        "unix_time_s": NOW_S,
        "rank": 0,
        "world_size": 1,
        "host": socket.gethostname(),
        "pid": os.getpid(),
        "process_start_s": psutil.Process().create_time(),
        "phase": "step",
        "progress_age_s": 0.5,
        "start_step": 0,
        "step": 50,
        "num_steps": 100,
        "loss": 2.0,
        "grad_norm": 1.0,
        "lr": 1e-3,
        "tokens_per_s": 10_000.0,
        "step_s": 0.4,
        "fetch_p50_ms": 0.1,
        "fetch_p95_ms": 0.4,
        "host_rss_gib": 1.0,
        "gate": EVEN_GATE,
        "worst_gate_layer": 1,
        "worst_gate": EVEN_GATE,
    }
    return Beat(**{**values, **changes})


def beats(count: int, *, every_s: float = 5.0, last_s: float = NOW_S, **series: Any) -> list[Beat]:
    """`count` beats with a step each, `every_s` apart; a list among `series` has a value for each, others hold for all.

    The first one stands after step 10, beyond the warm-up.
    """
    found = []
    for index in range(count):
        changes = {name: value[index] if isinstance(value, list) else value for name, value in series.items()}
        time_s = last_s - (count - 1 - index) * every_s
        found.append(beat(**{"unix_time_s": time_s, "step": 10 + index, "num_steps": 1000, **changes}))
    return found


def write_beats(run: Path, found: list[Beat]) -> None:
    """Append beats to the run folder's heartbeat file of their rank."""
    with heartbeat_path(run, found[0].rank).open("ab") as file:
        file.writelines(SCHEMA.dump_json(one) + b"\n" for one in found)


@contextmanager
def holding(run: Path, *ranks: int) -> Iterator[None]:
    """This process holds the heartbeat files open, as one that trains does."""
    with ExitStack() as stack:
        for rank in ranks:
            stack.enter_context(heartbeat_path(run, rank).open("ab"))
        yield


def of_rank(rank: int, found: list[Beat], world_size: int = 2) -> list[Beat]:
    """The same beats from another rank."""
    return [replace(one, rank=rank, world_size=world_size) for one in found]
