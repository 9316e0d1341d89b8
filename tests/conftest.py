"""Settings of the whole suite, and the tiny config of `tiny_runs` as fixtures."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from hypothesis import settings

from nsa.config.run import RunConfig
from tiny_runs import builder, tiny_config_values, write_corpus

# The suite runs one process for each core; threads of one would only wait for those of another.
torch.set_num_threads(1)

# Speed is no test: a busy machine must not fail the suite.
settings.register_profile("suite", settings(deadline=None))
settings.load_profile("suite")


@pytest.fixture(scope="session")
def corpus(tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("corpus") / "words.txt"
    write_corpus(path)
    return path


@pytest.fixture
def tiny_values(corpus: Path, tmp_path: Path) -> dict[str, Any]:
    return tiny_config_values(corpus, tmp_path / "runs")


@pytest.fixture
def tiny(tiny_values: dict[str, Any]) -> Callable[..., RunConfig]:
    """`tiny(train={"steps": 3})`: a config whose run folder lies in the test's own folder."""
    return builder(tiny_values)


@pytest.fixture(scope="module")
def module_tiny(corpus: Path, tmp_path_factory: pytest.TempPathFactory) -> Callable[..., RunConfig]:
    """`tiny` for fixtures that a whole module shares."""
    return builder(tiny_config_values(corpus, tmp_path_factory.mktemp("shared") / "runs"))
