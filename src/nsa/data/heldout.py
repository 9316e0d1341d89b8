"""Which documents are kept for evaluation: by name, by glob pattern, or a fraction by a stable hash of the name.

>>> is_held_out = heldout_rule(Documents(["a", "b1", "b2"], ["one", "two", "three"]), ["b*"])
>>> is_held_out("a"), is_held_out("b2")
(False, True)
"""

from __future__ import annotations

import difflib
import hashlib
import re
from collections.abc import Callable, Iterable, Sequence
from fnmatch import fnmatchcase

import numpy as np

from nsa.data.errors import DataError
from nsa.data.progress import Progress
from nsa.data.sources.base import Document, Documents, Source
from nsa.data.tokenizers import Tokenizer

SEARCH_SEED = 0  # of the order in which chunks are searched for held-out documents, the same in every run
SEARCHED_CHUNKS = 2**14
SAMPLED_NAMES = 10_000  # names that a pattern which matches nothing is compared with


def name_hash(name: str) -> float:
    """A number in [0, 1) that depends on the name alone, whatever else the corpus holds."""
    return int.from_bytes(hashlib.blake2b(name.encode(), digest_size=8).digest(), "little") / 2**64


def heldout_rule(source: Source, heldout: float | Sequence[str]) -> Callable[[str], bool]:
    """Whether a document of a source is held out, by its name.

    Args:
        source: the documents.
        heldout: a fraction in [0, 1), or names and glob patterns, which are looked up in all names of the source once.

    Raises:
        DataError: a pattern matches nothing; the source is without end and cannot be searched for names; or all
            documents are in memory, and none of them is chosen by the fraction or none is left to train on.
    """
    rule = _rule(source, heldout)
    if source.in_memory:
        _check_choice(source, heldout, sum(map(rule, _all_names(source))))
    return rule


def find_heldout(
    source: Source, is_held_out: Callable[[str], bool], tokenizer: Tokenizer, max_tokens: int | None
) -> list[Document]:
    """Held-out documents, ascending: all of a source in memory; else those of chunks that are spread over the source,
    until they have `max_tokens`.

    Args:
        source: the documents.
        is_held_out: by name.
        tokenizer: counts the tokens.
        max_tokens: enough of them.

    Raises:
        DataError: a chunk cannot be read.
    """
    if source.in_memory:
        return [document for document in source if is_held_out(document.name)]
    found: list[Document] = []
    num_tokens, progress = 0, Progress("reading held-out documents", max_tokens or 0)
    for chunk in _search_order(source):
        held = [document for document in source.read(chunk) if is_held_out(document.name)]
        found += held
        num_tokens += sum(map(len, tokenizer.encode_batch([document.text for document in held])))
        if max_tokens is not None and num_tokens >= max_tokens:
            break
        progress.reached(num_tokens)
    return sorted(found)


def with_end_apart(source: Source, fraction: float) -> Documents:
    """The only document of a source in two, the first to train on and the end to hold out.

    The cut is the one between two paragraphs that is nearest to `fraction` from the end, if that leaves between half of
    it and one and a half times it; else the one between two lines, else between two words.

    Raises:
        DataError: one of the two would be empty.
    """
    _, name, text = source[0]
    target, room = len(text) * (1 - fraction), len(text) * min(fraction, 1 - fraction) / 2
    for boundary in (r"\n[ \t\r]*\n\s*", r"\n", r"\s+", r""):
        cuts = (match.end() for match in re.finditer(boundary, text))
        cut = min(cuts, key=lambda place: abs(place - target), default=-1)
        if abs(cut - target) <= max(room, 1):
            break
    parts = text[:cut], text[cut:]
    if not all(part.strip() for part in parts):
        raise DataError(f"{name} is too short to hold out {fraction:g} of it; give more text, or set data.heldout to 0")
    return Documents([name, f"{name} (end)"], parts, source.files)


def _rule(source: Source, heldout: float | Sequence[str]) -> Callable[[str], bool]:
    if isinstance(heldout, float | int):
        return lambda name: name_hash(name) < heldout
    if not heldout:
        return lambda name: False
    if source.in_random_order:
        raise DataError("drawn documents are without end and cannot be searched for names; give a fraction as heldout")
    return _matching(_all_names(source), heldout).__contains__


def _check_choice(source: Source, heldout: float | Sequence[str], num_held: int) -> None:
    if isinstance(heldout, float | int) and heldout and not num_held:
        raise DataError(
            f"held-out fraction {heldout} chooses none of the {len(source)} documents; name some in data.heldout, "
            f'raise it, or split a text file into more documents (text_split "paragraphs")'
        )
    if num_held == len(source):
        remedy = "hold out fewer" if len(source) > 1 else "a fraction such as 0.1 holds out its end"
        raise DataError(f"data.heldout takes all {len(source)} documents and leaves none to train on; {remedy}")


def _search_order(source: Source) -> Sequence[int]:
    count = min(source.num_chunks, SEARCHED_CHUNKS)
    if source.in_random_order:
        return range(count)
    return np.random.default_rng(SEARCH_SEED).permutation(source.num_chunks)[:count].tolist()


def _all_names(source: Source) -> Iterable[str]:
    progress = Progress("looking for the held-out names", source.num_chunks)
    for chunk in range(source.num_chunks):
        yield from source.read_names(chunk)
        progress.reached(chunk + 1)


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
