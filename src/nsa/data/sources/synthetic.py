"""Learnable tasks with a known entropy, drawn without end: a model that solves them is right, one below them leaks.

"copy" is `>abcx=abcx`: random letters, then the same again. "recall" is `>abxcdy=cdyabx`: distinct keys of two letters,
each with a value of one, then the keys in another order, each with its value. What follows from what came before costs
nothing; the rest is drawn evenly, so the nats of a document are the same for all of them.

    >>> SyntheticDocuments("copy", 4).text(0)
    '>lcaw=lcaw'
"""

from __future__ import annotations

import hashlib
import math

import numpy as np

from nsa.data.sources.base import Document, Source

LETTERS = 26
NUM_KEYS = LETTERS**2
CHUNK_DOCUMENTS = 256
NUM_CHUNKS = 2**40  # without end for any run, and still a number
SEED = 20_250_101
# Where a row ends just before a document's last token, that token comes for nothing in the next row.
CUT_ALLOWANCE = 0.98


class SyntheticDocuments(Source):
    """Documents of one task, each drawn from its number alone.

    Args:
        task: "copy" or "recall".
        length: letters to copy, or pairs to recall (at most 676).

    Raises:
        ValueError: there is no such task.
    """

    in_random_order = True

    def __init__(self, task: str, length: int) -> None:
        if task not in ("copy", "recall") or length < 1 or (task == "recall" and length > NUM_KEYS):
            raise ValueError(f"there is no task {task!r} of length {length}; copy has any, recall 1..{NUM_KEYS}")
        self.task, self.length = task, length
        super().__init__(hashlib.blake2b(f"{task} {length} {SEED}".encode(), digest_size=16).hexdigest())

    @property
    def num_chunks(self) -> int:
        return NUM_CHUNKS

    def __len__(self) -> int:
        return NUM_CHUNKS * CHUNK_DOCUMENTS

    def chunk_of(self, number: int) -> int:
        return number // CHUNK_DOCUMENTS

    def read(self, chunk: int) -> list[Document]:
        draw = np.random.default_rng((SEED, self.length, chunk))
        halves = self._copies(draw) if self.task == "copy" else self._pairs(draw)
        return [
            Document(number, f"{self.task}-{number}", f">{given}={asked}")
            for number, (given, asked) in enumerate(zip(*halves, strict=True), start=chunk * CHUNK_DOCUMENTS)
        ]

    @property
    def document_nats(self) -> float:
        """Entropy of a document: what the best possible model needs for it."""
        if self.task == "copy":
            return self.length * math.log(LETTERS)
        keys = math.lgamma(NUM_KEYS + 1) - math.lgamma(NUM_KEYS - self.length + 1)
        return keys + self.length * math.log(LETTERS) + math.lgamma(self.length + 1)

    @property
    def document_bytes(self) -> int:
        """Bytes of each document, all of them ASCII letters and signs."""
        return 2 + 2 * self.length * (1 if self.task == "copy" else 3)

    @property
    def entropy_floor_nats(self) -> float:
        """Least loss per byte token that does not mean a leak: the entropy for each of a document's labels, which are
        its bytes after the first and its end, less a little for documents that are cut at the end of a row."""
        return CUT_ALLOWANCE * self.document_nats / self.document_bytes

    def _copies(self, draw: np.random.Generator) -> tuple[list[str], list[str]]:
        letters = _letters(draw.integers(LETTERS, size=(CHUNK_DOCUMENTS, self.length)))
        texts = [bytes(row).decode() for row in letters]
        return texts, texts

    def _pairs(self, draw: np.random.Generator) -> tuple[list[str], list[str]]:
        given, asked = [], []
        for _ in range(CHUNK_DOCUMENTS):
            keys = draw.permutation(NUM_KEYS)[: self.length]
            values = draw.integers(LETTERS, size=self.length)
            pairs = _letters(np.stack([keys // LETTERS, keys % LETTERS, values], axis=1))
            given.append(pairs.tobytes().decode())
            asked.append(draw.permutation(pairs).tobytes().decode())
        return given, asked


def _letters(numbers: np.ndarray) -> np.ndarray:
    return (numbers + ord("a")).astype(np.uint8)
