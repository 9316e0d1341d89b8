"""Held-out documents as batches, for exact loss, perplexity and bits per byte."""

from __future__ import annotations

import math
from collections.abc import Iterator, Mapping, Sequence

import numpy as np

from nsa.data.errors import DataError
from nsa.data.sources.base import Document
from nsa.data.stream.packing import Batch, BatchBuilder, Piece, check_sizes, cut_document, pack_rows
from nsa.data.stream.shuffle import encode_documents
from nsa.data.tokenizers import Tokenizer


class EvalBatches:
    """Held-out documents as batches: the same ones at every iteration, and what it takes for exact bits per byte.

    Every token but a document's first is a label exactly once, `num_labels` in all. Bits per byte are the sum of
    -ln p over all labels / ln 2 / `num_bytes`, where `num_bytes` are the UTF-8 bytes of text that the labels stand for.
    A document's first token is not predicted, so its bytes do not count; its end is predicted, so its nats do, and it
    adds no byte. Whole documents as bytes thus have num_labels = num_bytes + the number of documents, and a uniform
    guess among V tokens costs log2(V) bits for each label.

    Args:
        documents: the held-out documents.
        max_tokens: keep about this many tokens (at least one row), whole rows spread evenly over the documents.
        tokenizer, sequence_length, rows_per_batch: as in `StreamOptions`; the last batch may have fewer rows.

    Raises:
        DataError: there is no document, or nothing to predict in them.
    """

    def __init__(
        self,
        documents: Sequence[Document],
        *,
        tokenizer: Tokenizer,
        sequence_length: int,
        rows_per_batch: int,
        max_tokens: int | None = None,
    ) -> None:
        check_sizes(sequence_length, rows_per_batch)
        if not documents:
            raise DataError("no document is held out, so there is nothing to evaluate on; set data.heldout")
        self._tokens = encode_documents(documents, tokenizer)
        pieces = [
            piece
            for number, tokens in self._tokens.items()
            for piece in cut_document(number, len(tokens), sequence_length)
        ]
        rows, rest = pack_rows(pieces, sequence_length)
        rows += [rest] if rest else []
        if not rows:
            raise DataError(f"the {len(documents)} held-out documents have no token to predict; hold out longer ones")
        if max_tokens is not None:
            count = min(len(rows), max(1, max_tokens // sequence_length))
            rows = [rows[index * len(rows) // count] for index in range(count)]
        self._rows = rows
        self._sequence_length, self._rows_per_batch, self._pad_id = sequence_length, rows_per_batch, tokenizer.eos_id
        kept = [piece for row in rows for piece in row]
        by_number = {document.number: document for document in documents}
        self.document_names = tuple(by_number[number].name for number in sorted({piece.document for piece in kept}))
        self.num_labels = sum(piece.stop - piece.start for piece in kept)
        self.num_bytes = _count_bytes(by_number, kept, tokenizer)
        self._longest = max(kept, key=lambda piece: piece.stop - piece.start)
        self._longest_name = by_number[self._longest.document].name

    def __len__(self) -> int:
        """Batches of one iteration."""
        return math.ceil(len(self._rows) / self._rows_per_batch)

    def __iter__(self) -> Iterator[Batch]:
        for start in range(0, len(self._rows), self._rows_per_batch):
            rows = self._rows[start : start + self._rows_per_batch]
            builder = BatchBuilder(len(rows), self._sequence_length, self._pad_id)
            for row in rows:
                builder.add(row, self._tokens)
            yield builder.build()

    @property
    def longest_piece(self) -> tuple[str, list[int]]:
        """The first of the longest stretches of one document in a row: its document's name, and its token ids."""
        document, start, stop = self._longest
        return self._longest_name, self._tokens[document][start:stop].tolist()


def _count_bytes(documents: Mapping[int, Document], pieces: Sequence[Piece], tokenizer: Tokenizer) -> int:
    """UTF-8 bytes of the labels; the end-of-text token, last of each document, has none."""
    total = 0
    ends: dict[int, np.ndarray] = {}
    for number, start, stop in pieces:
        if number not in ends:
            text_ends = tokenizer.token_ends(documents[number].text)
            ends[number] = np.append(text_ends, text_ends[-1:])
        total += int(ends[number][stop] - ends[number][start])
    return total
