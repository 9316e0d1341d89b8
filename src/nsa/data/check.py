"""A run of the loader alone: what comes out of it, how fast, and how long a training step would wait for it.

    result = check_data(DataConfig(), sequence_length=512, rows_per_batch=8, seed=0, num_batches=200)
    print(result.tokens_per_s, result.fetch_p95_ms)

Batches are asked for one after the other without any work between them, so the waits are the longest that training can
meet.
"""

from __future__ import annotations

import os
import time
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any, NamedTuple

import numpy as np

from nsa.data.config import DataConfig
from nsa.data.corpus import open_corpus
from nsa.data.stream.loader import StreamStatistics, build_eval_batches
from nsa.data.stream.prefetch import Prefetcher, build_prefetcher
from nsa.data.tokenizers import load_tokenizer
from nsa.loss import IGNORED_LABEL


@dataclass(frozen=True)
class DataCheck:
    """What a loader-only run found; times in seconds or milliseconds as the names say."""

    index: dict[str, Any]
    """What the corpus is, as in a run's `data_index.json`."""
    tokenizer: str
    vocab_size: int
    stream_fingerprint: str
    """Digest of documents, tokenizer, row length, seed and window."""
    num_training_documents: int | None
    """None where documents are read during the run and not counted."""
    num_heldout_documents: int
    """Held-out documents that an evaluation scores."""
    num_heldout_tokens: int
    open_s: float
    """Opening source and tokenizer, downloads included."""
    first_batch_s: float
    """From then to the first batch."""
    num_batches: int
    """Batches timed, behind the first."""
    tokens: int
    """Input tokens in them, padding included."""
    wall_s: float
    tokens_per_s: float
    """What the loader sustains: the slower of the two stages, which run side by side."""
    window_tokens_per_s: float
    """Reading, tokenizing and packing whole windows of documents."""
    batch_tokens_per_s: float
    """Handing out batches of windows, as measured; faster than the first stage until the first window is used up."""
    fetch_p50_ms: float
    fetch_p95_ms: float
    fetch_max_ms: float
    epochs: int
    """Whole passes over the documents that the run came through."""
    epoch_tokens: int | None
    """Input tokens of an epoch, where they are known."""
    padding_share: float
    """Share of the positions that no label stands at."""
    num_documents_seen: int
    pieces_per_row: float
    num_cpus: int
    load_1min: float
    """The machine's load when the run began; beyond the CPUs, others take time from it."""


def check_data(
    config: DataConfig,
    *,
    sequence_length: int,
    rows_per_batch: int,
    seed: int,
    num_batches: int,
    advance: Callable[[int], None] = lambda done: None,
) -> DataCheck:
    """Open everything that a run would, and take batches as fast as they come.

    Args:
        config: the data section of a run.
        sequence_length: T, tokens in a row.
        rows_per_batch: rows of a batch.
        seed: of the order.
        num_batches: batches to time, behind the first.
        advance: is told the number of batches done.

    Raises:
        DataError: the data cannot be used.
    """
    load_1min, start_s = os.getloadavg()[0], time.perf_counter()
    tokenizer = load_tokenizer(config.tokenizer)
    corpus = open_corpus(config)
    open_s = time.perf_counter() - start_s
    rows = {"tokenizer": tokenizer, "sequence_length": sequence_length, "rows_per_batch": rows_per_batch}
    heldout = build_eval_batches(config, corpus=corpus, **rows) if corpus.heldout else None
    start_s = time.perf_counter()
    loader = build_prefetcher(config, corpus=corpus, seed=seed, **rows)
    next(loader)
    first_batch_s = time.perf_counter() - start_s
    taken = _take(loader, num_batches, advance)
    loader.close()
    return DataCheck(
        index=corpus.index(),
        tokenizer=tokenizer.name,
        vocab_size=tokenizer.vocab_size,
        stream_fingerprint=loader.fingerprint,
        num_training_documents=corpus.num_training_documents,
        num_heldout_documents=len(heldout.document_names) if heldout else 0,
        num_heldout_tokens=heldout.num_labels if heldout else 0,
        open_s=open_s,
        first_batch_s=first_batch_s,
        epochs=loader.epoch,
        num_cpus=os.cpu_count() or 1,
        load_1min=load_1min,
        **_figures(taken, loader.statistics(), rows_per_batch, sequence_length),
    )


class _Taken(NamedTuple):
    """What was seen of the batches that were timed."""

    wall_s: float
    waits_s: list[float]
    num_padding: int
    num_pieces: int
    documents: set[int]


def _take(loader: Prefetcher, num_batches: int, advance: Callable[[int], None]) -> _Taken:
    waits_s: list[float] = []
    num_padding = num_pieces = 0
    documents: set[int] = set()
    start_s = time.perf_counter()
    for done in range(1, num_batches + 1):
        batch = next(loader)
        assert batch.document_ids is not None
        waits_s.append(loader.last_wait_s)
        num_padding += int((batch.labels == IGNORED_LABEL).sum())
        num_pieces += len(batch.piece_lengths)
        documents.update(np.unique(batch.document_ids.numpy()).tolist())
        advance(done)
    return _Taken(time.perf_counter() - start_s, waits_s, num_padding, num_pieces, documents - {-1})


def _figures(taken: _Taken, statistics: StreamStatistics, rows_per_batch: int, sequence_length: int) -> dict[str, Any]:
    """What the batches that were taken say of speed and packing, as fields of `DataCheck`."""
    num_batches = len(taken.waits_s)
    tokens = num_batches * rows_per_batch * sequence_length
    window_tokens_per_s = statistics.prepared_tokens / statistics.prepare_s
    return {
        "num_batches": num_batches,
        "tokens": tokens,
        "wall_s": taken.wall_s,
        "tokens_per_s": min(window_tokens_per_s, tokens / taken.wall_s),
        "window_tokens_per_s": window_tokens_per_s,
        "batch_tokens_per_s": tokens / taken.wall_s,
        "fetch_p50_ms": 1000 * float(np.percentile(taken.waits_s, 50)),
        "fetch_p95_ms": 1000 * float(np.percentile(taken.waits_s, 95)),
        "fetch_max_ms": 1000 * max(taken.waits_s),
        "epoch_tokens": statistics.epoch_tokens,
        "padding_share": taken.num_padding / tokens,
        "num_documents_seen": len(taken.documents),
        "pieces_per_row": taken.num_pieces / (num_batches * rows_per_batch),
    }
