"""A tokenizer and documents whose every token says which document and position it is, so that counting is an oracle."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Sequence
from pathlib import Path

import numpy as np
import pytest

from nsa.data import Batch, Documents, Source, TrainingDocuments

STRIDE = 10_000


class CountingTokenizer:
    """The text "3 7" becomes the 7 ids 30000..30006; id 999999 ends a document."""

    name, vocab_size, eos_id = "counting", 1_000_000, 999_999

    def encode(self, text: str) -> list[int]:
        document, length = map(int, text.split())
        return [document * STRIDE + position for position in range(length)]

    def encode_batch(self, texts: Sequence[str]) -> list[np.ndarray]:
        return [np.array(self.encode(text), dtype=np.uint32) for text in texts]

    def token_ends(self, text: str) -> np.ndarray:
        return np.arange(1, len(self.encode(text)) + 1)

    def decode(self, ids: Iterable[int]) -> str:
        return " ".join(map(str, ids))

    def save(self, folder: str | Path) -> None:
        raise NotImplementedError


@pytest.fixture
def counting_tokenizer() -> CountingTokenizer:
    return CountingTokenizer()


@pytest.fixture
def counting_documents() -> Callable[[Sequence[int]], Documents]:
    """Documents of the given numbers of tokens, their end tokens not counted."""

    def build(lengths: Sequence[int]) -> Documents:
        names = [f"doc{index}" for index in range(len(lengths))]
        return Documents(names, [f"{index} {length}" for index, length in enumerate(lengths)])

    return build


@pytest.fixture
def all_of() -> Callable[[Source], TrainingDocuments]:
    """To train on all documents of a source."""
    return lambda source: TrainingDocuments(source, lambda name: False, ())


@pytest.fixture
def check_batch() -> Callable[[Batch, Sequence[int]], list[tuple[int, int]]]:
    """Checks every cell of a batch of counting documents against its neighbours alone; returns the inputs' places."""

    def check(batch: Batch, lengths: Sequence[int]) -> list[tuple[int, int]]:
        num_rows, sequence_length = batch.input_ids.shape
        places: list[tuple[int, int]] = []
        bounds = [0]
        for row in range(num_rows):
            previous = None
            for column in range(sequence_length):
                label = int(batch.labels[row, column])
                document = int(batch.document_ids[row, column])
                place = divmod(int(batch.input_ids[row, column]), STRIDE) if document >= 0 else None
                if place is None:
                    assert label == -100
                else:
                    assert place[0] == document
                    is_last = place[1] == lengths[document] - 1
                    assert label == (CountingTokenizer.eos_id if is_last else document * STRIDE + place[1] + 1)
                    places.append(place)
                continues = column > 0 and (
                    place == previous if place is None or previous is None else place == (previous[0], previous[1] + 1)
                )
                if not continues and (row or column):
                    bounds.append(row * sequence_length + column)
                previous = place
        assert batch.cu_seqlens.tolist() == [*bounds, num_rows * sequence_length]
        return places

    return check
