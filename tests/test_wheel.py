"""What is installed is whole: the wheel holds the configs, and its metadata say what the package is."""

from __future__ import annotations

import shutil
import subprocess
import sys
import zipfile
from email import message_from_string
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[1]
BUILD = "from setuptools import build_meta; build_meta.build_{kind}(sys.argv[1])"


@pytest.fixture(scope="module")
def wheel(tmp_path_factory: pytest.TempPathFactory) -> zipfile.ZipFile:
    """The wheel that the sdist of a checkout builds, without network."""
    folder = tmp_path_factory.mktemp("built")
    checkout = folder / "checkout"
    checkout.mkdir()
    for name in ("pyproject.toml", "README.md", "LICENSE"):
        shutil.copy(ROOT / name, checkout)
    for name in ("src", "configs"):
        ignored = shutil.ignore_patterns("__pycache__", "*.egg-info")
        shutil.copytree(ROOT / name, checkout / name, symlinks=True, ignore=ignored)
    _build("sdist", checkout, folder)
    (sdist,) = folder.glob("*.tar.gz")
    shutil.unpack_archive(sdist, folder / "unpacked", filter="data")
    (source,) = (folder / "unpacked").iterdir()
    _build("wheel", source, folder)
    (built,) = folder.glob("*.whl")
    return zipfile.ZipFile(built)


def _build(kind: str, source: Path, target: Path) -> None:
    command = [sys.executable, "-c", f"import sys; {BUILD.format(kind=kind)}", str(target)]
    done = subprocess.run(command, cwd=source, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr


def test_configs_go_by_name_where_the_wheel_is_installed(wheel: zipfile.ZipFile, tmp_path: Path) -> None:
    installed, elsewhere = tmp_path / "installed", tmp_path / "elsewhere"
    wheel.extractall(installed)
    elsewhere.mkdir()
    code = (
        "import sys; sys.path.insert(0, sys.argv[1]); import nsa.cli; from nsa.config.load import load_config;"
        "assert nsa.cli.__file__.startswith(sys.argv[1]), nsa.cli.__file__;"
        "nsa.cli.main(['configs']); print(load_config('train_showcase').run.name)"
    )
    command = [sys.executable, "-c", code, str(installed)]
    done = subprocess.run(command, cwd=elsewhere, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    *listed, name = done.stdout.splitlines()
    assert [line.split()[0] for line in listed] == sorted(path.stem for path in (ROOT / "configs").glob("*.yaml"))
    assert name == "showcase"


def test_the_metadata_are_complete(wheel: zipfile.ZipFile) -> None:
    (name,) = (name for name in wheel.namelist() if name.endswith("/METADATA"))
    metadata = message_from_string(wheel.read(name).decode())
    for field in ("Summary", "Author", "Keywords", "License-Expression", "Requires-Python", "Classifier"):
        assert metadata[field], field
    assert metadata["Description-Content-Type"] == "text/markdown"
    assert metadata.get_payload().lstrip().startswith("# ")  # pyright: ignore[reportAttributeAccessIssue]
    assert any(name.endswith("licenses/LICENSE") for name in wheel.namelist())


def test_type_checkers_find_the_types(wheel: zipfile.ZipFile) -> None:
    assert "nsa/py.typed" in wheel.namelist()
