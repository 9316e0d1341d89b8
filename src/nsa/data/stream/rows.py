"""The endless rows of one source, a window of documents at a time, from any place on."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any

import numpy as np

from nsa.data.stream.background import BackgroundFuture, in_background, join
from nsa.data.stream.packing import Piece
from nsa.data.stream.shuffle import ShuffleReader, ShuffleWindow, TrainingDocuments
from nsa.data.tokenizers import Tokenizer


class RowStream:
    """Rows of documents, epoch after epoch.

    Args:
        documents: what to train on.
        tokenizer: of the model.
        sequence_length: T, input tokens in a row.
        seed: of the order of documents and rows.
        window_tokens: rows are shuffled among this many tokens, which are in memory at a time.
        first_id: number of its first document among those of all sources.
        start: where to begin, as `place` gave it; with the first document of the first epoch unless given.

    Attributes:
        window: the documents whose rows are given out.
        prepared_tokens: tokens of all windows opened so far.
        prepare_s: seconds that making those windows took.
    """

    def __init__(
        self,
        documents: TrainingDocuments,
        tokenizer: Tokenizer,
        *,
        sequence_length: int,
        seed: int,
        window_tokens: int,
        first_id: int = 0,
        start: Mapping[str, Any] | None = None,
    ) -> None:
        self.documents, self.first_id, self._sequence_length = documents, first_id, sequence_length
        self._reader = ShuffleReader(
            documents, tokenizer, sequence_length=sequence_length, seed=seed, window_tokens=window_tokens
        )
        self._ahead: BackgroundFuture[ShuffleWindow] | None = None
        self.prepared_tokens, self.prepare_s = 0, 0.0
        place = start or {"epoch": 0, "first": 0, "carry": [], "row": 0}
        carry = [Piece(*piece) for piece in place["carry"]]
        self._open(self._reader.read(place["epoch"], place["first"], carry, {}), row=place["row"])

    def next_row(self) -> tuple[list[Piece], Mapping[int, np.ndarray]]:
        """The next row, and the tokens of the documents that it is of."""
        while self._row == len(self.window.rows):
            self._next_window()
        self._row += 1
        return self.window.rows[self._row - 1], self.window.tokens

    def read_ahead(self) -> None:
        """Begin to make the next window on another thread, unless that has begun."""
        if self._ahead is None:
            self._ahead = in_background("nsa-data-window", self._following(self.window))

    def close(self) -> None:
        """Give up the window that is being made ahead and end its thread; no more rows come."""
        self._reader.stop()
        if self._ahead is not None:
            join(self._ahead.thread)

    @property
    def is_whole_epoch(self) -> bool:
        """Whether the open window reaches the end of an epoch."""
        return self.window.next_first == self.documents.num_chunks

    @property
    def epoch_tokens(self) -> int | None:
        """Input tokens of an epoch, where they are known: when all documents fit one window."""
        window = self.window
        if window.first or not self.is_whole_epoch:
            return None
        carried = sum(piece.stop - piece.start for piece in window.carry)
        rest = sum(piece.stop - piece.start for piece in window.rest)
        return len(window.rows) * self._sequence_length + rest - carried

    def place(self) -> dict[str, Any]:
        """Where the stream stands, as JSON."""
        window = self.window
        carry = [list(piece) for piece in window.carry]
        return {"epoch": window.epoch, "first": window.first, "carry": carry, "row": self._row}

    def _next_window(self) -> None:
        ahead, self._ahead = self._ahead, None
        self._open(ahead.result() if ahead else self._following(self.window)())

    def _open(self, window: ShuffleWindow, row: int = 0) -> None:
        self.window, self._row = window, row
        self.prepared_tokens += window.num_tokens
        self.prepare_s += window.prepare_s

    def _following(self, window: ShuffleWindow) -> Callable[[], ShuffleWindow]:
        """Makes the window behind another one."""
        at_end = window.next_first == self.documents.num_chunks
        first = 0 if at_end else window.next_first
        return lambda: self._reader.read(window.epoch + at_end, first, window.rest, window.tokens)
