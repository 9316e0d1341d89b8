"""A tiny run's config as a file."""

from __future__ import annotations

from pathlib import Path

import pytest
import yaml

from tiny_runs import tiny_config_values, write_corpus


@pytest.fixture
def tiny_config(tmp_path: Path) -> Path:
    """A YAML file whose run folder is `runs/tiny` beside it."""
    write_corpus(tmp_path / "words.txt")
    path = tmp_path / "tiny.yaml"
    path.write_text(yaml.safe_dump(tiny_config_values(tmp_path / "words.txt", tmp_path / "runs")), encoding="utf-8")
    return path
