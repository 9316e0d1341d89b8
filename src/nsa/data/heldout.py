"""Which documents are kept for evaluation: by name, by glob pattern, or a fraction by a stable hash of the name.

>>> train, heldout = split_documents(Documents(["a", "b1", "b2"], ["one", "two", "three"]), ["b*"])
>>> heldout
[1, 2]
"""

from __future__ import annotations

import difflib
import hashlib
from collections.abc import Sequence
from fnmatch import fnmatchcase

from nsa.data.errors import DataError
from nsa.data.sources import Source


def name_hash(name: str) -> float:
    """A number in [0, 1) that depends on the name alone, whatever else the corpus holds."""
    return int.from_bytes(hashlib.blake2b(name.encode(), digest_size=8).digest(), "little") / 2**64


def split_documents(source: Source, heldout: float | Sequence[str]) -> tuple[list[int], list[int]]:
    """Indices of the training and of the held-out documents, both ascending, together all.

    Args:
        source: the documents.
        heldout: a fraction in [0, 1), or names and glob patterns; each must match.

    Raises:
        DataError: a pattern matches nothing, the fraction chooses no document, or none is left to train on.
    """
    names = [source.name(index) for index in range(len(source))]
    if isinstance(heldout, float | int):
        chosen = {index for index, name in enumerate(names) if name_hash(name) < heldout}
        if heldout and not chosen:
            raise DataError(
                f"held-out fraction {heldout} chooses none of the {len(names)} documents; name some in data.heldout, "
                f'raise it, or split a text file into more documents (text_split "paragraphs")'
            )
    else:
        chosen = set().union(*(_matches(pattern, names) for pattern in heldout))
    if len(chosen) == len(names):
        raise DataError(f"data.heldout takes all {len(names)} documents and leaves none to train on; hold out fewer")
    return [index for index in range(len(names)) if index not in chosen], sorted(chosen)


def _matches(pattern: str, names: Sequence[str]) -> set[int]:
    """A name that is spelled out wins, so that names may hold the signs of a pattern."""
    matches = {index for index, name in enumerate(names) if name == pattern}
    matches = matches or {index for index, name in enumerate(names) if fnmatchcase(name, pattern)}
    if not matches:
        nearest = difflib.get_close_matches(pattern, names, n=3, cutoff=0.0)
        raise DataError(f'held-out pattern "{pattern}" matches none of the {len(names)} documents; nearest: {nearest}')
    return matches
