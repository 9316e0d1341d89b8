"""What a user may not read or write is reported as that, with the file, and never as missing or with a traceback."""

from __future__ import annotations

import os
import subprocess
import sys
import tempfile
from pathlib import Path

import pytest

from nsa.cli import main
from nsa.runs.checkpoints import check_readable

SOURCE = Path(__file__).parents[2] / "src"
NOBODY = 65534
AS_NOBODY = f"import os, sys, nsa.cli.halt; os.setuid({NOBODY}); sys.exit(nsa.cli.main(sys.argv[1:]))"


@pytest.mark.skipif(os.name != "posix" or os.geteuid() != 0, reason="only root can become another user")
def test_halt_as_a_stranger() -> None:
    with tempfile.TemporaryDirectory() as place:
        Path(place).chmod(0o755)
        _halt_as_a_stranger(Path(place) / "run")


def _halt_as_a_stranger(run: Path) -> None:
    run.mkdir()
    (run / "status.json").write_text('{"state": "running", "step": 3, "unix_time_s": 5.0}')
    for mode, named in ((0o000, "status.json"), (0o555, "HALT")):
        run.chmod(mode)
        command = [sys.executable, "-c", AS_NOBODY, "halt", str(run), "enough"]
        ended = subprocess.run(command, env={"PYTHONPATH": str(SOURCE)}, capture_output=True, text=True, check=False)
        assert ended.returncode == 2
        assert f"is closed to user {NOBODY}: Permission denied; change its rights" in ended.stderr
        assert named in ended.stderr
        assert len(ended.stderr.splitlines()) == 1
    run.chmod(0o755)


@pytest.mark.parametrize("command", ["compare", "generate", "halt", "resume"])
def test_every_command_names_what_is_closed(
    command: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    def closed(self: Path) -> bool:
        raise PermissionError(13, "Permission denied", str(self))

    monkeypatch.setattr(Path, "is_dir" if command in ("generate", "resume") else "is_file", closed)
    more = {"generate": ["--prompt", "a"]}.get(command, [])
    assert main([command, str(tmp_path), *more]) == 2
    assert f"nsa {command}: {tmp_path}" in (said := capsys.readouterr().err)
    assert "is closed to user" in said


def test_a_private_model_is_named(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "config.json").touch()
    (tmp_path / "model.safetensors").touch()
    check_readable(tmp_path)
    monkeypatch.setattr(os, "access", lambda path, mode: not str(path).endswith(".safetensors"))
    with pytest.raises(PermissionError) as caught:
        check_readable(tmp_path)
    assert caught.value.filename == str(tmp_path / "model.safetensors")
