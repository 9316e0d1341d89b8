"""Runs side by side: what is told of each, in whatever state it is, and what differs."""

from __future__ import annotations

import csv
import time
from pathlib import Path

import pytest

from made_up_beats import beat, holding, write_beats
from made_up_runs import write_run
from nsa.runs.compare import COMPARISON_COLUMNS, compare_runs
from nsa.runs.curves import read_curves
from nsa.runs.facts import flat
from nsa.runs.folder import RunFolder

PNG = b"\x89PNG\r\n\x1a\n"


def rows(table: str) -> dict[str, list[str]]:
    """The table's rows by their first cell."""
    cells = [[part.strip() for part in line.strip("|").split("|")] for line in table.splitlines()]
    return {row[0]: row[1:] for row in cells}


def test_runs_are_compared_against_the_first(tmp_path: Path) -> None:
    runs = [write_run(tmp_path / "nsa", [5.0, 2.0]), write_run(tmp_path / "dense", [5.0, 2.03], lr=2e-3)]
    found = rows(compare_runs(runs, tmp_path / "out" / "both.v2"))
    assert found[""] == ["nsa", "dense"]
    assert found["state"] == ["finished after step 1"] * 2
    assert found["held-out loss"] == ["2.0000, after step 1", "2.0300, after step 1"]
    assert found["held-out loss against the first"] == ["the first", "+1.50%"]
    assert found["bits per byte"] == ["2.8854", "2.9287"]
    assert found["learning rate"] == ["0.001", "0.002"]
    assert (found["parameters"], found["steps"]) == (["1,000"] * 2, ["1 of 9"] * 2)
    assert (found["tokens per second"], found["time in training steps"]) == (["100"] * 2, ["0:01"] * 2)
    assert found["device"] == ["a CPU, 2 threads"] * 2
    assert found["`optim.lr`"] == ["0.001", "0.002"]
    assert not {"`run.name`", "`train.steps`"} & found.keys()
    table = list(csv.DictReader((tmp_path / "out" / "both.v2.csv").open()))
    assert tuple(table[0]) == COMPARISON_COLUMNS
    assert [(row["run"], row["step"], row["tokens"], row["train_loss"], row["val_loss"]) for row in table] == [
        ("nsa", "0", "0", "", "5.00000"),
        ("nsa", "1", "100", "2.00000", "2.00000"),
        ("dense", "0", "0", "", "5.00000"),
        ("dense", "1", "100", "2.03000", "2.03000"),
    ]
    assert (tmp_path / "out" / "both.v2.png").read_bytes().startswith(PNG)


def test_one_run_in_progress_is_shown_by_itself(tmp_path: Path) -> None:
    run = write_run(tmp_path / "nsa", [5.0, 2.0, 1.9], state="running")
    write_beats(run, [beat(unix_time_s=time.time() - 3, gpu_reserved_gib=1.5), beat(unix_time_s=time.time())])
    with holding(run, 0):
        found = rows(compare_runs([run], tmp_path / "one"))
    assert found["state"][0].startswith("running, last beat 0:0")
    assert found["memory"] == ["1.50 GiB a GPU"]
    assert "held-out loss against the first" not in found
    assert (tmp_path / "one.png").read_bytes().startswith(PNG)


def test_a_killed_run_and_one_before_its_first_evaluation_are_told(tmp_path: Path) -> None:
    killed = write_run(tmp_path / "killed", [5.0, 2.0], state="running")
    write_beats(killed, [beat(pid=2**30)])
    begun = write_run(tmp_path / "begun", [], state="running")
    found = rows(compare_runs([killed, begun], tmp_path / "both"))
    assert found["state"] == ["killed; `nsa resume` continues it".replace("`", "\\`"), "running, no beat yet"]
    assert found["held-out loss"] == ["2.0000, after step 1", "-"]
    assert found["held-out loss against the first"] == ["the first", "-"]
    assert found["training loss"] == ["2.0000", "-"]


def test_many_near_equal_runs_are_drawn(tmp_path: Path) -> None:
    runs = [write_run(tmp_path / f"run{k}", [5.0, 2.0 + k / 1000, 1.9 + k / 1000]) for k in range(12)]
    assert len(rows(compare_runs(runs, tmp_path / "all"))[""]) == 12


def test_what_cannot_be_compared_is_refused_before_anything_is_written(tmp_path: Path) -> None:
    run = write_run(tmp_path / "nsa", [5.0, 2.0])
    bare = write_run(tmp_path / "bare", [5.0, 2.0])
    (bare / "training.csv").unlink()
    (tmp_path / "folder.png").mkdir()
    for runs, out, words in (
        ([], "both", "from 1 to 20 run folders, not 0"),
        ([run, run], "both", "given twice"),
        ([run, tmp_path / "absent"], "both", "there is no"),
        ([run, tmp_path], "both", "is no run folder"),
        ([run, bare], "both", r"has no training\.csv: its training has not begun"),
        ([run], "folder", r"folder\.png is no file; give --out another name"),
    ):
        with pytest.raises(ValueError, match=words):
            compare_runs(runs, tmp_path / out)
    assert not list(tmp_path.glob("both*"))


def test_nested_settings_become_dotted_keys() -> None:
    values = {"model": {"layer_types": ["nsa", "nsa"], "scaling": {"factor": 2}}, "optim": None, "run": {"seed": True}}
    assert flat(values) == {
        "model.layer_types": "nsa, nsa",
        "model.scaling.factor": "2",
        "optim": "none",
        "run.seed": "true",
    }


def test_a_table_of_a_million_steps_is_read_without_a_row_for_each(tmp_path: Path) -> None:
    run = write_run(tmp_path / "long", [5.0, 2.0])
    with (run / "training.csv").open("a") as file:
        file.writelines(f"{step},{step * 100},2.0,0.1,1.0,100.0,,0.5,0.0\n" for step in range(2, 20_001))
    curves = read_curves(RunFolder(run))
    assert sum(points.nbytes for points in curves.training.values()) == 20_000 * 9 * 8
