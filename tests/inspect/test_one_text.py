"""What one text selects: kept queries, reads by hand, and a file that gives it back."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch

from nsa.inspect.one_text import MAX_QUERIES, select_in_text
from nsa.inspect.picture import draw_selection
from nsa.inspect.selection import record_selection
from nsa.inspect.text_selection import load_text_selection
from tiny_models import tiny_model

IDS = [7 * k % 61 for k in range(300)]


def decode(ids: list[int]) -> str:
    return " ".join(map(str, ids))


@pytest.fixture(scope="module")
def model():
    return tiny_model()


def test_the_kept_queries_are_those_of_a_pass_of_its_own(model) -> None:
    selection = select_in_text(model, IDS, decode, "a text")
    with torch.no_grad(), record_selection(model) as recorded:
        model(torch.tensor([IDS]), use_cache=False)
    assert selection.blocks == {layer: blocks[0, selection.positions].tolist() for layer, blocks in recorded.items()}
    assert len(selection.positions) <= MAX_QUERIES + 4
    assert {299, 149, 74, 36} <= set(selection.positions)
    assert (len(selection.texts), selection.texts[0]) == (19, decode(IDS[:16]))
    assert selection.texts[-1] == decode(IDS[288:])


def test_reads_are_counted_by_branch_and_held_against_dense(model) -> None:
    last = select_in_text(model, IDS, decode, "a text").reads()[-1]
    # 300 tokens: (300 - 8) / 4 + 1 compressed ones, 20 of the window; three full blocks and the 12 tokens of its own.
    assert last == {"position": 299, "cmp": 74.0, "slc": 60.0, "win": 20.0, "total": 154.0, "dense": 300}


def test_it_is_saved_and_drawn(model, tmp_path: Path) -> None:
    selection = select_in_text(model, IDS, decode, "a text")
    path = tmp_path / "selection.json"
    selection.save(path)
    assert load_text_selection(path) == selection
    draw_selection(selection, tmp_path / "selection.png")
    assert (tmp_path / "selection.png").read_bytes().startswith(b"\x89PNG")
    path.write_text(path.read_text(encoding="utf-8")[:100], encoding="utf-8")
    with pytest.raises(ValueError, match=r"selection.json is damaged"):
        load_text_selection(path)
