"""The source of files that are too large for memory: stretches of them are chunks, read when they are due."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np

from nsa.data.sources.base import Document, Source, SourceFile


class FileChunks(Source):
    """A source whose chunks are stretches of files, of known numbers of documents.

    Args:
        fingerprint: digest of the contents.
        files: what is read, for the run's index.
        chunk_sizes: documents of each chunk, in order.
    """

    def __init__(self, fingerprint: str, files: Sequence[SourceFile], chunk_sizes: Sequence[int]) -> None:
        super().__init__(fingerprint, files)
        self._bounds = np.concatenate([[0], np.cumsum(chunk_sizes, dtype=np.int64)])

    @property
    def num_chunks(self) -> int:
        return len(self._bounds) - 1

    def __len__(self) -> int:
        return int(self._bounds[-1])

    def chunk_of(self, number: int) -> int:
        return int(np.searchsorted(self._bounds, number, side="right")) - 1

    def numbered(self, chunk: int, names: Sequence[str], texts: Sequence[str]) -> list[Document]:
        """The documents of a chunk, by their names and texts in order."""
        entries = enumerate(zip(names, texts, strict=True), start=int(self._bounds[chunk]))
        return [Document(number, name, text) for number, (name, text) in entries]
