"""The command `nsa` itself, and what holds for all of its commands."""

from __future__ import annotations

import os
import re
import subprocess
import sys
from pathlib import Path

import pytest

import nsa
from nsa.cli import COMMANDS, main
from nsa.runs.folder import RunFolder

SOURCE = Path(nsa.__file__).parent
ROOT = Path(__file__).parents[2]


def test_help_lists_every_command(capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["--help"]) == 0
    text = capsys.readouterr().out
    for name, (_, summary) in COMMANDS.items():
        assert re.search(rf"^  {name} +{re.escape(summary)}$", text, re.MULTILINE)


@pytest.mark.parametrize("command", COMMANDS)
def test_each_command_explains_itself(command: str, capsys: pytest.CaptureFixture[str]) -> None:
    assert main([command, "--help"]) == 0
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


LIGHT = """
import contextlib, io, sys
import nsa.data.config, nsa.config.run, nsa.config.load
from nsa.cli import COMMANDS, main
from nsa.cli.bench import KINDS

assert "torch" not in sys.modules, "by a config"
open("c.yaml", "w").write("train: {steps: 0}")
open("data.yaml", "w").write("data: {source: text, paths: [absent.txt]}")
commands = [["--help"], ["nope"], *([name, "--help"] for name in COMMANDS)]
commands += [["bench", kind, "--help"] for kind in KINDS]
commands += [[name, "absent"] for name in ("train", "resume", "halt", "preflight", "watch")]
commands += [["train", "c.yaml"], ["train", "train_copy", "--train.stepz", "3"], ["preflight", "c.yaml"], ["configs"]]
commands += [["generate", "absent", "--prompt", "x"], ["inspect", "absent", "--prompt", "x"]]
commands += [["data", "check", "absent"], ["train", "absent.yaml"], ["train", "data.yaml"]]
commands += [["bench", "train", "absent"], ["bench", "prefill", "--longths", "3"], ["doctor", "--folder", "absent"]]
for command in commands:
    with contextlib.redirect_stdout(io.StringIO()), contextlib.redirect_stderr(io.StringIO()):
        code = main(command)
    assert code == (0 if command[-1] in ("--help", "configs") else 2), (command, code)
    heavy = {"torch", "transformers", "matplotlib"} & sys.modules.keys()
    assert not heavy, (command, heavy)
"""


def test_help_and_refusals_need_no_heavy_import(tmp_path: Path) -> None:
    environment = {"PYTHONPATH": str(SOURCE.parent)}
    command = [sys.executable, "-c", LIGHT]
    done = subprocess.run(
        command, cwd=tmp_path, capture_output=True, text=True, env=environment, check=False, timeout=60
    )
    assert done.returncode == 0, done.stderr


AT_ONCE = """
import contextlib, io, sys
from nsa.cli import main

with contextlib.redirect_stdout(io.StringIO()), contextlib.redirect_stderr(io.StringIO()):
    main(sys.argv[1:])
print(*sorted({"torch", "transformers", "numpy", "pandas", "matplotlib", "pydantic"} & sys.modules.keys()))
print(len(sys.modules))
"""


@pytest.mark.parametrize("command", ["halt", "watch", "compare", "page"])
@pytest.mark.parametrize("asks", ["--help", "absent --no_such_option", ""])
def test_what_looks_after_a_run_explains_itself_with_few_modules(command: str, asks: str) -> None:
    """Its help takes two tenths of a second; numpy alone would take as long again."""
    environment = {"PYTHONPATH": str(SOURCE.parent)}
    line = [sys.executable, "-c", AT_ONCE, command, *asks.split()]
    done = subprocess.run(line, capture_output=True, text=True, env=environment, check=True)
    heavy, count = done.stdout.split("\n")[:2]
    assert not heavy
    assert int(count) < 450


def test_halt_and_watch_need_no_numpy(tmp_path: Path) -> None:
    run = RunFolder.create(tmp_path / "run", config_yaml="", env={}, data_index={}).path
    environment = {"PYTHONPATH": str(SOURCE.parent)}
    for arguments in (["halt", str(run)], ["watch", str(run), "--once", "--thresholds.silent_s", "1e9"]):
        line = [sys.executable, "-c", AT_ONCE, *arguments]
        done = subprocess.run(line, capture_output=True, text=True, env=environment, check=True)
        assert not {"torch", "transformers", "numpy", "pandas", "matplotlib"} & set(done.stdout.split()), arguments


def _run_nsa(*arguments: str, **variables: str) -> subprocess.CompletedProcess[bytes]:
    environment = {"PYTHONPATH": str(SOURCE.parent), **variables}
    return subprocess.run(
        [sys.executable, "-m", "nsa.cli", *arguments], capture_output=True, env=environment, check=False
    )


def test_a_terminal_that_is_not_utf_8_gets_what_it_can_show() -> None:
    for arguments, code in ((["train", "--help"], 0), (["configs"], 0), (["train", "caf\xe9.yaml"], 2)):
        done = _run_nsa(*arguments, PYTHONIOENCODING="ascii")
        assert done.returncode == code, done.stderr
        assert b"Traceback" not in done.stderr
        (done.stdout + done.stderr).decode("ascii")


@pytest.mark.parametrize("unbuffered", ["", "1"])
def test_a_reader_that_has_enough_ends_a_command_quietly(unbuffered: str) -> None:
    command = [sys.executable, "-m", "nsa.cli", "--help"]
    environment = {"PYTHONPATH": str(SOURCE.parent), "PYTHONUNBUFFERED": unbuffered}
    ours, theirs = os.pipe()
    os.close(ours)
    done = subprocess.run(command, stdout=theirs, stderr=subprocess.PIPE, env=environment, check=False)
    os.close(theirs)
    assert (done.returncode, done.stderr) == (141, b"")


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


def test_the_interpreter_does_not_look_for_garbage_when_it_ends() -> None:
    code = "import atexit, gc; atexit.register(lambda: print(gc.get_freeze_count() > 0)); import nsa.cli"
    environment = {"PYTHONPATH": str(Path(nsa.__file__).parents[1])}
    ended = subprocess.run([sys.executable, "-c", code], env=environment, capture_output=True, text=True, check=True)
    assert ended.stdout == "True\n"
