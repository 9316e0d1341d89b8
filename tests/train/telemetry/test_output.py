"""A run's output may lose its reader, its disk or its encoding; the run does not notice."""

from __future__ import annotations

import errno
import io
import os
import subprocess
import sys
import textwrap
from pathlib import Path

import pytest

from nsa.train.telemetry.output import LastingOutput, lasting_output

SOURCE = Path(__file__).parents[3] / "src"


class Broken(io.StringIO):
    """A stream without a descriptor that fails so many times."""

    def __init__(self, code: int, times: int) -> None:
        super().__init__()
        self.code, self.times = code, times

    def write(self, text: str) -> int:
        if self.times:
            self.times -= 1
            raise OSError(self.code, os.strerror(self.code))
        return super().write(text)


@pytest.mark.parametrize("code", [errno.EPIPE, errno.EIO, errno.ENOSPC])
def test_what_cannot_be_written_is_dropped_and_said_once(code: int, monkeypatch: pytest.MonkeyPatch) -> None:
    out, err = Broken(code, times=2), io.StringIO()
    monkeypatch.setattr(sys, "stdout", out)
    monkeypatch.setattr(sys, "stderr", err)
    with lasting_output():
        print("first")
        print("second")
        print("third")
    assert out.getvalue().endswith("third\n")
    assert err.getvalue() == f"standard output cannot be written: {os.strerror(code)}; the run continues\n"


def test_both_streams_may_be_lost(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(sys, "stdout", Broken(errno.EPIPE, times=99))
    monkeypatch.setattr(sys, "stderr", Broken(errno.EPIPE, times=99))
    with lasting_output():
        print("to nobody")
        print("to nobody", file=sys.stderr)


def test_what_the_terminal_cannot_show_is_escaped() -> None:
    raw = io.BytesIO()
    lasting = LastingOutput(io.TextIOWrapper(raw, encoding="ascii"), "standard output", None)
    lasting.write("loss \u03b1 5\n")
    lasting.flush()
    assert raw.getvalue() == b"loss \\u03b1 5\n"
    assert not lasting.isatty()


@pytest.mark.parametrize("place", ["a reader that leaves", "a full disk"])
def test_the_interpreter_ends_as_if_it_had_been_read(place: str) -> None:
    code = """
        import sys
        from nsa.train.telemetry.output import lasting_output
        with lasting_output():
            for number in range(20000):
                print("line", number, flush=number == 0)
        sys.exit(3)
    """
    command = [sys.executable, "-c", textwrap.dedent(code)]
    full = os.open("/dev/full", os.O_WRONLY)
    out = full if place == "a full disk" else subprocess.PIPE
    with subprocess.Popen(command, env={"PYTHONPATH": str(SOURCE)}, stdout=out, stderr=subprocess.PIPE) as process:
        if process.stdout is not None:
            process.stdout.readline()
            process.stdout.close()
        assert process.stderr is not None
        said = process.stderr.read().decode()
        assert process.wait(60) == 3
    os.close(full)
    assert "standard output cannot be written" in said
    assert len(said.splitlines()) == 1
