"""Several sources as one: rows by weight, held-out documents of all, and what the run's index says about them.

Each source has its own documents, held-out documents, windows and epochs. After n rows each has given `weight * n` of
them (weights that sum to one) to within a row or two, in turns that depend on the weights alone.

>>> turns = Turns([3, 1])
>>> [turns.next() for _ in range(8)]
[0, 0, 1, 0, 0, 0, 1, 0]
"""

from __future__ import annotations

from bisect import bisect_right
from collections.abc import Sequence
from dataclasses import dataclass
from itertools import accumulate
from typing import TYPE_CHECKING, Any

from nsa.data.config import DataConfig
from nsa.data.sources.base import Source
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


class MixedDocuments:
    """Documents of several sources in one row of numbers, each named "label/name".

    Args:
        labels: a name for each source.
        sources: the documents.
        first_ids: number of the first document of each, ascending.
    """

    def __init__(self, labels: Sequence[str], sources: Sequence[Source], first_ids: Sequence[int]) -> None:
        self._labels, self._sources, self._first_ids = labels, sources, first_ids

    @property
    def fingerprint(self) -> str:
        return repr([(label, source.fingerprint) for label, source in zip(self._labels, self._sources, strict=True)])

    def __len__(self) -> int:
        return sum(map(len, self._sources))

    def name(self, index: int) -> str:
        number = self._number(index)
        return f"{self._labels[number]}/{self._sources[number].name(index - self._first_ids[number])}"

    def text(self, index: int) -> str:
        number = self._number(index)
        return self._sources[number].text(index - self._first_ids[number])

    def _number(self, index: int) -> int:
        return bisect_right(self._first_ids, index) - 1


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

    def heldout_documents(self, tokenizer: Tokenizer) -> tuple[Source, Sequence[int]]:
        """A source that has the held-out documents of all, and their indices.

        Raises:
            DataError: a held-out document cannot be read.
        """
        each = [part.heldout_documents(tokenizer) for part in self.parts]
        indices = [first + index for first, (_, held) in zip(self.first_ids, each, strict=True) for index in held]
        return MixedDocuments(self.labels, [source for source, _ in each], self.first_ids), indices

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
