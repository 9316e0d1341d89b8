"""The training stream and the evaluation batches of one run.

The documents of an epoch come in an order drawn from (seed, epoch). They are taken a window at a time, tokenized, cut
and packed into rows (`packing.py`), and the window's rows are shuffled, so that a batch mixes many documents even where
one document fills eighty rows. What does not fill the window's last row opens the next window. The stream of rows does
not depend on the number of ranks: of each world_size * rows_per_batch rows, rank r takes the r-th rows_per_batch ones.

    >>> sizes = dict(sequence_length=512, rows_per_batch=4)
    >>> loader = build_train_loader(DataConfig(), tokenizer=ByteTokenizer(), seed=0, **sizes)
    >>> next(loader).input_ids.shape
    torch.Size([4, 512])
    >>> state = loader.state_dict()          # a small JSON object, the same on all ranks
"""

from __future__ import annotations

import hashlib
import math
from collections.abc import Iterator, Mapping, Sequence
from typing import Any

import numpy as np

from nsa.data.config import DataConfig
from nsa.data.errors import DataError
from nsa.data.heldout import split_documents
from nsa.data.packing import Batch, BatchBuilder, Piece, cut_document, pack_rows
from nsa.data.sources import Source, open_source
from nsa.data.tokenizers import Tokenizer

ENCODE_CHUNK = 32


def build_train_loader(
    config: DataConfig,
    *,
    tokenizer: Tokenizer,
    sequence_length: int,
    rows_per_batch: int,
    seed: int,
    rank: int = 0,
    world_size: int = 1,
) -> TrainLoader:
    """The endless training stream of `config`'s documents, without the held-out ones.

    Args:
        config: source, held-out documents and shuffle.
        tokenizer: of the model.
        sequence_length: T, input tokens in a row.
        rows_per_batch: B, rows of this rank in a batch.
        seed: of the order of documents and rows.
        rank: which of the `world_size` disjoint shares.
        world_size: shares in all.

    Raises:
        DataError: the source is missing or malformed, the held-out documents do not fit it, or an epoch has too few
            tokens for one batch of all ranks.
    """
    source = open_source(config)
    documents, _ = split_documents(source, config.heldout)
    return TrainLoader(
        source,
        documents,
        tokenizer=tokenizer,
        sequence_length=sequence_length,
        rows_per_batch=rows_per_batch,
        seed=seed,
        rank=rank,
        world_size=world_size,
        window_tokens=config.shuffle_window_tokens,
    )


def build_eval_batches(
    config: DataConfig, *, tokenizer: Tokenizer, sequence_length: int, rows_per_batch: int
) -> EvalBatches:
    """The held-out documents of `config`, for exact loss, perplexity and bits per byte; see `EvalBatches`.

    Raises:
        DataError: the source is missing or malformed, or no document is held out.
    """
    source = open_source(config)
    _, documents = split_documents(source, config.heldout)
    return EvalBatches(
        source,
        documents,
        tokenizer=tokenizer,
        sequence_length=sequence_length,
        rows_per_batch=rows_per_batch,
        max_tokens=config.max_eval_tokens,
    )


class TrainLoader:
    """An endless iterator of `Batch`es that can be stopped and continued at any batch.

    Every label of the documents (each token but a document's first) comes exactly once in an epoch; only the last
    row of an epoch, where it is incomplete, is filled up with the next epoch's tokens.

    Args:
        source: where the texts are.
        documents: indices of the training documents.
        window_tokens: rows are shuffled among this many tokens, which are in memory at a time.
        tokenizer, sequence_length, rows_per_batch, seed, rank, world_size: as in `build_train_loader`.

    Raises:
        DataError: an epoch has too few tokens for one batch of all ranks.
    """

    def __init__(
        self,
        source: Source,
        documents: Sequence[int],
        *,
        tokenizer: Tokenizer,
        sequence_length: int,
        rows_per_batch: int,
        seed: int,
        rank: int = 0,
        world_size: int = 1,
        window_tokens: int = 2**24,
    ) -> None:
        _check_sizes(sequence_length, rows_per_batch)
        if not 0 <= rank < world_size:
            raise ValueError(f"rank must be 0..{world_size - 1} for world_size {world_size}, not {rank}")
        self._source, self._documents, self._tokenizer = source, np.asarray(documents, dtype=np.int64), tokenizer
        self._sequence_length, self._rows_per_batch, self._seed = sequence_length, rows_per_batch, seed
        self._rank, self._world_size, self._window_tokens = rank, world_size, window_tokens
        self._tokens: dict[int, np.ndarray] = {}
        identity = (source.fingerprint, list(documents), tokenizer.name, tokenizer.vocab_size, tokenizer.eos_id)
        settings = (sequence_length, seed, window_tokens)
        self._fingerprint = hashlib.blake2b(repr((identity, settings)).encode(), digest_size=16).hexdigest()
        self._open_window(epoch=0, first=0, carry=[])
        self._check_enough()

    def __iter__(self) -> TrainLoader:
        return self

    def __next__(self) -> Batch:
        builder = BatchBuilder(self._rows_per_batch, self._sequence_length, self._tokenizer.eos_id)
        for index in range(self._rows_per_batch * self._world_size):
            while self._row == len(self._rows):
                self._next_window()
            if index // self._rows_per_batch == self._rank:
                builder.add(self._rows[self._row], self._tokens)
            self._row += 1
        return builder.build()

    @property
    def epoch(self) -> int:
        """The pass over the documents that the open window belongs to, from 0."""
        return self._epoch

    @property
    def num_documents(self) -> int:
        return len(self._documents)

    def state_dict(self) -> dict[str, Any]:
        """Where the stream stands after the batches given so far: JSON, equal on all ranks."""
        return {
            "epoch": self._epoch,
            "first": self._first,
            "carry": [list(piece) for piece in self._carry],
            "row": self._row,
            "fingerprint": self._fingerprint,
        }

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """Continue exactly where `state_dict` was taken; the number of ranks may differ.

        Raises:
            ValueError: the state belongs to other documents, another tokenizer, row length, seed or window.
        """
        if state["fingerprint"] != self._fingerprint:
            raise ValueError(
                f"the loader's state is of other data ({state['fingerprint']}, here {self._fingerprint}): documents, "
                f"held-out documents, tokenizer, sequence length, seed and shuffle window must be the same to resume"
            )
        self._open_window(state["epoch"], state["first"], [Piece(*piece) for piece in state["carry"]])
        self._row = int(state["row"])

    def _next_window(self) -> None:
        at_end = self._next_first == len(self._documents)
        self._open_window(self._epoch + at_end, 0 if at_end else self._next_first, self._rest)

    def _open_window(self, epoch: int, first: int, carry: list[Piece]) -> None:
        """Pack the documents from place `first` of the epoch's order on, behind the pieces carried over."""
        order = np.random.default_rng((self._seed, epoch)).permutation(self._documents)
        kept: dict[int, np.ndarray] = {}
        self._encode(sorted({piece.document for piece in carry}), kept)
        pieces, place, num_inputs = list(carry), first, 0
        while place < len(order) and num_inputs < self._window_tokens:
            chunk = order[place : place + ENCODE_CHUNK].tolist()
            self._encode(chunk, kept)
            for document in chunk:
                pieces += cut_document(document, len(kept[document]), self._sequence_length)
                num_inputs += len(kept[document]) - 1
            place += len(chunk)
        rows, self._rest = pack_rows(pieces, self._sequence_length)
        shuffled = np.random.default_rng((self._seed, epoch, first)).permutation(len(rows))
        self._rows = [rows[index] for index in shuffled]
        self._row, self._epoch, self._first, self._next_first = 0, epoch, first, place
        self._carry, self._tokens = carry, kept

    def _encode(self, documents: Sequence[int], kept: dict[int, np.ndarray]) -> None:
        """Put the tokens of `documents` into `kept`, from the window before where they are there."""
        missing = [document for document in documents if document not in self._tokens and document not in kept]
        kept.update(_encode_documents(self._source, missing, self._tokenizer))
        kept.update((document, self._tokens[document]) for document in documents if document in self._tokens)

    def _check_enough(self) -> None:
        needed = self._rows_per_batch * self._world_size
        if self._window_tokens < needed * self._sequence_length:
            raise ValueError(
                f"data.shuffle_window_tokens is {self._window_tokens} but one batch of all ranks takes "
                f"{needed * self._sequence_length}; raise it"
            )
        whole_epoch = self._next_first == len(self._documents)
        if whole_epoch and len(self._rows) < needed:
            raise DataError(
                f"the {self.num_documents} training documents fill {len(self._rows)} rows of {self._sequence_length} "
                f"tokens, but one batch of all ranks takes {needed}; use shorter rows, fewer rows or more text"
            )


class EvalBatches:
    """Held-out documents as batches: the same ones at every iteration, and what it takes for exact bits per byte.

    Every token but a document's first is a label exactly once, `num_labels` in all. Bits per byte are the sum of
    -ln p over all labels / ln 2 / `num_bytes`, where `num_bytes` are the UTF-8 bytes of text that the labels stand for.
    A document's first token is not predicted, so its bytes do not count; its end is predicted, so its nats do, and it
    adds no byte. Whole documents as bytes thus have num_labels = num_bytes + the number of documents, and a uniform
    guess among V tokens costs log2(V) bits for each label.

    Args:
        source: where the texts are.
        documents: indices of the held-out documents.
        max_tokens: keep about this many tokens (at least one row), whole rows spread evenly over the documents.
        tokenizer, sequence_length, rows_per_batch: as in `build_train_loader`; the last batch may have fewer rows.

    Raises:
        DataError: there is no document, or nothing to predict in them.
    """

    def __init__(
        self,
        source: Source,
        documents: Sequence[int],
        *,
        tokenizer: Tokenizer,
        sequence_length: int,
        rows_per_batch: int,
        max_tokens: int | None = None,
    ) -> None:
        _check_sizes(sequence_length, rows_per_batch)
        if not documents:
            raise DataError("no document is held out, so there is nothing to evaluate on; set data.heldout")
        self._tokens = _encode_documents(source, documents, tokenizer)
        pieces = [p for d in documents for p in cut_document(d, len(self._tokens[d]), sequence_length)]
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
        self.document_names = tuple(source.name(index) for index in sorted({piece.document for piece in kept}))
        self.num_labels = sum(piece.stop - piece.start for piece in kept)
        self.num_bytes = self._count_bytes(source, kept, tokenizer)

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

    def _count_bytes(self, source: Source, pieces: Sequence[Piece], tokenizer: Tokenizer) -> int:
        """UTF-8 bytes of the labels; the end-of-text token, last of each document, has none."""
        total = 0
        ends: dict[int, np.ndarray] = {}
        for document, start, stop in pieces:
            if document not in ends:
                text_ends = tokenizer.token_ends(source.text(document))
                ends[document] = np.append(text_ends, text_ends[-1:])
            total += int(ends[document][stop] - ends[document][start])
        return total


def _check_sizes(sequence_length: int, rows_per_batch: int) -> None:
    if sequence_length < 1 or rows_per_batch < 1:
        raise ValueError(f"sequence_length {sequence_length} and rows_per_batch {rows_per_batch} must be at least 1")


def _encode_documents(source: Source, documents: Sequence[int], tokenizer: Tokenizer) -> dict[int, np.ndarray]:
    """Tokens of each document with the end token, in the smallest dtype that holds the vocabulary."""
    dtype = np.uint16 if tokenizer.vocab_size <= 2**16 else np.uint32
    encoded = tokenizer.encode_batch([source.text(document) for document in documents])
    return {
        document: np.append(ids.astype(dtype), dtype(tokenizer.eos_id))
        for document, ids in zip(documents, encoded, strict=True)
    }
