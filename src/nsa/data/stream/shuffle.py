"""Documents of an epoch in drawn order, a window at a time: tokenized, cut, packed into rows, and the rows shuffled.

The chunks of a source come in a global permutation; in memory, where a chunk is a document, that is one of all
documents. Else the documents of as many chunks as a window takes are permuted among themselves. Both orders depend on
the seed and the epoch alone; a window depends on its place in the order and on what the window before left over, so
that it can be made again, or ahead of time.
"""

from __future__ import annotations

import threading
import time
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass

import numpy as np

from nsa.data.sources.base import Document, Source
from nsa.data.stream.packing import Piece, cut_document, pack_rows
from nsa.data.tokenizers import Tokenizer

ENCODED_TOGETHER = 32  # documents in memory that are tokenized at once; windows end between such groups
DOCUMENT_ORDER = 1  # apart from the draw of the rows' order


class TrainingDocuments:
    """The documents of a source without the held-out ones, by the chunks that are drawn and read together.

    Args:
        source: the documents.
        is_held_out: whether a document of this name is held out.
        rule: how that is decided, for the resume check.

    Attributes:
        identity: what a resumed run must find again.
        files: what the source reads.
        num_documents: documents to train on; None where they are not in memory and so not counted.
        chunks_per_read: chunks that are read and tokenized together.
        shuffle_in_window: whether the order of chunks leaves documents beside their neighbours in the source.
    """

    def __init__(self, source: Source, is_held_out: Callable[[str], bool], rule: object) -> None:
        self._source, self._is_held_out, self.files = source, is_held_out, source.files
        self._chunks: Sequence[int]
        if source.in_memory:
            self._chunks = [
                chunk for chunk in range(source.num_chunks) if not all(map(is_held_out, source.read_names(chunk)))
            ]
            self.identity, self.num_documents = (source.fingerprint, self._chunks), len(self._chunks)
            self.chunks_per_read, self.shuffle_in_window = ENCODED_TOGETHER, False
        else:
            self._chunks = range(source.num_chunks)
            self.identity, self.num_documents = (source.fingerprint, "blocks", repr(rule)), None
            self.chunks_per_read, self.shuffle_in_window = 1, True

    @property
    def num_chunks(self) -> int:
        """Chunks of an epoch."""
        return len(self._chunks)

    def order(self, seed: int, epoch: int) -> Sequence[int]:
        """The chunks of an epoch, in the order in which they are read."""
        if self._source.in_random_order:
            return self._chunks
        return np.random.default_rng((seed, epoch)).permutation(np.asarray(self._chunks, dtype=np.int64)).tolist()

    def read(self, chunks: Iterable[int]) -> list[Document]:
        """The documents of some chunks.

        Raises:
            DataError: a chunk cannot be read.
        """
        return [
            document
            for chunk in chunks
            for document in self._source.read(chunk)
            if not self._is_held_out(document.name)
        ]

    def __getitem__(self, number: int) -> Document:
        """The document of a number in the source; raises what `read` does."""
        return self._source[number]


@dataclass(frozen=True)
class ShuffleWindow:
    """Packed and shuffled rows of some documents.

    Attributes:
        epoch: the pass over the documents.
        first: place in the epoch's order of chunks where it begins.
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


class ShuffleReader:
    """Makes shuffle windows.

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

    def read(self, epoch: int, first: int, carry: list[Piece], known: Mapping[int, np.ndarray]) -> ShuffleWindow:
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
        tokens.update(encode_documents([documents[number] for number in missing], self._tokenizer))
        place, num_inputs, read = first, 0, []
        while place < len(order) and num_inputs < self.window_tokens:
            if self._stopped.is_set():
                raise RuntimeError("the loader is closed; it reads no more documents")
            chunks = order[place : place + documents.chunks_per_read]
            encoded = encode_documents(documents.read(chunks), self._tokenizer)
            tokens.update(encoded)
            read += encoded
            num_inputs += sum(len(ids) - 1 for ids in encoded.values())
            place += len(chunks)
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
        return ShuffleWindow(epoch, first, place, carry, rows, rest, tokens, len(read), num_tokens, prepare_s)


def encode_documents(documents: Sequence[Document], tokenizer: Tokenizer) -> dict[int, np.ndarray]:
    """Tokens of each document, by its number, with the end token, in the smallest dtype that holds the vocabulary."""
    dtype = np.uint16 if tokenizer.vocab_size <= 2**16 else np.uint32
    encoded = tokenizer.encode_batch([document.text for document in documents])
    return {
        document.number: np.append(ids.astype(dtype), dtype(tokenizer.eos_id))
        for document, ids in zip(documents, encoded, strict=True)
    }
