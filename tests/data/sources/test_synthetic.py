"""The drawn tasks: what can be known follows from what came before, and the rest has the entropy that is stated."""

from __future__ import annotations

import math
from fractions import Fraction

import pytest

from nsa.data.sources.synthetic import CHUNK_DOCUMENTS, SyntheticDocuments


def test_a_copy_repeats_its_letters() -> None:
    source = SyntheticDocuments("copy", 12)
    texts = [source[index].text for index in range(600)]
    for text in texts:
        given, asked = text[1:].split("=")
        assert text[0] == ">"
        assert given == asked
        assert len(given) == 12
        assert set(given) <= set("abcdefghijklmnopqrstuvwxyz")
    assert len(set(texts)) == 600


def test_a_recall_asks_for_every_pair_once_in_another_order() -> None:
    source = SyntheticDocuments("recall", 9)
    for text in (source[index].text for index in range(300)):
        given, asked = ([part[at : at + 3] for at in range(0, 27, 3)] for part in text[1:].split("="))
        assert sorted(given) == sorted(asked)
        assert given != asked
        assert len({pair[:2] for pair in given}) == 9


def test_a_document_depends_on_its_number_alone() -> None:
    one, other = (SyntheticDocuments("copy", 20) for _ in range(2))
    far = CHUNK_DOCUMENTS * 10_000_000_000 + 7
    assert (one[far].name, one[far].text) == (other[far].name, other[far].text) == (f"copy-{far}", one[far].text)
    assert one[3].text != one[4].text
    assert one[0].text != one[CHUNK_DOCUMENTS].text
    assert len(one) > 10**12
    assert one.fingerprint == other.fingerprint != SyntheticDocuments("copy", 21).fingerprint
    assert SyntheticDocuments("copy", 21).fingerprint != SyntheticDocuments("recall", 21).fingerprint


def test_the_entropy_is_the_logarithm_of_the_number_of_documents() -> None:
    copies = 26**5
    assert SyntheticDocuments("copy", 5).document_nats == pytest.approx(math.log(copies))
    recalls = math.prod(26**2 - index for index in range(3)) * 26**3 * math.factorial(3)
    assert SyntheticDocuments("recall", 3).document_nats == pytest.approx(math.log(recalls))


@pytest.mark.parametrize("task", ["copy", "recall"])
def test_the_floor_is_the_entropy_over_the_labels_less_a_little(task: str) -> None:
    source = SyntheticDocuments(task, 7)
    labels = len(source[0].text.encode())  # bytes after the first, and the end
    exact = Fraction(source.document_nats) / labels
    assert 0.97 * float(exact) < source.entropy_floor_nats < float(exact)


@pytest.mark.parametrize(("task", "length"), [("copy", 0), ("recall", 677), ("sort", 3)])
def test_impossible_tasks_are_refused(task: str, length: int) -> None:
    with pytest.raises(ValueError, match="there is no task"):
        SyntheticDocuments(task, length)
