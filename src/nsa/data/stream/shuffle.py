"""Documents of an epoch in drawn order, a window at a time: tokenized, cut, packed into rows, and the rows shuffled.

Documents in memory come in a global permutation of all of them. A source that is read by blocks gives its blocks in a
global permutation, and the documents of as many blocks as a window takes are permuted among themselves. Both orders
depend on the seed and the epoch alone; a window depends on its place in the order and on what the window before left
over, so that it can be made again, or ahead of time.
"""

from __future__ import annotations

import threading
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Protocol

import numpy as np

from nsa.data.sources.base import Source
from nsa.data.sources.chunked import BlockSource, SourceFile
from nsa.data.stream.packing import Piece, cut_document, pack_rows
from nsa.data.tokenizers import Tokenizer

ENCODE_CHUNK = 32
DOCUMENT_ORDER = 1  # apart from the draw of the rows' order


class TrainingDocuments(Protocol):
    """The documents to train on, in units that are drawn and read together."""

    @property
    def identity(self) -> tuple: ...
    @property
    def files(self) -> Sequence[SourceFile]: ...
    @property
    def num_units(self) -> int: ...
    @property
    def num_documents(self) -> int | None: ...
    def order(self, seed: int, epoch: int) -> Sequence[int]: ...
    def read(self, units: Sequence[int]) -> list[tuple[int, str]]: ...
    def text(self, document: int) -> str: ...

    units_per_read: int
    shuffle_in_window: bool


class ChosenDocuments:
    """Some documents of a source in memory; each is a unit of its own.

    Args:
        source: where the texts are.
        documents: indices of those to train on.
    """

    units_per_read, shuffle_in_window = ENCODE_CHUNK, False

    def __init__(self, source: Source, documents: Sequence[int]) -> None:
        self._source, self._documents = source, np.asarray(documents, dtype=np.int64)
        self.identity, self.files = (source.fingerprint, list(documents)), getattr(source, "files", ())
        self.num_documents = len(documents)

    @property
    def num_units(self) -> int:
        return len(self._documents)

    def order(self, seed: int, epoch: int) -> Sequence[int]:
        return np.random.default_rng((seed, epoch)).permutation(self._documents).tolist()

    def read(self, units: Sequence[int]) -> list[tuple[int, str]]:
        return [(document, self._source.text(document)) for document in units]

    def text(self, document: int) -> str:
        return self._source.text(document)


class BlocksToTrainOn:
    """The documents of a source that is read by blocks, without those that are held out; a block is a unit.

    Args:
        source: the blocks.
        held_out: whether a document of this name is held out.
        rule: how that is decided, for the resume check.
    """

    units_per_read, shuffle_in_window = 1, True
    num_documents = None

    def __init__(self, source: BlockSource, held_out: Callable[[str], bool], rule: object) -> None:
        self._source, self._held_out = source, held_out
        self.identity, self.files = (source.fingerprint, "blocks", repr(rule)), getattr(source, "files", ())

    @property
    def num_units(self) -> int:
        return self._source.num_blocks

    def order(self, seed: int, epoch: int) -> Sequence[int]:
        if self._source.in_random_order:
            return range(self.num_units)
        return np.random.default_rng((seed, epoch)).permutation(self.num_units).tolist()

    def read(self, units: Sequence[int]) -> list[tuple[int, str]]:
        found = []
        for block in units:
            content = self._source.read_block(block)
            pairs = enumerate(zip(content.names, content.texts, strict=True), start=content.first)
            found += [(document, text) for document, (name, text) in pairs if not self._held_out(name)]
        return found

    def text(self, document: int) -> str:
        return self._source.text(document)


@dataclass(frozen=True)
class Window:
    """Packed and shuffled rows of some documents.

    Attributes:
        epoch: the pass over the documents.
        first: place in the epoch's order of units where it begins.
        next_first: place where the next one begins.
        carry: pieces that the window before left over and that open this one.
        rows: the rows, in the order in which they are given out.
        rest: pieces of the last, incomplete row.
        tokens: of each document that a piece is of.
        num_documents: documents read for it.
        num_tokens: tokens encoded for it, end tokens included.
        prepare_s: seconds that all this took.
    """

    epoch: int
    first: int
    next_first: int
    carry: list[Piece]
    rows: list[list[Piece]]
    rest: list[Piece]
    tokens: dict[int, np.ndarray]
    num_documents: int
    num_tokens: int
    prepare_s: float


class WindowReader:
    """Makes windows.

    Args:
        documents: what is trained on.
        tokenizer: of the model.
        sequence_length: T, input tokens in a row.
        seed: of all orders.
        window_tokens: tokens of a window, or a little more.
    """

    def __init__(
        self, documents: TrainingDocuments, tokenizer: Tokenizer, *, sequence_length: int, seed: int, window_tokens: int
    ) -> None:
        self.documents, self._tokenizer = documents, tokenizer
        self._sequence_length, self._seed, self.window_tokens = sequence_length, seed, window_tokens
        self._stopped = threading.Event()

    def stop(self) -> None:
        """Let every `read`, also one on another thread, end soon with an error."""
        self._stopped.set()

    def read(self, epoch: int, first: int, carry: list[Piece], known: Mapping[int, np.ndarray]) -> Window:
        """The window at place `first` of the epoch's order, behind the pieces carried over.

        Args:
            known: tokens of documents from the window before; what is missing is read again.

        Raises:
            DataError: a document cannot be read.
            RuntimeError: `stop` was called.
        """
        start_s = time.perf_counter()
        documents, order = self.documents, self.documents.order(self._seed, epoch)
        carried = sorted({piece.document for piece in carry})
        tokens = {document: known[document] for document in carried if document in known}
        missing = [document for document in carried if document not in known]
        tokens.update(encode_documents([(d, documents.text(d)) for d in missing], self._tokenizer))
        place, num_inputs, read = first, 0, []
        while place < len(order) and num_inputs < self.window_tokens:
            if self._stopped.is_set():
                raise RuntimeError("the loader is closed; it reads no more documents")
            chunk = order[place : place + documents.units_per_read]
            encoded = encode_documents(documents.read(chunk), self._tokenizer)
            tokens.update(encoded)
            read += encoded
            num_inputs += sum(len(ids) - 1 for ids in encoded.values())
            place += len(chunk)
        if documents.shuffle_in_window:
            draw = np.random.default_rng((self._seed, epoch, first, DOCUMENT_ORDER))
            read = draw.permutation(np.array(read, dtype=np.int64)).tolist()
        pieces = list(carry)
        for document in read:
            pieces += cut_document(document, len(tokens[document]), self._sequence_length)
        rows, rest = pack_rows(pieces, self._sequence_length)
        shuffled = np.random.default_rng((self._seed, epoch, first)).permutation(len(rows))
        rows = [rows[index] for index in shuffled]
        num_tokens, prepare_s = num_inputs + len(read), time.perf_counter() - start_s
        return Window(epoch, first, place, carry, rows, rest, tokens, len(read), num_tokens, prepare_s)


def encode_documents(documents: Sequence[tuple[int, str]], tokenizer: Tokenizer) -> dict[int, np.ndarray]:
    """Tokens of each document with the end token, in the smallest dtype that holds the vocabulary."""
    dtype = np.uint16 if tokenizer.vocab_size <= 2**16 else np.uint32
    encoded = tokenizer.encode_batch([text for _, text in documents])
    return {
        document: np.append(ids.astype(dtype), dtype(tokenizer.eos_id))
        for (document, _), ids in zip(documents, encoded, strict=True)
    }
