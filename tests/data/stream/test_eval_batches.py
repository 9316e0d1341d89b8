"""Held-out documents are scored whole, and bits per byte are exact."""

from __future__ import annotations

import math
from collections import Counter
from pathlib import Path

import pytest
import torch

from nsa.data import ByteTokenizer, DataConfig, DataError, Document, Documents, build_eval_batches
from nsa.data.stream.eval_batches import EvalBatches

LENGTHS = [1, 45, 2, 7, 130, 8, 0, 61]
SIZES = {"sequence_length": 8, "rows_per_batch": 3}
TEXTS = ["Grüße, 世界! 🙂" * 9, "plain", "x" * 40, "é"]


def byte_batches(**options) -> EvalBatches:
    source = Documents([f"doc{index}" for index in range(len(TEXTS))], TEXTS)
    return EvalBatches(list(source), tokenizer=ByteTokenizer(), **{**SIZES, **options})


def test_every_token_but_each_documents_first_is_a_label_once(
    counting_documents, counting_tokenizer, check_batch
) -> None:
    chosen = [0, 1, 4, 5, 6, 7]
    source = counting_documents(LENGTHS)
    batches = EvalBatches([source[number] for number in chosen], tokenizer=counting_tokenizer, **SIZES)
    for _ in range(2):
        seen = Counter(place for batch in batches for place in check_batch(batch, LENGTHS))
        assert seen == Counter((doc, at) for doc in chosen for at in range(LENGTHS[doc]))
    assert batches.num_labels == seen.total()
    assert batches.document_names == ("doc0", "doc1", "doc4", "doc5", "doc7")
    assert len(batches) == len(list(batches))


def test_bytes_are_those_behind_each_documents_first_byte() -> None:
    batches = byte_batches()
    assert batches.num_bytes == sum(len(text.encode()) - 1 for text in TEXTS)
    assert batches.num_labels == batches.num_bytes + len(TEXTS)


def test_a_uniform_guess_costs_log2_of_the_vocabulary_for_each_label() -> None:
    batches = byte_batches()
    sum_nats = 0.0
    for batch in batches:
        logits = torch.zeros(*batch.labels.shape, ByteTokenizer.vocab_size, dtype=torch.float64)
        loss = torch.nn.functional.cross_entropy(logits.flatten(0, 1), batch.labels.flatten(), reduction="sum")
        sum_nats += loss.item()
    bits_per_byte = sum_nats / math.log(2) / batches.num_bytes
    assert bits_per_byte * batches.num_bytes / batches.num_labels == pytest.approx(math.log2(259), rel=1e-12)


@pytest.mark.parametrize("max_tokens", [1, 8, 40, 100, 10_000])
def test_a_limit_keeps_the_same_rows_and_counts_their_bytes(max_tokens: int) -> None:
    batches = byte_batches(max_tokens=max_tokens)
    labels = [label for batch in batches for label in batch.labels.flatten().tolist() if label != -100]
    assert len(labels) == batches.num_labels <= max(8, max_tokens)
    assert sum(label < 256 for label in labels) == batches.num_bytes
    assert labels == [
        label
        for batch in byte_batches(max_tokens=max_tokens)
        for label in batch.labels.flatten().tolist()
        if label != -100
    ]
    if max_tokens == 10_000:
        assert batches.num_bytes == byte_batches().num_bytes


def test_a_limit_spreads_over_the_documents(counting_documents, counting_tokenizer) -> None:
    source = counting_documents([400] * 10)
    batches = EvalBatches(list(source), tokenizer=counting_tokenizer, **SIZES, max_tokens=400)
    seen = Counter(document for batch in batches for document in batch.document_ids[:, 0].tolist())
    assert seen == Counter(dict.fromkeys(range(10), 5))


def test_messages_are_held_out_by_name() -> None:
    config = DataConfig(heldout=("1790 George Washington", "1985 Ronald Reagan"))
    batches = build_eval_batches(config, tokenizer=ByteTokenizer(), sequence_length=512, rows_per_batch=4)
    assert batches.document_names == ("1790 George Washington", "1985 Ronald Reagan")
    ids = torch.cat([batch.input_ids[batch.labels != -100] for batch in batches])
    assert b"Fellow-Citizens of the Senate" in bytes(ids[ids < 256].tolist())


def test_nothing_to_evaluate_is_an_error(tmp_path: Path) -> None:
    config = DataConfig(heldout=())
    with pytest.raises(DataError, match=r"no document is held out.*data\.heldout"):
        build_eval_batches(config, tokenizer=ByteTokenizer(), **SIZES)
    with pytest.raises(DataError, match="no token to predict"):
        EvalBatches([Document(0, "a", "")], tokenizer=ByteTokenizer(), **SIZES)
