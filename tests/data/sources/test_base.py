"""A source gives its documents by their numbers, one by one or a chunk at a time."""

from __future__ import annotations

import pytest

from nsa.data import Document, Documents
from nsa.data.sources.base import KEPT_CHUNKS
from nsa.data.sources.synthetic import CHUNK_DOCUMENTS, SyntheticDocuments


def test_a_document_in_memory_is_a_chunk() -> None:
    source = Documents(["a", "b"], ["one", "two"])
    assert list(source) == [Document(0, "a", "one"), Document(1, "b", "two")]
    assert (len(source), source.num_chunks, source.chunk_of(1)) == (2, 2, 1)
    assert source.read(1) == [source[1]]
    assert source.read_names(1) == ["b"]


@pytest.mark.parametrize("number", [-1, 2])
def test_a_number_that_is_not_there_is_an_error(number: int) -> None:
    with pytest.raises(IndexError, match=f"document {number} is not among the 2"):
        Documents(["a", "b"], ["one", "two"])[number]


def test_the_fingerprint_tells_names_and_texts_apart() -> None:
    sources = [Documents(["ab"], ["c"]), Documents(["a"], ["bc"]), Documents(["ab"], ["d"])]
    assert len({source.fingerprint for source in sources}) == 3
    assert Documents(["ab"], ["c"]).fingerprint == sources[0].fingerprint


def test_every_text_has_a_name() -> None:
    with pytest.raises(ValueError, match="1 names for 2 texts"):
        Documents(["a"], ["one", "two"])


def test_the_chunks_asked_for_last_are_read_once() -> None:
    read: list[int] = []

    class Recording(SyntheticDocuments):
        def read(self, chunk: int) -> list[Document]:
            read.append(chunk)
            return super().read(chunk)

    source = Recording("copy", 4)
    for chunk in (0, 1, 2, 3, 0, 1):
        assert source[chunk * CHUNK_DOCUMENTS + 5].number == chunk * CHUNK_DOCUMENTS + 5
    assert read == [0, 1, 2, 3]
    _ = source[KEPT_CHUNKS * CHUNK_DOCUMENTS], source[1], source[2 * CHUNK_DOCUMENTS]
    assert read == [0, 1, 2, 3, 4, 2], "the one not asked for the longest gave way"
