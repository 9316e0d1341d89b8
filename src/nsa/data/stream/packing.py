"""Documents to rows of exactly T input tokens, without losing or repeating a token.

A document of n tokens (its end token included) has n-1 inputs, positions 0..n-2, and as many labels, positions 1..n-1.
It is cut into pieces [start, stop) of input positions; a piece's labels are one further, [start+1, stop+1), so that
pieces that meet share one token and every token but the document's first is a label exactly once. Pieces of full length
T are rows of their own; the shorter ones are laid end to end and cut where a row ends. Each piece is a document of its
own for attention: what lies before it, in the row or in the same text, is not seen.

    B rows, T tokens in a row, P pieces in a batch (padding of an incomplete row counts as one)
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass
from typing import NamedTuple

import numpy as np
import torch
from torch import Tensor

from nsa.loss import IGNORED_LABEL


class Piece(NamedTuple):
    """Input positions start..stop-1 of a document; the labels are the positions start+1..stop."""

    document: int
    start: int
    stop: int


@dataclass(frozen=True)
class Batch:
    """Packed rows, ready for the model: `model(input_ids.view(1, -1), cu_seqlens=cu_seqlens)`."""

    input_ids: Tensor
    """int64 [B, T]"""
    labels: Tensor
    """int64 [B, T]: the next token of the same document, -100 where there is none (padding)"""
    cu_seqlens: Tensor | None
    """int32 [P + 1]: bounds of the pieces over the flattened B*T tokens, from 0 to B*T; row ends are bounds too. None:
    each row is one document, and the model takes `input_ids` as they are"""
    document_ids: Tensor | None = None
    """int64 [B, T]: the number of the document in its source, -1 for padding; pieces of one document share it. None in
    a batch that is only there to be computed with"""

    @property
    def piece_lengths(self) -> Tensor:
        """int [P]: tokens of each piece, padding included."""
        if self.cu_seqlens is None:
            num_rows, length = self.input_ids.shape
            return torch.full((num_rows,), length)
        return self.cu_seqlens.diff()

    def map(self, change: Callable[[Tensor], Tensor]) -> Batch:
        """The batch with each of its tensors changed."""
        bounds, documents = (x if x is None else change(x) for x in (self.cu_seqlens, self.document_ids))
        return Batch(change(self.input_ids), change(self.labels), bounds, documents)


def cut_document(document: int, num_tokens: int, sequence_length: int) -> list[Piece]:
    """Full pieces of `sequence_length` inputs and a shorter one at the end; none below two tokens."""
    num_inputs = num_tokens - 1
    return [
        Piece(document, start, min(start + sequence_length, num_inputs))
        for start in range(0, num_inputs, sequence_length)
    ]


def pack_rows(pieces: Iterable[Piece], sequence_length: int) -> tuple[list[list[Piece]], list[Piece]]:
    """Rows of exactly `sequence_length` inputs, and the pieces of the last, incomplete row."""
    rows: list[list[Piece]] = []
    open_row: list[Piece] = []
    room = sequence_length
    for document, start, stop in pieces:
        if stop - start == sequence_length:
            rows.append([Piece(document, start, stop)])
            continue
        middle = min(stop, start + room)
        open_row.append(Piece(document, start, middle))
        room -= middle - start
        if room == 0:
            rows.append(open_row)
            open_row, room = [], sequence_length
            if middle < stop:
                open_row.append(Piece(document, middle, stop))
                room -= stop - middle
    return rows, open_row


class BatchBuilder:
    """Fills a batch row by row.

    Args:
        num_rows: B.
        sequence_length: T.
        pad_id: input token behind the end of an incomplete row.
    """

    def __init__(self, num_rows: int, sequence_length: int, pad_id: int) -> None:
        shape = num_rows, sequence_length
        self._input_ids = np.full(shape, pad_id, dtype=np.int64)
        self._labels = np.full(shape, IGNORED_LABEL, dtype=np.int64)
        self._document_ids = np.full(shape, -1, dtype=np.int64)
        self._bounds = [0]
        self._num_filled = 0

    def add(self, row: Iterable[Piece], tokens: Mapping[int, np.ndarray], first_id: int = 0) -> None:
        """Put a row behind the ones before; `tokens` has the documents' tokens, end token included, and `first_id` is
        added to their numbers."""
        index, column = self._num_filled, 0
        sequence_length = self._input_ids.shape[1]
        for document, start, stop in row:
            here = slice(column, column + stop - start)
            self._input_ids[index, here] = tokens[document][start:stop]
            self._labels[index, here] = tokens[document][start + 1 : stop + 1]
            self._document_ids[index, here] = first_id + document
            column = here.stop
            self._bounds.append(index * sequence_length + column)
        if column < sequence_length:
            self._bounds.append((index + 1) * sequence_length)
        self._num_filled += 1

    def build(self) -> Batch:
        """The batch; every row must have been filled."""
        assert self._num_filled == len(self._input_ids), (self._num_filled, len(self._input_ids))
        return Batch(
            input_ids=torch.from_numpy(self._input_ids),
            labels=torch.from_numpy(self._labels),
            cu_seqlens=torch.tensor(self._bounds, dtype=torch.int32),
            document_ids=torch.from_numpy(self._document_ids),
        )


def check_sizes(sequence_length: int, rows_per_batch: int) -> None:
    """Raise `ValueError` for rows or batches without a token."""
    if sequence_length < 1 or rows_per_batch < 1:
        raise ValueError(f"sequence_length {sequence_length} and rows_per_batch {rows_per_batch} must be at least 1")
