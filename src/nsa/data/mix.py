"""Several sources as one: rows by weight, held-out documents of all, and what the run's index says about them.

Each source has its own documents, held-out documents, shuffle windows and epochs. After n rows each has given `weight *
n` of them (weights that sum to one) to within a row or two, in turns that depend on the weights alone.

>>> turns = Turns([3, 1])
>>> [turns.next() for _ in range(8)]
[0, 0, 1, 0, 0, 0, 1, 0]
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from itertools import accumulate
from typing import TYPE_CHECKING, Any

from nsa.data.config import DataConfig
from nsa.data.sources.base import Document
from nsa.data.stream.shuffle import TrainingDocuments
from nsa.data.tokenizers import Tokenizer

if TYPE_CHECKING:
    from nsa.data.corpus import Corpus


class Turns:
    """Whose turn it is among sources of some weights.

    Attributes:
        taken: turns that each has had.
    """

    def __init__(self, weights: Sequence[float]) -> None:
        self._shares = [weight / sum(weights) for weight in weights]
        self.taken = [0] * len(weights)

    def next(self) -> int:
        """The source that is furthest behind its share; the first of those that are equal."""
        count = sum(self.taken) + 1
        behind = [share * count - taken for share, taken in zip(self._shares, self.taken, strict=True)]
        turn = behind.index(max(behind))
        self.taken[turn] += 1
        return turn


@dataclass(frozen=True)
class MixPart:
    """The training documents of one source.

    Attributes:
        label: its name in the mix.
        weight: against those of the others.
        documents: what is trained on.
        first_id: number of its first document among those of all sources.
    """

    label: str
    weight: float
    documents: TrainingDocuments
    first_id: int


class MixedCorpus:
    """The corpora of a mix, with what a `Corpus` has.

    Args:
        config: what was asked for.
        parts: a corpus for each entry of `config.mix`.
    """

    def __init__(self, config: DataConfig, parts: Sequence[Corpus]) -> None:
        self.config, self.parts = config, list(parts)
        self.labels = [entry.label for entry in config.mix]
        self.weights = [entry.weight for entry in config.mix]
        self.first_ids = [0, *accumulate(len(part.source) for part in self.parts)][:-1]
        reasons = [part.replaced_because for part in self.parts if part.replaced_because]
        self.replaced_because = "; ".join(reasons) or None

    @property
    def heldout(self) -> bool:
        """Whether any source holds out documents."""
        return any(part.heldout for part in self.parts)

    @property
    def shares(self) -> list[float]:
        """The part of the rows that each source gives."""
        return [weight / sum(self.weights) for weight in self.weights]

    @property
    def description(self) -> str:
        """The sources in a few words, for summaries, errors and reports."""
        each = zip(self.shares, self.labels, self.parts, strict=True)
        return "mix of " + ", ".join(
            f"{share:.1%} {label}{'' if part.description == label else f': {part.description}'}"
            for share, label, part in each
        )

    @property
    def num_documents(self) -> int | None:
        """Documents of all sources, held-out ones included; None if one has no end."""
        return _sum(part.num_documents for part in self.parts)

    @property
    def num_training_documents(self) -> int | None:
        """Documents to train on, where all are counted: in memory."""
        return _sum(part.num_training_documents for part in self.parts)

    def training_documents(self) -> list[MixPart]:
        """What to train on, source by source.

        Raises:
            DataError: the held-out documents do not fit a source.
        """
        each = zip(self.labels, self.weights, self.parts, self.first_ids, strict=True)
        return [MixPart(label, weight, part.training_documents(), first) for label, weight, part, first in each]

    def heldout_documents(self, tokenizer: Tokenizer) -> list[Document]:
        """The held-out documents of all, each named "label/name" and numbered through all sources.

        Raises:
            DataError: as `Corpus.heldout_documents`.
        """
        return [
            Document(first + document.number, f"{label}/{document.name}", document.text)
            for label, part, first in zip(self.labels, self.parts, self.first_ids, strict=True)
            for document in part.heldout_documents(tokenizer)
        ]

    @property
    def max_eval_tokens(self) -> int | None:
        """Tokens to evaluate on, of all sources together; None for all."""
        return self.config.max_eval_tokens or max(part.max_eval_tokens or 0 for part in self.parts) or None

    def entropy_floor_nats(self, tokenizer: Tokenizer) -> float | None:
        """Not known of a mix."""
        return None

    def index(self) -> dict[str, Any]:
        """What the corpora are, as plain values for `data_index.json`."""
        indices = [part.index() for part in self.parts]
        return {
            "source": "mix",
            "asked_for": "mix",
            "replaced_because": self.replaced_because,
            "description": self.description,
            "fingerprint": "; ".join(index["fingerprint"] for index in indices),
            "num_documents": self.num_documents,
            "held_out_rule": "; ".join(
                f"{label}: {index['held_out_rule']}" for label, index in zip(self.labels, indices, strict=True)
            ),
            "read": "; ".join(dict.fromkeys(index["read"] for index in indices)),
            "paths": [path for index in indices for path in index["paths"]],
            "files": [file for index in indices for file in index["files"]],
            "mix": [
                {"name": label, "weight": weight, "share": share, **index}
                for label, weight, share, index in zip(self.labels, self.weights, self.shares, indices, strict=True)
            ],
        }


def _sum(counts: Any) -> int | None:
    counts = list(counts)
    return None if None in counts else sum(counts)
