"""The training stream: exact epochs, determinism, shares of ranks, and resume at any batch."""

from __future__ import annotations

import json
from collections import Counter
from collections.abc import Sequence
from dataclasses import fields
from pathlib import Path

import pytest
import torch

from nsa.data import (
    Batch,
    ByteTokenizer,
    DataConfig,
    DataError,
    Document,
    Documents,
    TrainingDocuments,
    TrainLoader,
    build_train_loader,
)

LENGTHS = [1, 45, 2, 7, 130, 8, 16, 0, 61, 3, 24, 33, 5, 9, 200, 12] * 3
SIZES = {"sequence_length": 8, "rows_per_batch": 2, "seed": 3}
ONE_WINDOW, MANY_WINDOWS = 10**6, 100


@pytest.fixture
def make_loader(counting_documents, counting_tokenizer):
    def build(lengths=LENGTHS, documents=None, **options) -> TrainLoader:
        chosen = {f"doc{number}" for number in (range(len(lengths)) if documents is None else documents)}
        training = TrainingDocuments(counting_documents(lengths), lambda name: name not in chosen, ())
        return TrainLoader(training, tokenizer=counting_tokenizer, **{**SIZES, **options})

    return build


def take(loader: TrainLoader, count: int) -> list[Batch]:
    return [next(loader) for _ in range(count)]


def assert_equal(batches: list[Batch], others: list[Batch]) -> None:
    assert len(batches) == len(others)
    for batch, other in zip(batches, others, strict=True):
        for field in fields(Batch):
            assert torch.equal(getattr(batch, field.name), getattr(other, field.name)), field.name


@pytest.mark.parametrize("window_tokens", [ONE_WINDOW, MANY_WINDOWS])
@pytest.mark.parametrize("sequence_length", [1, 8, 31])
def test_every_token_but_each_documents_first_is_a_label_once_an_epoch(
    make_loader, check_batch, window_tokens: int, sequence_length: int
) -> None:
    loader = make_loader(rows_per_batch=1, window_tokens=window_tokens, sequence_length=sequence_length)
    seen: Counter[tuple[int, int]] = Counter()
    for epoch in range(3):
        batch = next(loader)
        while loader.epoch == epoch:
            seen.update(check_batch(batch, LENGTHS))
            batch = next(loader)
        carried = loader.state_dict()["carry"]
        assert sum(stop - start for _, start, stop in carried) < sequence_length
        open_row = Counter((document, at) for document, start, stop in carried for at in range(start, stop))
        whole = Counter({(doc, at): epoch + 1 for doc, length in enumerate(LENGTHS) for at in range(length)})
        assert seen + open_row == whole
        seen.update(check_batch(batch, LENGTHS))


def test_the_stream_depends_on_the_seed_alone(make_loader) -> None:
    assert_equal(take(make_loader(), 300), take(make_loader(), 300))
    assert not torch.equal(next(make_loader(seed=3)).input_ids, next(make_loader(seed=4)).input_ids)


def test_every_epoch_has_an_order_of_documents(make_loader) -> None:
    """Windows of 32 documents: which are in the first one is drawn anew."""
    loader = make_loader(lengths=[8] * 128, rows_per_batch=32, window_tokens=256)
    windows = [sorted(batch.document_ids[:, 0].tolist()) for batch in take(loader, 8)]
    for epoch in (windows[:4], windows[4:]):
        assert sorted(document for window in epoch for document in window) == list(range(128))
    assert windows[0] != windows[4]
    other_seed = make_loader(lengths=[8] * 128, rows_per_batch=32, window_tokens=256, seed=4)
    assert sorted(next(other_seed).document_ids[:, 0].tolist()) != windows[0]


def test_every_epoch_has_an_order_of_rows(make_loader) -> None:
    """One document: only its rows can be shuffled."""
    first, second = take(make_loader(lengths=[8 * 64], rows_per_batch=64), 2)
    assert first.input_ids.tolist() != second.input_ids.tolist()
    assert sorted(first.input_ids.tolist()) == sorted(second.input_ids.tolist())
    other_seed = next(make_loader(lengths=[8 * 64], rows_per_batch=64, seed=4))
    assert other_seed.input_ids.tolist() != first.input_ids.tolist()


def test_a_batch_mixes_documents_that_fill_many_rows(make_loader) -> None:
    batch = next(make_loader(lengths=[800] * 20, rows_per_batch=16))
    assert len(batch.document_ids.unique()) > 8


@pytest.mark.parametrize("window_tokens", [ONE_WINDOW, MANY_WINDOWS])
def test_ranks_share_the_stream_of_one_process(make_loader, window_tokens: int) -> None:
    whole = make_loader(rows_per_batch=6, window_tokens=window_tokens)
    ranks = [make_loader(window_tokens=window_tokens, rank=rank, world_size=3) for rank in range(3)]
    for _ in range(80):
        parts = [next(rank) for rank in ranks]
        batch = next(whole)
        for name in ("input_ids", "labels", "document_ids"):
            assert torch.equal(getattr(batch, name), torch.cat([getattr(part, name) for part in parts]))
        assert len({json.dumps(rank.state_dict()) for rank in ranks}) == 1


@pytest.mark.parametrize("window_tokens", [ONE_WINDOW, MANY_WINDOWS])
@pytest.mark.parametrize("num_batches", [0, 1, 17, 118, 119, 120, 250])
def test_resume_continues_exactly(make_loader, window_tokens: int, num_batches: int) -> None:
    loader = make_loader(window_tokens=window_tokens)
    take(loader, num_batches)
    state = json.loads(json.dumps(loader.state_dict()))
    expected = take(loader, 150)

    resumed = make_loader(window_tokens=window_tokens, start=state)
    assert_equal(take(resumed, 150), expected)
    assert resumed.state_dict() == loader.state_dict()


def test_resume_with_another_number_of_ranks_continues_the_stream(make_loader) -> None:
    loader = make_loader(rows_per_batch=4)
    take(loader, 30)
    state = loader.state_dict()
    ranks = [make_loader(rank=rank, world_size=2, start=state) for rank in range(2)]
    assert torch.equal(torch.cat([next(rank).input_ids for rank in ranks]), next(loader).input_ids)


@pytest.mark.parametrize(
    "change",
    [
        {"seed": 4},
        {"sequence_length": 9},
        {"window_tokens": 999},
        {"documents": [1, 4, 8]},
        {"lengths": [9, *LENGTHS[1:]]},
    ],
)
def test_a_state_of_other_data_is_refused(make_loader, change: dict) -> None:
    state = make_loader().state_dict()
    with pytest.raises(ValueError, match="must be the same to resume"):
        make_loader(**change, start=state)


def test_only_the_given_documents_are_trained_on(make_loader) -> None:
    loader = make_loader(documents=[4, 8, 14])
    seen = {document for batch in take(loader, 200) for document in batch.document_ids.unique().tolist()}
    assert seen == {4, 8, 14}


def test_held_out_messages_are_never_trained_on() -> None:
    config = DataConfig(heldout=("179? *", "1985 Ronald Reagan"))
    loader = build_train_loader(config, tokenizer=ByteTokenizer(), sequence_length=4096, rows_per_batch=32, seed=0)
    assert loader.num_documents == 249 - 12
    while loader.epoch == 0:
        assert not set(next(loader).document_ids.unique().tolist()) & {*range(11), 214}


def test_random_text_comes_through_unchanged(tmp_path: Path) -> None:
    letters = torch.randint(33, 127, (4000,), generator=torch.Generator().manual_seed(0)).tolist()
    (tmp_path / "a.txt").write_bytes(bytes(letters))
    (tmp_path / "b.txt").write_text("held out", encoding="utf-8")
    config = DataConfig(source="text", paths=(str(tmp_path),), heldout=("b.txt",))
    loader = build_train_loader(config, tokenizer=ByteTokenizer(), sequence_length=4000, rows_per_batch=1, seed=0)
    batch = next(loader)
    assert batch.input_ids.tolist() == [letters]
    assert batch.labels.tolist() == [[*letters[1:], ByteTokenizer.eos_id]]


def test_too_little_text_for_a_batch_names_the_numbers(make_loader) -> None:
    with pytest.raises(DataError, match=r"the 2 training documents fill 3 rows of 8 tokens, but .* takes 4"):
        make_loader(lengths=[20, 9], world_size=2)
    with pytest.raises(DataError, match="fill 0 rows"):
        make_loader(lengths=[0, 0, 0])
    with pytest.raises(DataError, match="fill 0 rows"):
        make_loader(lengths=[0] * 100, window_tokens=16)


def test_impossible_sizes_are_refused(make_loader) -> None:
    with pytest.raises(ValueError, match=r"rank must be 0\.\.1"):
        make_loader(rank=2, world_size=2)
    with pytest.raises(ValueError, match="sequence_length 0"):
        make_loader(sequence_length=0)
    with pytest.raises(ValueError, match=r"shuffle_window_tokens is 15 .* takes 16"):
        make_loader(window_tokens=15)


def test_a_window_holds_no_more_documents_than_it_needs(all_of, counting_tokenizer) -> None:
    read: list[int] = []

    class Recording(Documents):
        def read(self, chunk: int) -> Sequence[Document]:
            read.append(chunk)
            return super().read(chunk)

    source = Recording([str(index) for index in range(1000)], [f"{index} 50" for index in range(1000)])
    loader = TrainLoader(all_of(source), tokenizer=counting_tokenizer, **SIZES, window_tokens=1000)
    read.clear()
    for _ in range(400):
        next(loader)
    assert 0 < len(read) <= 400


@pytest.mark.parametrize("epoch", [0, 1])
def test_a_loader_that_starts_further_on_reads_the_window_there_alone(all_of, counting_tokenizer, epoch: int) -> None:
    read: list[int] = []

    class Recording(Documents):
        def read(self, chunk: int) -> Sequence[Document]:
            read.append(chunk)
            return super().read(chunk)

        def read_names(self, chunk: int) -> Sequence[str]:
            return [str(chunk)]

    def build(**options) -> TrainLoader:
        source = Recording([str(index) for index in range(400)], [f"{index} 50" for index in range(400)])
        return TrainLoader(all_of(source), tokenizer=counting_tokenizer, **SIZES, window_tokens=1000, **options)

    loader = build()
    while loader.epoch < epoch or loader.state_dict()["first"] < 200:
        next(loader)
    read.clear()
    resumed = build(start=loader.state_dict())
    assert 0 < len(read) < 2 * 32 + 2, "a window of two chunks, and the documents that are carried over"
    assert_equal(take(resumed, 100), take(loader, 100))


def test_a_loader_may_start_in_a_last_window_that_is_smaller_than_a_batch(make_loader) -> None:
    options = {"lengths": [9] * 33, "window_tokens": 100}  # 32 documents, then one
    loader = make_loader(**options)
    while loader.state_dict()["first"] == 0:
        next(loader)
    state = loader.state_dict()
    assert len(loader._streams[0].window.rows) < SIZES["rows_per_batch"]
    assert make_loader(**options, start=state).state_dict() == state
