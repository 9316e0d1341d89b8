"""Sources that are too large for memory: documents in blocks, each read when it is needed.

A block is what is cheap to read at once: a row group of a Parquet file, a megabyte of a JSON Lines file, some drawn
documents. Documents are numbered through all blocks, as in any source.
"""

from __future__ import annotations

import hashlib
import threading
from abc import ABC, abstractmethod
from collections import OrderedDict
from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np

KEPT_BLOCKS = 4  # read blocks that stay in memory, for documents that are asked for one by one


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


@dataclass(frozen=True)
class Block:
    """Documents `first`, `first` + 1, ... of a source."""

    first: int
    names: Sequence[str]
    texts: Sequence[str]


def digest_of(*parts: str | bytes) -> str:
    """A short digest of parts, lengths included."""
    digest = hashlib.blake2b(digest_size=16)
    for part in parts:
        encoded = part.encode() if isinstance(part, str) else part
        digest.update(len(encoded).to_bytes(8, "little") + encoded)
    return digest.hexdigest()


class BlockSource(ABC):
    """A source whose documents are read block by block; safe to use from several threads.

    Attributes:
        in_random_order: the documents are independent draws, so that their order needs no shuffle.
    """

    in_random_order = False

    def __init__(self) -> None:
        self._kept: OrderedDict[int, Block] = OrderedDict()
        self._lock = threading.Lock()

    @property
    @abstractmethod
    def fingerprint(self) -> str:
        """Digest of what the source holds."""

    @property
    @abstractmethod
    def num_blocks(self) -> int: ...

    @abstractmethod
    def __len__(self) -> int:
        """Documents in all."""

    @abstractmethod
    def block_of(self, document: int) -> int:
        """The block that holds a document."""

    @abstractmethod
    def read_block(self, block: int) -> Block:
        """Read a block from where it lies.

        Raises:
            DataError: it is missing, truncated or malformed.
        """

    def read_names(self, block: int) -> tuple[int, Sequence[str]]:
        """The first document of a block, and the names of its documents."""
        content = self.read_block(block)
        return content.first, content.names

    def name(self, index: int) -> str:
        content = self._kept_block(index)
        return content.names[index - content.first]

    def text(self, index: int) -> str:
        content = self._kept_block(index)
        return content.texts[index - content.first]

    def _kept_block(self, document: int) -> Block:
        block = self.block_of(document)
        with self._lock:
            if block not in self._kept:
                self._kept[block] = self.read_block(block)
                if len(self._kept) > KEPT_BLOCKS:
                    self._kept.popitem(last=False)
            self._kept.move_to_end(block)
            return self._kept[block]


class FileBlocks(BlockSource):
    """A source whose blocks are stretches of files, of known numbers of documents.

    Args:
        fingerprint: digest of the contents.
        files: what is read, for the run's index.
        block_sizes: documents of each block, in order.
    """

    def __init__(self, fingerprint: str, files: Sequence[SourceFile], block_sizes: Sequence[int]) -> None:
        super().__init__()
        self._fingerprint = fingerprint
        self.files = tuple(files)
        self.bounds = np.concatenate([[0], np.cumsum(block_sizes, dtype=np.int64)])

    @property
    def fingerprint(self) -> str:
        return self._fingerprint

    @property
    def num_blocks(self) -> int:
        return len(self.bounds) - 1

    def __len__(self) -> int:
        return int(self.bounds[-1])

    def block_of(self, document: int) -> int:
        if not 0 <= document < len(self):
            raise IndexError(f"document {document} is not among the {len(self)}")
        return int(np.searchsorted(self.bounds, document, side="right")) - 1
