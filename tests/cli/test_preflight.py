"""`nsa preflight` as a user runs it."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from nsa.cli import main


def test_a_sound_config_is_ready(tiny_config: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["preflight", str(tiny_config), "--train.steps", "4"]) == 0
    out = capsys.readouterr().out
    assert "2,048 in 4 steps of 512" in out
    assert "ready: 0 errors" in out
    assert not (tiny_config.parent / "runs").exists()


def test_a_refused_config_ends_with_code_2_and_its_findings(
    tiny_config: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    bad = ["--train.steps", "9000", "--train.checkpoint_every_steps", "0", "--eval.every_steps", "10000"]
    assert main(["preflight", str(tiny_config), *bad]) == 2
    out = capsys.readouterr().out
    assert "error   no-checkpoints: 9,000 steps" in out
    assert "error   no-evaluation: " in out
    assert "REFUSED: 2 errors" in out
    allowed = ["--preflight.allow", "no-checkpoints", "no-evaluation"]
    assert main(["preflight", str(tiny_config), *bad, *allowed]) == 0
    assert "allowed no-checkpoints" in capsys.readouterr().out


def test_json_holds_the_findings(tiny_config: Path, capsys: pytest.CaptureFixture[str]) -> None:
    arguments = ["--for", "h200", "--world_size", "3", "--json"]
    assert main(["preflight", str(tiny_config), *arguments]) == 2
    values = json.loads(capsys.readouterr().out)
    assert values["machine"]["name"] == "NVIDIA H200"
    assert values["world_size"] == 3
    assert {f["code"] for f in values["findings"] if f["level"] == "error"} == {
        "fp32-on-bf16-gpu",
        "batch-not-divisible",
    }


@pytest.mark.parametrize(
    ("arguments", "words"),
    [
        (["absent.yaml"], "there is no config file absent.yaml"),
        (["{config}", "--for", "abacus"], "no known device"),
        (["{config}", "--preflight.allow", "leaks"], "did you mean 'leak'"),
        (["{config}", "--train.stepz", "3"], "--train.steps"),
        (["{config}", "--world_size", "0"], "--world_size must be from 1 to"),
        ([], "CONFIG"),
    ],
)
def test_mistakes_end_with_code_2(
    arguments: list[str], words: str, tiny_config: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    arguments = [argument.format(config=tiny_config) for argument in arguments]
    try:
        code = main(["preflight", *arguments])
    except SystemExit as ended:  # how argparse and tyro end
        code = ended.code
    assert code == 2
    assert words in " ".join(capsys.readouterr().err.split())
