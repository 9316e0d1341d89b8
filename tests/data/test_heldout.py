"""The choice of held-out documents is by name, stable, and never empty by accident."""

from __future__ import annotations

import pytest

from nsa.data import DataError, Documents
from nsa.data.heldout import split_documents

NAMES = ["1790 A", "1790 B", "1791 A", "a[1].txt", "a1.txt"]


def documents(names: list[str]) -> Documents:
    return Documents(names, ["text"] * len(names))


@pytest.mark.parametrize(
    ("heldout", "expected"),
    [
        (["1790 A"], [0]),
        (["1790 *"], [0, 1]),
        (["* A", "1790 B"], [0, 1, 2]),
        (["a[1].txt"], [3]),
        (["a?.txt"], [4]),
        ([], []),
        (0.0, []),
    ],
)
def test_names_and_patterns_choose(heldout: list[str] | float, expected: list[int]) -> None:
    train, chosen = split_documents(documents(NAMES), heldout)
    assert chosen == expected
    assert sorted(train + chosen) == list(range(len(NAMES)))


def test_a_fraction_depends_on_the_names_alone() -> None:
    names = [f"document {index}" for index in range(2000)]
    chosen = {names[index] for index in split_documents(documents(names), 0.1)[1]}
    assert 150 < len(chosen) < 250
    shuffled = [*names[1000:1900], "other", *names[:1000]]
    again = {shuffled[index] for index in split_documents(documents(shuffled), 0.1)[1]}
    assert again - {"other"} == {name for name in chosen if name in shuffled}
    assert chosen < {names[index] for index in split_documents(documents(names), 0.2)[1]}
    assert split_documents(documents(["1829 Andrew Jackson", "1830 Andrew Jackson"]), 0.05) == ([1], [0])


@pytest.mark.parametrize(
    ("heldout", "message"),
    [
        (["1790 C"], r'"1790 C" matches none of the 5 documents; nearest: \[.1790 [AB]'),
        (["1790 *", "2*"], r'"2\*" matches none'),
        (["*"], "takes all 5 documents and leaves none to train on"),
        (0.000001, r"chooses none of the 5 documents; name some in data\.heldout"),
    ],
)
def test_a_choice_that_cannot_be_meant_is_refused(heldout: list[str] | float, message: str) -> None:
    with pytest.raises(DataError, match=message):
        split_documents(documents(NAMES), heldout)
