"""`nsa compare` on two runs of the command line."""

from __future__ import annotations

from pathlib import Path

import pytest

from nsa.cli import main


def test_two_runs_become_a_picture_and_a_table(tiny_config: Path, capsys: pytest.CaptureFixture[str]) -> None:
    folder = tiny_config.parent
    short = ["train", str(tiny_config), "--train.steps", "2", "--sample.max_new_tokens", "0"]
    assert main(short) == 0
    assert main([*short, "--run.name", "dense", "--model.layer_types", "full_attention"]) == 0
    capsys.readouterr()
    runs = [str(folder / "runs" / name) for name in ("tiny", "dense")]
    assert main(["compare", *runs, "--out", str(folder / "both")]) == 0
    out = capsys.readouterr().out
    assert "|  | tiny | dense |" in out
    assert "| `model.layer_types` | nsa | full_attention |" in out
    assert (folder / "both.csv").is_file()
    assert (folder / "both.png").is_file()


def test_a_folder_that_is_no_run_ends_with_code_2(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["compare", str(tmp_path), "--out", str(tmp_path / "both")]) == 2
    assert "is no run folder" in capsys.readouterr().err
