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

from nsa.data.sources.chunked import Block, BlockSource

LETTERS = 26
NUM_KEYS = LETTERS**2
BLOCK_DOCUMENTS = 256
NUM_BLOCKS = 2**40  # without end for any run, and still a number
SEED = 20_250_101
# Where a row ends just before a document's last token, that token comes for nothing in the next row.
CUT_ALLOWANCE = 0.98


class SyntheticDocuments(BlockSource):
    """Documents of one task, each drawn from its number alone.

    Args:
        task: "copy" or "recall".
        length: letters to copy, or pairs to recall (at most 676).
    """

    in_random_order = True

    def __init__(self, task: str, length: int) -> None:
        super().__init__()
        if task not in ("copy", "recall") or length < 1 or (task == "recall" and length > NUM_KEYS):
            raise ValueError(f"there is no task {task!r} of length {length}; copy has any, recall 1..{NUM_KEYS}")
        self.task, self.length = task, length

    @property
    def fingerprint(self) -> str:
        return hashlib.blake2b(f"{self.task} {self.length} {SEED}".encode(), digest_size=16).hexdigest()

    @property
    def num_blocks(self) -> int:
        return NUM_BLOCKS

    def __len__(self) -> int:
        return NUM_BLOCKS * BLOCK_DOCUMENTS

    def block_of(self, document: int) -> int:
        return document // BLOCK_DOCUMENTS

    def read_block(self, block: int) -> Block:
        first = block * BLOCK_DOCUMENTS
        names = [f"{self.task}-{first + index}" for index in range(BLOCK_DOCUMENTS)]
        draw = np.random.default_rng((SEED, self.length, block))
        halves = self._copies(draw) if self.task == "copy" else self._pairs(draw)
        texts = [f">{given}={asked}" for given, asked in zip(*halves, strict=True)]
        return Block(first, names, texts)

    @property
    def document_nats(self) -> float:
        """Entropy of a document: what the best possible model needs for it."""
        if self.task == "copy":
            return self.length * math.log(LETTERS)
        keys = math.lgamma(NUM_KEYS + 1) - math.lgamma(NUM_KEYS - self.length + 1)
        return keys + self.length * math.log(LETTERS) + math.lgamma(self.length + 1)

    @property
    def document_bytes(self) -> int:
        return 2 + 2 * self.length * (1 if self.task == "copy" else 3)

    @property
    def entropy_floor_nats(self) -> float:
        """Least loss per byte token that does not mean a leak: the entropy for each of a document's labels, which are
        its bytes after the first and its end, less a little for documents that are cut at the end of a row."""
        return CUT_ALLOWANCE * self.document_nats / self.document_bytes

    def _copies(self, draw: np.random.Generator) -> tuple[list[str], list[str]]:
        letters = _letters(draw.integers(LETTERS, size=(BLOCK_DOCUMENTS, self.length)))
        texts = [bytes(row).decode() for row in letters]
        return texts, texts

    def _pairs(self, draw: np.random.Generator) -> tuple[list[str], list[str]]:
        given, asked = [], []
        for _ in range(BLOCK_DOCUMENTS):
            keys = draw.permutation(NUM_KEYS)[: self.length]
            values = draw.integers(LETTERS, size=self.length)
            pairs = _letters(np.stack([keys // LETTERS, keys % LETTERS, values], axis=1))
            given.append(pairs.tobytes().decode())
            asked.append(draw.permutation(pairs).tobytes().decode())
        return given, asked


def _letters(numbers: np.ndarray) -> np.ndarray:
    return (numbers + ord("a")).astype(np.uint8)
