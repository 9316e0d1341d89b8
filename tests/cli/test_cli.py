"""The command `nsa` itself, and what holds for all of its commands."""

from __future__ import annotations

import re
import subprocess
import sys
from pathlib import Path

import pytest

import nsa
from nsa.cli import COMMANDS, main

SOURCE = Path(nsa.__file__).parent
ROOT = Path(__file__).parents[2]


def test_help_lists_every_command(capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["--help"]) == 0
    text = capsys.readouterr().out
    for name, (_, summary) in COMMANDS.items():
        assert re.search(rf"^  {name} +{re.escape(summary)}$", text, re.MULTILINE)


@pytest.mark.parametrize("command", COMMANDS)
def test_each_command_explains_itself(command: str, capsys: pytest.CaptureFixture[str]) -> None:
    try:
        code = main([command, "--help"])
    except SystemExit as ended:  # how tyro ends after its help
        code = ended.code
    assert code == 0
    assert f"usage: nsa {command}" in capsys.readouterr().out


def test_the_version_is_the_package_s(capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["--version"]) == 0
    assert capsys.readouterr().out == f"nsa {nsa.__version__}\n"


def test_a_mistyped_command_is_answered_with_the_nearest(capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["comp"]) == 2
    assert "did you mean `nsa compare`?" in capsys.readouterr().err
    assert main(["qqqq"]) == 2
    assert "choose one of train" in capsys.readouterr().err


def test_without_a_command_the_usage_is_shown_as_an_error(capsys: pytest.CaptureFixture[str]) -> None:
    assert main([]) == 2
    assert "usage: nsa" in capsys.readouterr().err


def test_an_interrupted_command_says_so_without_a_traceback(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    def interrupted(*arguments: object) -> None:
        error = KeyboardInterrupt()
        error.add_note("rank 0, after step 3")
        raise error

    monkeypatch.setattr("nsa.cli.halt.main", interrupted)
    assert main(["halt", "runs/NAME"]) == 130
    assert capsys.readouterr().err == "nsa halt: interrupted\n  rank 0, after step 3\n"


def test_help_needs_no_heavy_import() -> None:
    code = "import sys; from nsa.cli import main; main(['--help']); sys.exit('torch' in sys.modules)"
    subprocess.run([sys.executable, "-c", code], check=True, env={"PYTHONPATH": str(SOURCE.parent)}, timeout=60)


def test_no_environment_variable_is_read_but_those_of_torchrun() -> None:
    readers = re.compile(r"\benviron\b|\bgetenv\b|\benvironb\b")
    files = [path for folder in (SOURCE, ROOT / "examples") for path in folder.rglob("*.py")]
    found = [path for path in files if readers.search(path.read_text(encoding="utf-8"))]
    assert found == [SOURCE / "train" / "parallel.py"]
    text = found[0].read_text(encoding="utf-8")
    assert len(readers.findall(text)) == 1
    assert (
        'os.environ.get(name, default)) for name, default in (("RANK", 0), ("LOCAL_RANK", 0), ("WORLD_SIZE", 1))'
        in text
    )
