"""The training stream and the evaluation batches of one run.

The documents of an epoch come in an order drawn from (seed, epoch). They are taken a window at a time, tokenized, cut
and packed into rows, and the window's rows are shuffled (`windows.py`), so that a batch mixes many documents even where
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
from collections.abc import Callable, Mapping
from typing import Any

from nsa.data.background import BackgroundFuture, in_background, join
from nsa.data.config import DataConfig
from nsa.data.corpus import Corpus, open_corpus
from nsa.data.errors import DataError
from nsa.data.eval_batches import EvalBatches
from nsa.data.packing import Batch, BatchBuilder, Piece, check_sizes
from nsa.data.tokenizers import Tokenizer
from nsa.data.windows import TrainingDocuments, Window, WindowReader


def build_train_loader(
    config: DataConfig,
    *,
    tokenizer: Tokenizer,
    sequence_length: int,
    rows_per_batch: int,
    seed: int,
    rank: int = 0,
    world_size: int = 1,
    corpus: Corpus | None = None,
    read_ahead: bool = False,
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
        corpus: the corpus of `config`, where it is open already.
        read_ahead: make the next window on another thread while one is given out.

    Raises:
        DataError: the source is missing or malformed, the held-out documents do not fit it, or an epoch has too few
            tokens for one batch of all ranks.
    """
    return TrainLoader(
        (corpus or open_corpus(config)).training_documents(),
        tokenizer=tokenizer,
        sequence_length=sequence_length,
        rows_per_batch=rows_per_batch,
        seed=seed,
        rank=rank,
        world_size=world_size,
        window_tokens=config.shuffle_window_tokens,
        read_ahead=read_ahead,
    )


def build_eval_batches(
    config: DataConfig,
    *,
    tokenizer: Tokenizer,
    sequence_length: int,
    rows_per_batch: int,
    corpus: Corpus | None = None,
) -> EvalBatches:
    """The held-out documents of `config`, for exact loss, perplexity and bits per byte; see `EvalBatches`.

    Raises:
        DataError: the source is missing or malformed, or no document is held out.
    """
    corpus = corpus or open_corpus(config)
    source, documents = corpus.heldout_documents(tokenizer)
    return EvalBatches(
        source,
        documents,
        tokenizer=tokenizer,
        sequence_length=sequence_length,
        rows_per_batch=rows_per_batch,
        max_tokens=corpus.max_eval_tokens,
    )


class TrainLoader:
    """An endless iterator of `Batch`es that can be stopped and continued at any batch.

    Every label of the documents (each token but a document's first) comes exactly once in an epoch; only the last
    row of an epoch, where it is incomplete, is filled up with the next epoch's tokens.

    Args:
        documents: what to train on.
        window_tokens: rows are shuffled among this many tokens, which are in memory at a time.
        read_ahead: make the next window on another thread while one is given out; two are then in memory.
        tokenizer, sequence_length, rows_per_batch, seed, rank, world_size: as in `build_train_loader`.

    Attributes:
        prepared_tokens: tokens of all windows opened so far.
        prepare_s: seconds that making those windows took.

    Raises:
        DataError: an epoch has too few tokens for one batch of all ranks.
    """

    def __init__(
        self,
        documents: TrainingDocuments,
        *,
        tokenizer: Tokenizer,
        sequence_length: int,
        rows_per_batch: int,
        seed: int,
        rank: int = 0,
        world_size: int = 1,
        window_tokens: int = 2**24,
        read_ahead: bool = False,
    ) -> None:
        check_sizes(sequence_length, rows_per_batch)
        if not 0 <= rank < world_size:
            raise ValueError(f"rank must be 0..{world_size - 1} for world_size {world_size}, not {rank}")
        self._documents, self._eos_id = documents, tokenizer.eos_id
        self._sequence_length, self._rows_per_batch = sequence_length, rows_per_batch
        self._rank, self._world_size, self._read_ahead = rank, world_size, read_ahead
        identity = (*documents.identity, tokenizer.name, tokenizer.vocab_size, tokenizer.eos_id)
        settings = (sequence_length, seed, window_tokens)
        self._fingerprint = hashlib.blake2b(repr((identity, settings)).encode(), digest_size=16).hexdigest()
        self._reader = WindowReader(
            documents, tokenizer, sequence_length=sequence_length, seed=seed, window_tokens=window_tokens
        )
        self._check_window()
        self._ahead: BackgroundFuture[Window] | None = None
        self.prepared_tokens, self.prepare_s = 0, 0.0
        self._open(self._reader.read(0, 0, [], {}))
        self._check_enough()

    def __iter__(self) -> TrainLoader:
        return self

    def __next__(self) -> Batch:
        builder = BatchBuilder(self._rows_per_batch, self._sequence_length, self._eos_id)
        for index in range(self._rows_per_batch * self._world_size):
            while self._row == len(self._window.rows):
                self._next_window()
            if index // self._rows_per_batch == self._rank:
                builder.add(self._window.rows[self._row], self._window.tokens)
            self._row += 1
        if self._read_ahead and self._ahead is None:
            self._ahead = in_background("nsa-data-window", self._following(self._window))
        return builder.build()

    def close(self) -> None:
        """Give up the window that is being made ahead and end its thread; no more batches come."""
        self._reader.stop()
        if self._ahead is not None:
            join(self._ahead.thread)

    @property
    def epoch(self) -> int:
        """The pass over the documents that the open window belongs to, from 0."""
        return self._window.epoch

    @property
    def num_documents(self) -> int | None:
        """Documents to train on; None where they are not counted, because they are read by blocks."""
        return self._documents.num_documents

    @property
    def fingerprint(self) -> str:
        """Digest of documents, tokenizer, row length, seed and window: equal streams have equal ones."""
        return self._fingerprint

    @property
    def epoch_tokens(self) -> int | None:
        """Input tokens of an epoch, where they are known: when all documents fit one window."""
        window = self._window
        if window.first or window.next_first < self._documents.num_units:
            return None
        carried = sum(piece.stop - piece.start for piece in window.carry)
        rest = sum(piece.stop - piece.start for piece in window.rest)
        return len(window.rows) * self._sequence_length + rest - carried

    def state_dict(self) -> dict[str, Any]:
        """Where the stream stands after the batches given so far: JSON, equal on all ranks."""
        return {
            "epoch": self._window.epoch,
            "first": self._window.first,
            "carry": [list(piece) for piece in self._window.carry],
            "row": self._row,
            "fingerprint": self._fingerprint,
        }

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """Continue exactly where `state_dict` was taken; the number of ranks may differ.

        Raises:
            ValueError: the state belongs to other documents, another tokenizer, row length, seed or window.
            DataError: the documents at that place cannot be read.
        """
        if state["fingerprint"] != self._fingerprint:
            raise ValueError(
                f"the loader's state is of other data ({state['fingerprint']}, here {self._fingerprint}): documents, "
                f"held-out documents, tokenizer, sequence length, seed and shuffle window must be the same to resume"
            )
        carry = [Piece(*piece) for piece in state["carry"]]
        place = (state["epoch"], state["first"], carry)
        self._ahead = None
        if place != (self._window.epoch, self._window.first, self._window.carry):
            self._open(self._reader.read(*place, known=self._window.tokens))
        self._row = int(state["row"])

    def _next_window(self) -> None:
        ahead, self._ahead = self._ahead, None
        self._open(ahead.result() if ahead else self._following(self._window)())

    def _open(self, window: Window) -> None:
        self._window, self._row = window, 0
        self.prepared_tokens += window.num_tokens
        self.prepare_s += window.prepare_s

    def _following(self, window: Window) -> Callable[[], Window]:
        """Makes the window behind another one."""
        at_end = window.next_first == self._documents.num_units
        first = 0 if at_end else window.next_first
        return lambda: self._reader.read(window.epoch + at_end, first, window.rest, window.tokens)

    def _check_window(self) -> None:
        needed = self._rows_per_batch * self._world_size * self._sequence_length
        if self._reader.window_tokens < needed:
            raise ValueError(
                f"data.shuffle_window_tokens is {self._reader.window_tokens} but one batch of all ranks takes "
                f"{needed}; raise it"
            )

    def _check_enough(self) -> None:
        needed = self._rows_per_batch * self._world_size
        whole_epoch = self._window.next_first == self._documents.num_units
        if whole_epoch and len(self._window.rows) < needed:
            raise DataError(
                f"the {self._window.num_documents} training documents fill {len(self._window.rows)} rows of "
                f"{self._sequence_length} tokens, but one batch of all ranks takes {needed}; use shorter rows, fewer "
                f"rows or more text"
            )
