"""Bad input of every kind: exit code 2 and a short message with the input's name and the remedy; never a traceback."""

from __future__ import annotations

import importlib.util
from pathlib import Path
from types import ModuleType

import pytest

from bad_inputs.case import TINY, BadInput
from nsa.cli import main

MAX_LINES, MAX_CHARACTERS = 12, 3000


def _load(path: Path) -> ModuleType:
    spec = importlib.util.spec_from_file_location(f"bad_inputs_{path.stem}", path)
    assert spec is not None
    assert spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


AREAS = {
    path.stem: _load(path).CASES
    for path in sorted(Path(__file__).parent.glob("*.py"))
    if path.stem not in ("case", "test_bad_inputs")
}


@pytest.mark.timeout(60)
@pytest.mark.parametrize(
    "case", [pytest.param(case, id=f"{area}: {case.name}") for area, cases in AREAS.items() for case in cases]
)
def test_bad_input_is_refused_by_name(
    case: BadInput, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.chdir(tmp_path)
    (tmp_path / "c.yaml").write_text(TINY, encoding="utf-8")
    case.prepare(tmp_path)
    try:
        code = main([part.replace("{here}", str(tmp_path)) for part in case.command.split()])
    except SystemExit as exit_:
        code = exit_.code
    out, err = capsys.readouterr()
    assert code == case.code, f"exit code {code}; it says:\n{out[-2000:]}\n{err[-2000:]}"
    assert "Traceback" not in out + err
    missing = [part for part in case.says if part.replace("{here}", str(tmp_path)) not in err]
    assert not missing, f"{missing} not in:\n{err}"
    assert len(err.splitlines()) <= MAX_LINES, err
    assert len(err) <= MAX_CHARACTERS, f"{len(err)} characters"


def test_names_are_unique() -> None:
    names = [(area, case.name) for area, cases in AREAS.items() for case in cases]
    assert len(set(names)) == len(names)
