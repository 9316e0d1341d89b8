"""Batches made ahead: the same ones, the state of those handed out, errors and time limits that reach the reader."""

from __future__ import annotations

import gc
import json
import threading
import time
import weakref
from collections.abc import Callable
from dataclasses import fields
from itertools import islice
from pathlib import Path

import pytest
import torch

from nsa.data import (
    Batch,
    ByteTokenizer,
    DataConfig,
    DataError,
    DataTimeoutError,
    Prefetcher,
    TrainingDocuments,
    TrainLoader,
    build_prefetcher,
    build_train_loader,
)
from nsa.data.stream.background import in_background

LENGTHS = [1, 45, 2, 7, 130, 8, 16, 0, 61, 3, 24, 33, 5, 9, 200, 12] * 3
SIZES = {"sequence_length": 8, "rows_per_batch": 2, "seed": 3, "window_tokens": 100}
PATIENCE_S = 30.0


@pytest.fixture
def make_loader(all_of, counting_documents, counting_tokenizer) -> Callable[..., TrainLoader]:
    def build(**options) -> TrainLoader:
        documents = all_of(counting_documents(LENGTHS))
        return TrainLoader(documents, tokenizer=counting_tokenizer, **{**SIZES, **options})

    return build


@pytest.fixture
def prefetched(make_loader):
    def build(**options) -> Prefetcher:
        start = options.pop("start", None)
        return Prefetcher(lambda: make_loader(read_ahead=True, start=start), source="counting", **options)

    return build


class Slow:
    """A loader that gives `count` batches, then does what `then` does."""

    def __init__(self, loader: TrainLoader, count: int, then: Callable[[], None]) -> None:
        self.loader, self.count, self.then = loader, count, then
        self.num_documents, self.close, self.statistics = 1, loader.close, loader.statistics

    def __next__(self) -> Batch:
        if self.count == 0:
            self.then()
        self.count -= 1
        return next(self.loader)

    def state_dict(self) -> dict:
        return self.loader.state_dict()


def assert_equal(batches: list[Batch], others: list[Batch]) -> None:
    for batch, other in zip(batches, others, strict=True):
        for field in fields(Batch):
            assert torch.equal(getattr(batch, field.name), getattr(other, field.name)), field.name


def test_batches_and_states_are_those_of_the_loader(make_loader, prefetched) -> None:
    plain, ahead = make_loader(), prefetched()
    assert ahead.state_dict() == plain.state_dict()
    for _ in range(200):
        assert_equal([next(ahead)], [next(plain)])
        assert (ahead.state_dict(), ahead.epoch) == (plain.state_dict(), plain.epoch)
        assert ahead.statistics()[:2] == plain.statistics()[:2], "behind the batch handed out, not those made ahead"
    assert ahead.num_documents == plain.num_documents == len(LENGTHS)
    assert ahead.fingerprint == plain.fingerprint


@pytest.mark.parametrize("num_batches", [0, 1, 40, 119])
def test_resume_continues_behind_the_batches_handed_out(make_loader, prefetched, num_batches: int) -> None:
    ahead = prefetched(num_batches=5)
    for _ in range(num_batches):
        next(ahead)
    state = json.loads(json.dumps(ahead.state_dict()))
    expected = [next(ahead) for _ in range(60)]
    resumed = prefetched(start=state)
    assert resumed.state_dict() == state
    assert_equal([next(resumed) for _ in range(60)], expected)


def test_a_state_of_other_data_is_refused_at_once(make_loader, prefetched) -> None:
    with pytest.raises(ValueError, match="must be the same to resume"):
        prefetched(start=make_loader(seed=4).state_dict())


def test_no_more_batches_are_made_than_fit(make_loader) -> None:
    loader = Slow(make_loader(), -1, lambda: None)
    ahead = Prefetcher(lambda: loader, source="counting", num_batches=3)
    next(ahead)
    deadline = time.monotonic() + PATIENCE_S
    while loader.count > -6 and time.monotonic() < deadline:
        time.sleep(0.01)
    time.sleep(0.05)
    assert loader.count == -6, "one handed out, three ready, and one that waits for room"


def test_an_error_comes_behind_the_batches_before_it_with_its_cause(make_loader) -> None:
    def fail() -> None:
        raise DataError("line 7 is broken") from OSError("disk")

    ahead = Prefetcher(lambda: Slow(make_loader(), 4, fail), source="counting")
    plain = make_loader()
    assert_equal([next(ahead) for _ in range(4)], [next(plain) for _ in range(4)])
    for _ in range(2):
        with pytest.raises(DataError, match="line 7 is broken") as caught:
            next(ahead)
        assert isinstance(caught.value.__cause__, OSError)


def test_an_error_in_building_is_raised_by_the_constructor(make_loader) -> None:
    with pytest.raises(DataError, match=r"fill \d+ rows of 8 tokens"):
        Prefetcher(lambda: make_loader(rows_per_batch=1000, window_tokens=10**6), source="counting")


def test_a_hung_loader_is_an_error_with_source_and_seconds(make_loader) -> None:
    said: list[str] = []
    hung = threading.Event()
    ahead = Prefetcher(
        lambda: Slow(make_loader(), 2, hung.wait),
        source="counting of owner/corpus",
        stall_timeout_s=0.2,
        notify=said.append,
    )
    next(ahead)
    next(ahead)
    with pytest.raises(
        DataTimeoutError, match=r"a batch of counting of owner/corpus did not come within 0\.2 s.*raise"
    ):
        next(ahead)
    assert said[-1].startswith("waiting for a batch of counting of owner/corpus: ")
    hung.set()


def test_a_first_window_or_batch_that_does_not_come_is_an_error(make_loader) -> None:
    hung = threading.Event()
    with pytest.raises(DataTimeoutError, match=r"the first window of documents of slow did not come within 0\.1 s"):
        Prefetcher(hung.wait, source="slow", first_batch_timeout_s=0.1, notify=lambda line: None)
    ahead = Prefetcher(
        lambda: Slow(make_loader(), 0, hung.wait), source="slow", first_batch_timeout_s=0.5, stall_timeout_s=99
    )
    with pytest.raises(DataTimeoutError, match=r"the first batch of slow did not come within 0\.5 s"):
        next(ahead)
    hung.set()


def test_waiting_is_measured(make_loader, monkeypatch: pytest.MonkeyPatch) -> None:
    ready = threading.Event()
    ahead = Prefetcher(lambda: Slow(make_loader(), 3, ready.wait), source="counting")
    for _ in range(3):
        next(ahead)
    get = ahead._channel.get

    def get_and_make_ready(timeout_s: float):
        threading.Timer(0.2, ready.set).start()
        return get(timeout_s)

    monkeypatch.setattr(ahead._channel, "get", get_and_make_ready)
    next(ahead)
    assert ahead.last_wait_s > 0.19


def test_closing_or_dropping_ends_the_thread(prefetched) -> None:
    closed = prefetched()
    next(closed)
    closed.close()
    closed._thread.join(PATIENCE_S)
    assert not closed._thread.is_alive()
    with pytest.raises(RuntimeError, match="the loader is closed"):
        next(closed)

    dropped = prefetched()
    next(dropped)
    thread, reference = dropped._thread, weakref.ref(dropped)
    del dropped
    gc.collect()
    assert reference() is None
    thread.join(PATIENCE_S)
    assert not thread.is_alive()


def test_no_thread_is_left_when_the_loader_is_gone(counting_documents, counting_tokenizer) -> None:
    """The end of the process takes the same way: threads that outlive the interpreter abort it."""

    class Endless(TrainingDocuments):
        delay_s = 0.0

        def read(self, chunks):
            time.sleep(self.delay_s)
            return super().read(chunks)

    documents = Endless(counting_documents(LENGTHS * 1000), lambda name: False, ())
    documents.chunks_per_read = 1
    loader = TrainLoader(documents, tokenizer=counting_tokenizer, **SIZES | {"window_tokens": 10_000})
    stream = loader._streams[0]
    before = set(threading.enumerate())
    ahead = Prefetcher(lambda: loader, source="counting")
    next(ahead)
    documents.delay_s = 0.01
    stream._ahead = in_background("nsa-data-window", stream._following(stream.window))
    window = stream._ahead.thread
    assert window.is_alive()
    del ahead
    gc.collect()
    assert set(threading.enumerate()) <= before
    assert isinstance(stream._ahead.exception(), RuntimeError)


def test_dropping_waits_for_a_batch_that_is_being_made(make_loader) -> None:
    ahead = Prefetcher(lambda: Slow(make_loader(), 1, lambda: time.sleep(0.5)), source="counting")
    next(ahead)
    thread = ahead._thread
    del ahead
    gc.collect()
    assert not thread.is_alive()


def test_a_config_gives_the_same_stream_with_and_without_prefetching(tmp_path: Path) -> None:
    sizes = {"tokenizer": ByteTokenizer(), "sequence_length": 64, "rows_per_batch": 2, "seed": 1}
    config = DataConfig(source="synthetic", shuffle_window_tokens=10_000, prefetch_batches=2)
    ahead = build_prefetcher(config, **sizes, rank=1, world_size=2)
    plain = build_train_loader(config, **sizes, rank=1, world_size=2)
    assert_equal([next(ahead) for _ in range(150)], [next(plain) for _ in range(150)])
    assert ahead.state_dict() == plain.state_dict()


def test_an_error_of_the_window_made_ahead_reaches_the_reader(
    make_loader, counting_documents, counting_tokenizer
) -> None:
    class Broken(TrainingDocuments):
        def read(self, chunks):
            if len(LENGTHS) - 1 in chunks:
                raise DataError("document 47 is broken")
            return super().read(chunks)

    documents = Broken(counting_documents(LENGTHS), lambda name: False, ())
    documents.chunks_per_read = 4
    ahead = Prefetcher(
        lambda: TrainLoader(documents, tokenizer=counting_tokenizer, read_ahead=True, **SIZES), source="broken"
    )
    with pytest.raises(DataError, match="document 47 is broken"):
        list(islice(ahead, 500))
