"""What a source of documents is, and the one that holds all of them in memory.

A source gives its documents by chunks: a chunk is what is cheap to read at once, a row group of a Parquet file, a
megabyte of a JSON Lines file, some drawn documents, or one document where all are in memory anyway. Documents are
numbered through all chunks.

    >>> source = Documents(["a", "b"], ["one", "two"])
    >>> len(source), source.num_chunks, source[1]
    (2, 2, Document(number=1, name='b', text='two'))
"""

from __future__ import annotations

import hashlib
import threading
from abc import ABC, abstractmethod
from collections import OrderedDict
from collections.abc import Sequence
from dataclasses import dataclass
from typing import NamedTuple

KEPT_CHUNKS = 4  # read chunks that stay in memory, for documents that are asked for one by one


class Document(NamedTuple):
    """A text, the number that it has in its source, and a name that is stable between runs and machines."""

    number: int
    name: str
    text: str


@dataclass(frozen=True)
class SourceFile:
    """A file that a source reads.

    Attributes:
        name: its path inside the folder, the pattern or the repository that was given.
        size_bytes: its size when it was opened.
        num_documents: documents in it.
        sha256: of its contents, where it is known without reading them all.
        digest: of what was read of it, to name the file that has changed when a run is resumed.
    """

    name: str
    size_bytes: int
    num_documents: int
    sha256: str | None = None
    digest: str | None = None


class Source(ABC):
    """Documents by chunks, and each by its number: `source[number]`; safe to use from several threads.

    Args:
        fingerprint: digest of what the source holds, by which a resumed run knows that it reads the same.
        files: what is read, for the run's index.

    Attributes:
        in_memory: each document is a chunk of its own and there at any time; else a chunk is read when it is due.
        in_random_order: the documents are independent draws, without end, so that their order needs no shuffle.
    """

    in_memory = False
    in_random_order = False

    def __init__(self, fingerprint: str, files: Sequence[SourceFile] = ()) -> None:
        self.fingerprint, self.files = fingerprint, tuple(files)
        self._kept: OrderedDict[int, Sequence[Document]] = OrderedDict()
        self._lock = threading.Lock()

    @property
    @abstractmethod
    def num_chunks(self) -> int:
        """Chunks in all."""

    @abstractmethod
    def __len__(self) -> int:
        """Documents in all."""

    @abstractmethod
    def chunk_of(self, number: int) -> int:
        """The chunk that holds a document."""

    @abstractmethod
    def read(self, chunk: int) -> Sequence[Document]:
        """The documents of a chunk, ascending, from where they lie.

        Raises:
            DataError: the chunk is missing, truncated or malformed, or no longer what it was.
        """

    def read_names(self, chunk: int) -> Sequence[str]:
        """The names of a chunk's documents; raises what `read` does."""
        return [document.name for document in self.read(chunk)]

    def __getitem__(self, number: int) -> Document:
        """The document of a number; the last few chunks stay in memory. Raises what `read` does, and `IndexError`."""
        if not 0 <= number < len(self):
            raise IndexError(f"document {number} is not among the {len(self)}")
        chunk = self.chunk_of(number)
        with self._lock:
            if chunk not in self._kept:
                self._kept[chunk] = self.read(chunk)
                if len(self._kept) > KEPT_CHUNKS:
                    self._kept.popitem(last=False)
            self._kept.move_to_end(chunk)
            documents = self._kept[chunk]
        return documents[number - documents[0].number]


class Documents(Source):
    """A source in memory; each document is a chunk.

    Args:
        names: one for each document.
        texts: their texts.
        files: what they were read from, if anything.

    Raises:
        ValueError: there is not a name for each text.
    """

    in_memory = True

    def __init__(self, names: Sequence[str], texts: Sequence[str], files: Sequence[SourceFile] = ()) -> None:
        if len(names) != len(texts):
            raise ValueError(f"{len(names)} names for {len(texts)} texts")
        super().__init__(digest_of(*names, *texts), files)
        self._names, self._texts = list(names), list(texts)

    @property
    def num_chunks(self) -> int:
        return len(self._names)

    def __len__(self) -> int:
        return len(self._names)

    def chunk_of(self, number: int) -> int:
        return number

    def read(self, chunk: int) -> Sequence[Document]:
        return [Document(chunk, self._names[chunk], self._texts[chunk])]


def digest_of(*parts: str | bytes) -> str:
    """A short digest of parts, lengths included."""
    digest = hashlib.blake2b(digest_size=16)
    for part in parts:
        encoded = part.encode() if isinstance(part, str) else part
        digest.update(len(encoded).to_bytes(8, "little") + encoded)
    return digest.hexdigest()
