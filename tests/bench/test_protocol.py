"""The protocol: turns, medians, and what is written is what was measured."""

import csv
import json
from dataclasses import dataclass

import pytest
import torch
from rich.console import Console

from nsa.bench import protocol

CPU = torch.device("cpu")


@dataclass(frozen=True)
class Row:
    length: int
    time_ms: float


def test_candidates_take_turns_and_their_steps_run_in_order():
    order = []
    steps = {"a": {"forward": lambda: order.append("af"), "backward": lambda: order.append("ab")}}
    steps["b"] = {"forward": lambda: order.append("bf")}
    values = protocol.median_ms(steps, CPU, warmup=1, repeats=2)
    assert order == ["af", "ab", "bf"] * 3
    assert set(values) == {"a_forward", "a_backward", "a_total", "b_forward", "b_total"}


def test_the_warm_up_does_not_count_and_the_median_is_reported(monkeypatch):
    seconds = iter([100.0, 3.0, 1.0, 2.0])
    monkeypatch.setattr(protocol, "timed_s", lambda run, device, ahead: next(seconds))
    assert protocol.median_ms({"a": {"run": lambda: None}}, CPU, warmup=1, repeats=3)["a_run"] == 2000.0


@pytest.mark.parametrize(("warmup", "repeats"), [(-1, 1), (0, 0)])
def test_impossible_counts_are_refused(warmup, repeats):
    with pytest.raises(ValueError, match=f"not {repeats} and {warmup}"):
        protocol.median_ms({}, CPU, warmup, repeats)


def test_results_are_written_with_their_circumstances(tmp_path):
    path = tmp_path / "new" / "x_cpu.csv"
    protocol.write_results([Row(8, 1.23456), Row(16, float("nan"))], path, Row(1, 2.0), "nsa bench x", CPU)
    assert list(csv.reader(path.open())) == [["length", "time_ms"], ["8", "1.235"], ["16", "nan"]]
    facts = json.loads(path.with_suffix(".json").read_text())
    assert facts["command"] == "nsa bench x"
    assert facts["settings"] == {"length": 1, "time_ms": 2.0}
    assert facts["environment"]["packages"]["torch"] == torch.__version__
    assert facts["environment"]["num_threads"] == torch.get_num_threads()


def test_the_table_shows_every_figure():
    console = Console(record=True, width=80)
    protocol.print_table([Row(8, 1.5), Row(16, 2.5)], "Title", console)
    text = console.export_text()
    assert all(figure in text for figure in ("Title", "length", "time_ms", "8", "16", "1.5", "2.5"))
