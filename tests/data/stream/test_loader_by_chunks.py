"""The stream of a source that is read by chunks keeps the promises of the one in memory."""

from __future__ import annotations

import json
from collections import Counter
from collections.abc import Callable
from dataclasses import fields

import pytest
import torch

from nsa.data import Batch, Document, TrainingDocuments, TrainLoader
from nsa.data.heldout import heldout_rule, name_hash
from nsa.data.sources.chunked import FileChunks

LENGTHS = [1, 45, 2, 7, 130, 8, 16, 0, 61, 3, 24, 33, 5, 9, 200, 12] * 4
CHUNK_SIZES = [5, 1, 9, 3, 7, 2, 12, 4, 8, 6, 7]
SIZES = {"sequence_length": 8, "rows_per_batch": 2, "seed": 3}


class CountingChunks(FileChunks):
    """Documents of `CountingTokenizer` in chunks, and which chunks were read."""

    def __init__(self, lengths: list[int], sizes: list[int]) -> None:
        assert sum(sizes) == len(lengths)
        super().__init__(repr((lengths, sizes)), [], sizes)
        self.lengths, self.sizes, self.was_read = lengths, sizes, []

    def read(self, chunk: int) -> list[Document]:
        self.was_read.append(chunk)
        numbers = range(sum(self.sizes[:chunk]), sum(self.sizes[: chunk + 1]))
        texts = [f"{number} {self.lengths[number]}" for number in numbers]
        return self.numbered(chunk, [f"doc{number}" for number in numbers], texts)


@pytest.fixture
def source() -> CountingChunks:
    return CountingChunks(LENGTHS, CHUNK_SIZES)


@pytest.fixture
def make_loader(source: CountingChunks, counting_tokenizer) -> Callable[..., TrainLoader]:
    def build(chunks=source, heldout=0.0, **options) -> TrainLoader:
        documents = TrainingDocuments(chunks, heldout_rule(chunks, heldout), heldout)
        return TrainLoader(documents, tokenizer=counting_tokenizer, **{"window_tokens": 100, **SIZES, **options})

    return build


def take(loader: TrainLoader, count: int) -> list[Batch]:
    return [next(loader) for _ in range(count)]


def assert_equal(batches: list[Batch], others: list[Batch]) -> None:
    for batch, other in zip(batches, others, strict=True):
        for field in fields(Batch):
            assert torch.equal(getattr(batch, field.name), getattr(other, field.name)), field.name


@pytest.mark.parametrize("window_tokens", [100, 10**6])
@pytest.mark.parametrize("read_ahead", [False, True])
def test_every_token_but_each_documents_first_is_a_label_once_an_epoch(
    make_loader, check_batch, window_tokens: int, read_ahead: bool
) -> None:
    loader = make_loader(rows_per_batch=1, window_tokens=window_tokens, read_ahead=read_ahead)
    seen: Counter[tuple[int, int]] = Counter()
    for epoch in range(3):
        batch = next(loader)
        while loader.epoch == epoch:
            seen.update(check_batch(batch, LENGTHS))
            batch = next(loader)
        carried = loader.state_dict()["carry"]
        open_row = Counter((document, at) for document, start, stop in carried for at in range(start, stop))
        whole = Counter({(doc, at): epoch + 1 for doc, length in enumerate(LENGTHS) for at in range(length)})
        assert seen + open_row == whole
        seen.update(check_batch(batch, LENGTHS))


def test_ranks_share_the_stream_of_one_process(make_loader) -> None:
    whole = make_loader(rows_per_batch=6)
    ranks = [make_loader(rank=rank, world_size=3) for rank in range(3)]
    for _ in range(80):
        parts, batch = [next(rank) for rank in ranks], next(whole)
        assert torch.equal(batch.input_ids, torch.cat([part.input_ids for part in parts]))
        assert len({json.dumps(rank.state_dict()) for rank in ranks}) == 1


@pytest.mark.parametrize("num_batches", [0, 1, 17, 60, 61, 155])
@pytest.mark.parametrize("read_ahead", [False, True])
def test_resume_continues_exactly(make_loader, num_batches: int, read_ahead: bool) -> None:
    loader = make_loader(read_ahead=read_ahead)
    take(loader, num_batches)
    state = json.loads(json.dumps(loader.state_dict()))
    expected = take(loader, 90)
    resumed = make_loader(read_ahead=not read_ahead, start=state)
    assert_equal(take(resumed, 90), expected)
    assert resumed.state_dict() == loader.state_dict()


def test_each_epoch_draws_chunks_and_the_documents_of_a_window(make_loader, source: CountingChunks) -> None:
    """One row for each document shows the order in which documents are taken."""
    lengths = [8] * 64
    orders = []
    for seed in (3, 4):
        loader = make_loader(CountingChunks(lengths, [4] * 16), rows_per_batch=8, window_tokens=64, seed=seed)
        windows = [batch.document_ids[:, 0].tolist() for batch in take(loader, 16)]
        for half in (windows[:8], windows[8:]):
            assert sorted(document for window in half for document in window) == list(range(64))
        orders += [
            [sorted({document // 4 for document in window}) for window in half] for half in (windows[:8], windows[8:])
        ]
    assert len({str(order) for order in orders}) == 4
    assert all(len(chunks) == 2 for order in orders for chunks in order), "a window takes whole chunks"


def test_documents_of_a_window_are_packed_in_drawn_order(make_loader) -> None:
    """Two documents share a row; in the order of the file they would always be neighbours."""
    loader = make_loader(CountingChunks([4] * 64, [64]), rows_per_batch=32, window_tokens=10**6)
    pairs = next(loader).document_ids[:, [0, 7]].tolist()
    assert sum(abs(first - last) == 1 for first, last in pairs) < 8


def test_a_chunk_is_read_once_an_epoch(make_loader, source: CountingChunks) -> None:
    loader = make_loader()
    while loader.epoch == 0:
        next(loader)
    this, following = source.was_read[: len(CHUNK_SIZES)], source.was_read[len(CHUNK_SIZES) :]
    assert sorted(this) == list(range(len(CHUNK_SIZES)))
    assert this != sorted(this)
    assert 0 < len(following) == len(set(following)) < len(CHUNK_SIZES), "the first window of the next epoch"


@pytest.mark.parametrize("heldout", [0.3, ("doc7", "doc1?")])
def test_held_out_documents_are_never_trained_on(make_loader, heldout) -> None:
    loader = make_loader(heldout=heldout)
    seen: set[int] = set()
    while loader.epoch == 0:
        seen |= set(next(loader).document_ids.unique().tolist())
    if heldout == 0.3:
        held = {index for index in range(64) if name_hash(f"doc{index}") < 0.3}
    else:
        held = {7, *range(10, 20)}
    empty = {index for index, length in enumerate(LENGTHS) if length == 0}
    seen |= {document for document, _, _ in loader.state_dict()["carry"]}
    assert set(range(64)) - held - empty <= seen <= set(range(64)) - held


def test_a_state_of_other_chunks_or_held_out_documents_is_refused(make_loader) -> None:
    state = make_loader().state_dict()
    with pytest.raises(ValueError, match="must be the same to resume"):
        make_loader(CountingChunks([9, *LENGTHS[1:]], CHUNK_SIZES), start=state)
    with pytest.raises(ValueError, match="must be the same to resume"):
        make_loader(heldout=0.1, start=state)
