"""The order of a seed and an epoch is fixed, in memory and by chunks, so that a checkpoint resumes where it was."""

from __future__ import annotations

import pytest

from nsa.data import Document, Documents, TrainingDocuments
from nsa.data.sources.chunked import FileChunks
from nsa.data.stream.shuffle import ShuffleReader

NAMES, TEXTS = [f"doc{number}" for number in range(12)], [f"{number} 4" for number in range(12)]


class InChunks(FileChunks):
    """The same documents, three in a chunk."""

    def __init__(self) -> None:
        super().__init__("in chunks", [], [3] * 4)

    def read(self, chunk: int) -> list[Document]:
        part = slice(3 * chunk, 3 * chunk + 3)
        return self.numbered(chunk, NAMES[part], TEXTS[part])


@pytest.mark.parametrize(
    ("source", "identity", "read", "rows"),
    [
        (
            Documents(NAMES, TEXTS),
            [0, 1, 3, 4, 5, 6, 7, 8, 9, 10, 11],
            [6, 9, 8, 3, 5, 7, 0, 11, 10, 4, 1],
            [[5, 7], [6, 9], [10, 4], [0, 11], [8, 3]],
        ),
        (
            InChunks(),
            "('doc2',)",
            [6, 7, 8, 0, 1, 9, 10, 11, 3, 4, 5],
            [[10, 7], [0, 1], [6, 9], [11, 8]],
        ),
    ],
)
def test_documents_and_rows_come_in_the_order_of_the_seed(source, identity, read, rows, counting_tokenizer) -> None:
    documents = TrainingDocuments(source, lambda name: name == "doc2", ("doc2",))
    assert documents.identity[-1] == identity
    assert [document.number for document in documents.read(documents.order(5, 1))] == read
    reader = ShuffleReader(documents, counting_tokenizer, sequence_length=8, seed=5, window_tokens=24)
    window = reader.read(1, 0, [], {})
    assert [[piece.document for piece in row] for row in window.rows] == rows
