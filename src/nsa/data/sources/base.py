"""What a source is, and the one that holds all its documents in memory."""

from __future__ import annotations

import hashlib
from collections.abc import Sequence
from typing import Protocol

from nsa.data.sources.chunked import SourceFile


class Source(Protocol):
    """Documents by index; names are stable between runs and machines."""

    @property
    def fingerprint(self) -> str: ...
    def __len__(self) -> int: ...
    def name(self, index: int) -> str: ...
    def text(self, index: int) -> str: ...


class Documents:
    """A source in memory.

    Args:
        names: one for each document.
        texts: their texts.
        files: what they were read from, if anything.
    """

    def __init__(self, names: Sequence[str], texts: Sequence[str], files: Sequence[SourceFile] = ()) -> None:
        if len(names) != len(texts):
            raise ValueError(f"{len(names)} names for {len(texts)} texts")
        self._names = list(names)
        self._texts = list(texts)
        self.files = tuple(files)

    @property
    def fingerprint(self) -> str:
        """Digest of all names and texts."""
        digest = hashlib.blake2b(digest_size=16)
        for part in (*self._names, *self._texts):
            encoded = part.encode()
            digest.update(len(encoded).to_bytes(8, "little") + encoded)
        return digest.hexdigest()

    def __len__(self) -> int:
        return len(self._names)

    def name(self, index: int) -> str:
        return self._names[index]

    def text(self, index: int) -> str:
        return self._texts[index]
