"""Cutting and packing keep every token once, at any lengths."""

from __future__ import annotations

from collections import Counter

import numpy as np
import pytest
import torch
from hypothesis import given, settings, strategies as st

from nsa.data.stream.packing import BatchBuilder, Piece, cut_document, pack_rows


@settings(max_examples=200, deadline=None)
@given(
    lengths=st.lists(st.integers(0, 40), max_size=12),
    sequence_length=st.integers(1, 12),
)
def test_every_input_is_in_exactly_one_row_or_in_the_rest(lengths: list[int], sequence_length: int) -> None:
    pieces = [piece for doc, length in enumerate(lengths) for piece in cut_document(doc, length, sequence_length)]
    rows, rest = pack_rows(pieces, sequence_length)

    assert all(sum(stop - start for _, start, stop in row) == sequence_length for row in rows)
    assert sum(stop - start for _, start, stop in rest) < sequence_length
    places = Counter((doc, at) for row in [*rows, rest] for doc, start, stop in row for at in range(start, stop))
    assert places == Counter((doc, at) for doc, length in enumerate(lengths) for at in range(length - 1))


def test_full_pieces_stay_whole() -> None:
    pieces = [Piece(0, 0, 3), Piece(1, 0, 8), Piece(2, 0, 6), Piece(3, 0, 8)]
    rows, rest = pack_rows(pieces, 8)
    assert [Piece(1, 0, 8)] in rows
    assert [Piece(3, 0, 8)] in rows
    assert [Piece(0, 0, 3), Piece(2, 0, 5)] in rows
    assert rest == [Piece(2, 5, 6)]


@pytest.mark.parametrize("num_tokens", [0, 1])
def test_a_document_without_a_token_to_predict_has_no_piece(num_tokens: int) -> None:
    assert cut_document(0, num_tokens, 4) == []


def test_pieces_share_one_token_so_that_the_first_of_the_next_is_predicted() -> None:
    tokens = {5: np.arange(100, 107)}
    builder = BatchBuilder(2, 3, pad_id=0)
    for piece in cut_document(5, 7, 3):
        builder.add([piece], tokens)
    batch = builder.build()
    assert batch.input_ids.tolist() == [[100, 101, 102], [103, 104, 105]]
    assert batch.labels.tolist() == [[101, 102, 103], [104, 105, 106]]


def test_an_incomplete_row_is_padded_without_labels_and_as_a_piece_of_its_own() -> None:
    builder = BatchBuilder(2, 4, pad_id=9)
    builder.add([Piece(0, 0, 1), Piece(1, 0, 2)], {0: np.array([1, 2]), 1: np.array([3, 4, 5])})
    builder.add([Piece(1, 0, 2), Piece(0, 0, 1), Piece(0, 0, 1)], {0: np.array([1, 2]), 1: np.array([3, 4, 5])})
    batch = builder.build()
    assert batch.input_ids.tolist() == [[1, 3, 4, 9], [3, 4, 1, 1]]
    assert batch.labels.tolist() == [[2, 4, 5, -100], [4, 5, 2, 2]]
    assert batch.document_ids.tolist() == [[0, 1, 1, -1], [1, 1, 0, 0]]
    assert batch.cu_seqlens.tolist() == [0, 1, 3, 4, 6, 7, 8]
    assert [batch.input_ids.dtype, batch.labels.dtype, batch.document_ids.dtype] == [torch.int64] * 3
    assert batch.cu_seqlens.dtype == torch.int32
