"""docs/operations.md says what the code does: fields, thresholds, alarms, and its Python block runs."""

from __future__ import annotations

import re
from dataclasses import fields
from pathlib import Path
from typing import get_args

import pytest

from made_up_beats import beat, write_beats
from nsa.runs.health import Name
from nsa.runs.heartbeat import Beat, Phase
from nsa.runs.thresholds import Thresholds

TEXT = (Path(__file__).parents[2] / "docs" / "operations.md").read_text(encoding="utf-8")


def section(title: str) -> str:
    return TEXT.split(f"## {title}\n")[1].split("\n## ")[0]


def first_cells(title: str) -> list[str]:
    rows = re.findall(r"^\| (.+?) \|", section(title), re.MULTILINE)
    return [name for row in rows[1:] for name in re.findall(r"`([^`]+)`", row)]


def test_every_field_phase_threshold_and_alarm_is_in_its_table() -> None:
    assert sorted(first_cells("The heartbeat")) == sorted(field.name for field in fields(Beat))
    for phase in get_args(Phase):
        assert phase in section("The heartbeat"), phase
    assert set(first_cells("The watch")) == set(get_args(Name))
    rows = re.findall(r"^\| `(\w+)` \| ([\d.]+) \|", section("Thresholds"), re.MULTILINE)
    assert {name: float(value) for name, value in rows} == vars(Thresholds())


def test_the_python_block_runs(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture) -> None:
    run = tmp_path / "runs" / "tiny"
    run.mkdir(parents=True)
    write_beats(run, [beat()])
    monkeypatch.chdir(tmp_path)
    (block,) = re.findall(r"```python\n(.*?)```", TEXT, re.DOTALL)
    exec(compile(block, "operations.md", "exec"), {})
    assert capsys.readouterr().out == "step 50 1.09\n"
