"""Batches made on a thread of their own and kept ready, with limits on how long the training may wait for one.

    loader = build_prefetcher(DataConfig(), tokenizer=ByteTokenizer(), sequence_length=512, rows_per_batch=4, seed=0)
    batch = next(loader)
    state = loader.state_dict()      # behind the batches handed out, whatever is ready beyond them
    loader.close()

A second thread makes the next window of documents while one is given out (`loader.py`). What fails on a thread is
raised by `next`, after the batches that were ready before it. A loader that hangs is an error that names the source and
the seconds; until then a line says every ten seconds what is waited for.
"""

from __future__ import annotations

import threading
import time
import weakref
from collections import deque
from collections.abc import Callable, Mapping
from typing import Any, NamedTuple, Unpack

import torch
from torch import Tensor

from nsa.data.config import DataConfig
from nsa.data.corpus import Corpus, open_corpus
from nsa.data.errors import DataTimeoutError
from nsa.data.mix import MixedCorpus
from nsa.data.progress import EVERY_S, say
from nsa.data.stream.background import HandsOverErrors, join
from nsa.data.stream.loader import StreamOptions, StreamStatistics, TrainLoader, build_train_loader
from nsa.data.stream.packing import Batch


def build_prefetcher(
    config: DataConfig,
    *,
    corpus: Corpus | MixedCorpus | None = None,
    pin_memory_for: torch.device | None = None,
    start: Mapping[str, Any] | None = None,
    **options: Unpack[StreamOptions],
) -> Prefetcher:
    """The stream of `build_train_loader`, made ahead on other threads.

    Args:
        config: source, held-out documents, shuffle and prefetching.
        corpus: the corpus of `config`, where it is open already.
        pin_memory_for: CUDA device that the batches are for; they then lie in pinned memory, so that copies to it can
            run beside the computation (`non_blocking=True`).
        start: as in `build_train_loader`.
        options: what `StreamOptions` lists.

    Raises:
        ValueError: as `build_train_loader`.
        DataError: as `build_train_loader`, or the first window was not ready in time.
    """
    opened = corpus or open_corpus(config)

    def build() -> TrainLoader:
        return build_train_loader(config, corpus=opened, read_ahead=True, start=start, **options)

    is_alone = options.get("world_size", 1) == 1
    return Prefetcher(
        build,
        source=opened.description if is_alone else f"{opened.description}, rank {options.get('rank', 0)}",
        num_batches=config.prefetch_batches,
        first_batch_timeout_s=config.first_batch_timeout_s,
        stall_timeout_s=config.stall_timeout_s,
        pin_memory_for=pin_memory_for if pin_memory_for is not None and pin_memory_for.type == "cuda" else None,
    )


class Prefetcher:
    """An endless iterator of a loader's batches, which another thread makes.

    Args:
        build: makes the loader, on that thread.
        source: what errors and lines call the data.
        num_batches: batches kept ready.
        first_batch_timeout_s: seconds to wait for the loader, and for a first batch, before giving up.
        stall_timeout_s: seconds to wait for any later batch.
        pin_memory_for: CUDA device for which batches are pinned; None leaves them as they are.
        notify: takes the lines about waiting.

    Attributes:
        last_wait_s: seconds that the last `next` waited.

    Raises:
        DataError: whatever `build` raises, or `DataTimeoutError` when it takes too long.
    """

    def __init__(
        self,
        build: Callable[[], TrainLoader],
        *,
        source: str,
        num_batches: int = 8,
        first_batch_timeout_s: float = 600.0,
        stall_timeout_s: float = 300.0,
        pin_memory_for: torch.device | None = None,
        notify: Callable[[str], None] = say,
    ) -> None:
        self._source = source
        self._first_batch_timeout_s, self._stall_timeout_s = first_batch_timeout_s, stall_timeout_s
        self._notify = notify
        self.last_wait_s = 0.0
        # The thread knows the channel and not this object, so that dropping this object, or the end of the process,
        # ends the thread.
        self._channel = _Channel(num_batches)
        arguments = (build, self._channel, pin_memory_for)
        self._thread = threading.Thread(target=_produce, args=arguments, name="nsa-data-batches", daemon=True)
        weakref.finalize(self, _end, self._channel, self._thread)
        self._thread.start()
        self._is_first = True
        first = self._wait("the first window of documents", first_batch_timeout_s)
        self._loader, self._state, self._statistics = first
        weakref.finalize(self, self._loader.close)

    def __iter__(self) -> Prefetcher:
        return self

    def __next__(self) -> Batch:
        start_s = time.perf_counter()
        if self._is_first:
            batch, self._state, self._statistics = self._wait("the first batch", self._first_batch_timeout_s)
        else:
            batch, self._state, self._statistics = self._wait("a batch", self._stall_timeout_s)
        self._is_first = False
        self.last_wait_s = time.perf_counter() - start_s
        return batch

    @property
    def fingerprint(self) -> str:
        """Digest of documents, tokenizer, row length, seed and window: equal streams have equal ones."""
        return self._state["fingerprint"]

    @property
    def epoch(self) -> int:
        """The pass over the documents that the last batch handed out belongs to, from 0."""
        return self._state["epoch"]

    @property
    def num_documents(self) -> int | None:
        """Documents to train on; None where they are not counted."""
        return self._loader.num_documents

    def state_dict(self) -> dict[str, Any]:
        """Where the stream stands after the batches handed out: JSON, equal on all ranks."""
        return self._state

    def statistics(self) -> StreamStatistics:
        """What making the batches handed out has taken."""
        return self._statistics

    def close(self) -> None:
        """End the thread as soon as it has its batch; a batch asked for afterwards is an error."""
        self._channel.close()

    def _wait(self, what: str, timeout_s: float) -> _Made:
        start_s = time.monotonic()
        while True:
            waited_s = time.monotonic() - start_s
            if waited_s >= timeout_s:
                self._channel.given_up = True
                raise DataTimeoutError(
                    f"{what} of {self._source} did not come within {timeout_s:g} s; look whether the source answers, "
                    f"or raise data.first_batch_timeout_s (now {self._first_batch_timeout_s:g}) or "
                    f"data.stall_timeout_s (now {self._stall_timeout_s:g})"
                )
            item = self._channel.get(min(EVERY_S, timeout_s - waited_s))
            if item is not None:
                return item
            self._notify(f"waiting for {what} of {self._source}: {time.monotonic() - start_s:.0f} s")


class _Made(NamedTuple):
    """A batch, or at first the loader, with the loader's state and statistics behind it."""

    what: Any
    state: dict[str, Any]
    statistics: StreamStatistics


class _Channel:
    """A bounded queue between the two threads; what is put behind an error or a close is not read."""

    def __init__(self, capacity: int) -> None:
        self._items: deque[_Made] = deque()
        self._capacity, self._error, self._closed = capacity, None, False
        self.given_up = False  # the thread hangs; do not wait for it
        self._changed = threading.Condition()

    def put(self, item: _Made) -> bool:
        """Wait for room and add; False if nobody will read it."""
        with self._changed:
            self._changed.wait_for(lambda: self._closed or len(self._items) < self._capacity)
            if not self._closed:
                self._items.append(item)
                self._changed.notify_all()
            return not self._closed

    def fail(self, error: BaseException) -> None:
        """Raise `error` in the reader, behind what it has not read yet."""
        with self._changed:
            self._error: BaseException | None = error
            self._changed.notify_all()

    def close(self) -> None:
        """Nothing is read any more."""
        with self._changed:
            self._closed = True
            self._items.clear()
            self._changed.notify_all()

    def get(self, timeout_s: float) -> _Made | None:
        """The next item, or None when none has come in time."""
        with self._changed:
            self._changed.wait_for(lambda: self._items or self._error or self._closed, timeout_s)
            if self._items:
                item = self._items.popleft()
                self._changed.notify_all()
                return item
            if self._error:
                raise self._error
            if self._closed:
                raise RuntimeError("the loader is closed; it gives no more batches")
            return None


def _end(channel: _Channel, thread: threading.Thread) -> None:
    channel.close()
    if not channel.given_up:
        join(thread)


def _produce(build: Callable[[], TrainLoader], channel: _Channel, pin_memory_for: torch.device | None) -> None:
    with HandsOverErrors(channel.fail):
        if pin_memory_for is not None:
            torch.cuda.set_device(pin_memory_for)
        loader = build()
        wanted = channel.put(_Made(loader, loader.state_dict(), loader.statistics()))
        while wanted:
            batch = next(loader)
            batch = batch if pin_memory_for is None else batch.map(Tensor.pin_memory)
            wanted = channel.put(_Made(batch, loader.state_dict(), loader.statistics()))
