"""Which documents are kept for evaluation: by name, by glob pattern, or a fraction by a stable hash of the name.

>>> train, heldout = split_documents(Documents(["a", "b1", "b2"], ["one", "two", "three"]), ["b*"])
>>> heldout
[1, 2]
"""

from __future__ import annotations

import difflib
import hashlib
import re
from collections.abc import Callable, Iterable, Sequence
from fnmatch import fnmatchcase

from nsa.data.errors import DataError
from nsa.data.progress import Progress
from nsa.data.sources.base import Documents, Source
from nsa.data.sources.chunked import BlockSource

SAMPLED_NAMES = 10_000  # names that a pattern which matches nothing is compared with


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
        held = _matching(names, heldout)
        chosen = {index for index, name in enumerate(names) if name in held}
    if len(chosen) == len(names):
        remedy = "hold out fewer" if len(names) > 1 else "a fraction such as 0.1 holds out its end"
        raise DataError(f"data.heldout takes all {len(names)} documents and leaves none to train on; {remedy}")
    return [index for index in range(len(names)) if index not in chosen], sorted(chosen)


def with_end_apart(documents: Documents, fraction: float) -> Documents:
    """The only document in two, the first to train on and the end to hold out.

    The cut is the one between two paragraphs that is nearest to `fraction` from the end, if that leaves between half of
    it and one and a half times it; else the one between two lines, else between two words.

    Raises:
        DataError: one of the two would be empty.
    """
    name, text = documents.name(0), documents.text(0)
    target, room = len(text) * (1 - fraction), len(text) * min(fraction, 1 - fraction) / 2
    for boundary in (r"\n[ \t\r]*\n\s*", r"\n", r"\s+", r""):
        cuts = (match.end() for match in re.finditer(boundary, text))
        cut = min(cuts, key=lambda place: abs(place - target), default=-1)
        if abs(cut - target) <= max(room, 1):
            break
    parts = text[:cut], text[cut:]
    if not all(part.strip() for part in parts):
        raise DataError(f"{name} is too short to hold out {fraction:g} of it; give more text, or set data.heldout to 0")
    return Documents([name, f"{name} (end)"], parts, documents.files)


def heldout_rule(source: BlockSource, heldout: float | Sequence[str]) -> Callable[[str], bool]:
    """Whether a document of a source that is not in memory is held out, by its name.

    Names and patterns are looked up in all of the source's names once, so that one which matches nothing is an error.

    Raises:
        DataError: a pattern matches nothing, or the source is without end and cannot be searched.
    """
    if isinstance(heldout, float | int):
        return lambda name: name_hash(name) < heldout
    if not heldout:
        return lambda name: False
    if source.in_random_order:
        raise DataError("drawn documents are without end and cannot be searched for names; give a fraction as heldout")
    held = _matching(_all_names(source), heldout)
    return lambda name: name in held


def _all_names(source: BlockSource) -> Iterable[str]:
    progress = Progress("looking for the held-out names", source.num_blocks)
    for block in range(source.num_blocks):
        yield from source.read_names(block)[1]
        progress.reached(block + 1)


def _matching(names: Iterable[str], patterns: Sequence[str]) -> set[str]:
    """What the patterns choose; a name that is spelled out wins, so that names may hold the signs of a pattern."""
    exact: set[str] = set()
    matched: dict[str, set[str]] = {pattern: set() for pattern in patterns}
    sample: list[str] = []
    num_names = 0
    for name in names:
        num_names += 1
        if name in matched:
            exact.add(name)
        for pattern in patterns:
            if fnmatchcase(name, pattern):
                matched[pattern].add(name)
        if len(sample) < SAMPLED_NAMES:
            sample.append(name)
    for pattern in patterns:
        if pattern not in exact and not matched[pattern]:
            nearest = difflib.get_close_matches(pattern, sample, n=3, cutoff=0.0)
            raise DataError(
                f'held-out pattern "{pattern}" matches none of the {num_names} documents; nearest: {nearest}'
            )
    return exact.union(*(matched[pattern] for pattern in patterns if pattern not in exact))
