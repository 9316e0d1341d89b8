"""The page of mathematics: its example computes what it says, its numbers are the geometry's, and its names exist."""

from __future__ import annotations

import doctest
import importlib
import re
from functools import reduce
from pathlib import Path

import pytest
import torch

from nsa import BlockGeometry
from nsa.ops import reference

PAGE = Path(__file__).parents[1] / "docs" / "mathematics.md"
TEXT = PAGE.read_text(encoding="utf-8")


def resolve(name: str) -> object:
    """The object with this dotted name; modules end where attributes begin."""
    parts = name.split(".")
    for end in range(len(parts), 0, -1):
        try:
            module = importlib.import_module(".".join(parts[:end]))
        except ModuleNotFoundError:
            continue
        return reduce(getattr, parts[end:], module)
    raise ModuleNotFoundError(name)


def test_the_worked_example_gives_what_it_says() -> None:
    outcome = doctest.testfile(str(PAGE), module_relative=False, verbose=False)
    assert outcome.attempted >= 14
    assert not outcome.failed


def test_every_name_exists() -> None:
    names = set(re.findall(r"`(nsa\.[\w.]+)`", TEXT))
    assert len(names) >= 15
    for name in names:
        assert resolve(name) is not None


def test_the_table_of_symbols_has_every_field_with_its_default() -> None:
    rows = [row.split("|")[2:4] for row in TEXT.splitlines() if row.startswith("| ") and "_" in row.split("|")[2]]
    stated = {
        name.strip("` "): int(value)
        for names, values in rows
        if values.strip()
        for name, value in zip(names.split(","), values.split(","), strict=True)
    }
    assert stated == dict(zip(BlockGeometry.__dataclass_fields__, BlockGeometry().as_tuple(), strict=True))


def test_the_papers_geometry_reads_and_weighs_as_the_page_says() -> None:
    geometry = BlockGeometry()
    *first, last = geometry.predicted_reads(65536).values()
    reads = f"{', '.join(f'{tokens:,}' for tokens in first)} and {last}"
    assert f"{reads}, that is {sum(first) + last:,} of 65,536 tokens" in " ".join(TEXT.split())
    assert geometry.overlap_weights == (1, 2, 2, 2, 1)
    assert (geometry.overlap_start, geometry.strides_per_select) == (-1, 4)


@pytest.mark.parametrize("t", [0, 2, 3, 7, 8, 42])
def test_a_query_sees_the_compressed_tokens_whose_block_has_ended(t: int) -> None:
    """All scores are 0, so that the log-sum-exp counts."""
    geometry = BlockGeometry(4, 2, 8, num_selected_blocks=4, window_size=4)
    q, k_cmp = torch.zeros(1, 1, 1, 2), torch.zeros(1, 21, 1, 2)
    _, lse = reference.compressed_attention(q, k_cmp, k_cmp, geometry, None, t, 1.0)
    seen = sum(2 * i + 4 - 1 <= t for i in range(21))
    assert round(lse.exp().item()) == seen == geometry.num_compressed(t + 1)
