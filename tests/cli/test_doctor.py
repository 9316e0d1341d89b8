"""`nsa doctor` as a user runs it."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from nsa.cli import main
from nsa.preflight import doctor

QUICK = ["--hub_timeout_s", "0.2"]


@pytest.fixture(autouse=True)
def no_hub(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("huggingface_hub.constants.ENDPOINT", "http://127.0.0.1:9")


def test_a_good_machine_ends_with_code_0(capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["doctor", *QUICK]) == 0
    assert capsys.readouterr().out.rstrip().endswith("usable")


def test_json_is_json(capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["doctor", "--json", *QUICK]) == 0
    assert json.loads(capsys.readouterr().out)["usable"] is True


def test_an_unusable_machine_ends_with_code_2_and_the_reason(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr(doctor, "MIN_DISK_GIB", 1e9)
    assert main(["doctor", *QUICK]) == 2
    assert "problem: " in capsys.readouterr().out


def test_a_folder_that_is_not_there_is_a_mistake(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["doctor", "--folder", str(tmp_path / "absent")]) == 2
    assert "there is no folder" in capsys.readouterr().err
