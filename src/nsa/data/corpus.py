"""The corpus of one run: its source, opened once, split into documents to train on and held-out ones.

    corpus = open_corpus(DataConfig())
    corpus.num_documents, corpus.index()["fingerprint"]

`index()` is what `data_index.json` holds about it.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import asdict
from functools import cached_property
from typing import Any

from nsa.data.config import DataConfig, MixedSource
from nsa.data.errors import DataError, printable
from nsa.data.heldout import SEARCHED_CHUNKS, find_heldout, heldout_rule, with_end_apart
from nsa.data.mix import MixedCorpus
from nsa.data.progress import say
from nsa.data.sources.base import Document, Source
from nsa.data.sources.open import open_source
from nsa.data.sources.synthetic import SyntheticDocuments
from nsa.data.stream.shuffle import TrainingDocuments
from nsa.data.tokenizers import ByteTokenizer, Tokenizer

EVAL_TOKENS = 2**20  # to evaluate on where documents are not in memory, unless the config says how many
FALLBACK_HELDOUT = 0.05
MAX_NAMED = 4  # paths in the description of a source


def open_corpus(config: DataConfig) -> Corpus | MixedCorpus:
    """Open the source of a run, or all of a mix; synthetic data in its place only where `config.on_error` says so.

    Raises:
        DataError: the source cannot be used.
    """
    if config.source == "mix":
        return MixedCorpus(config, [_open_part(config, entry) for entry in config.mix])
    return _open_one(config)


def _open_part(config: DataConfig, entry: MixedSource) -> Corpus:
    try:
        return _open_one(config.of(entry))
    except DataError as error:
        raise DataError(f"data.mix, {entry.label}: {error}") from error


def _open_one(config: DataConfig) -> Corpus:
    try:
        return Corpus(config, open_source(config))
    except DataError as error:
        if config.on_error != "synthetic" or config.source == "synthetic":
            raise
        say(f"SYNTHETIC DATA in place of {config.source}, as data.on_error says: {error}")
        source = SyntheticDocuments(config.synthetic_task, config.synthetic_length)
        return Corpus(config, source, replaced_because=str(error))


class Corpus:
    """Documents to train on and held-out ones.

    Args:
        config: what was asked for.
        source: the documents.
        replaced_because: the error for which `source` is synthetic data in place of what was asked for.
    """

    def __init__(self, config: DataConfig, source: Source, replaced_because: str | None = None) -> None:
        self.config, self.source, self.replaced_because = config, source, replaced_because
        self.heldout = config.heldout
        if replaced_because and not isinstance(config.heldout, float | int):
            self.heldout = FALLBACK_HELDOUT
        self._found: list[Document] | None = None  # held-out documents, for the tokenizer of the run
        self._end_of: str | None = None  # the one document whose end is held out
        if len(source) == 1 and isinstance(self.heldout, float) and self.heldout:
            self._end_of, self.source = source[0].name, with_end_apart(source, self.heldout)

    @property
    def parts(self) -> list[Corpus]:
        """Itself, the only one."""
        return [self]

    @property
    def description(self) -> str:
        """The source in a few words, for summaries, errors and reports."""
        config = self.config
        if self.replaced_because:
            task = f"{config.synthetic_task} of {config.synthetic_length}"
            return f"SYNTHETIC DATA ({task}) in place of {config.source}: {self.replaced_because}"
        details = {
            "fineweb_edu": f" ({config.hub_repo}, {config.hub_subset}, {config.hub_access})",
            "synthetic": f" ({config.synthetic_task} of {config.synthetic_length})",
        }
        more = f" and {len(config.paths) - MAX_NAMED:,} more" if len(config.paths) > MAX_NAMED else ""
        given = printable(f" ({', '.join(config.paths[:MAX_NAMED])}{more})") if config.paths else ""
        return config.source + details.get(config.source, given)

    @property
    def num_documents(self) -> int | None:
        """Documents in all, held-out ones included; None if they have no end."""
        return None if self.source.in_random_order else len(self.source)

    @property
    def num_training_documents(self) -> int | None:
        """Documents to train on, where they are counted: in memory."""
        return self._training.num_documents

    @cached_property
    def _is_held_out(self) -> Callable[[str], bool]:
        if self._end_of:
            return lambda name: name != self._end_of
        return heldout_rule(self.source, self.heldout)

    @cached_property
    def _training(self) -> TrainingDocuments:
        return TrainingDocuments(self.source, self._is_held_out, self.heldout)

    def training_documents(self) -> TrainingDocuments:
        """What to train on.

        Raises:
            DataError: the held-out documents do not fit the source.
        """
        return self._training

    def heldout_documents(self, tokenizer: Tokenizer) -> list[Document]:
        """The held-out documents, ascending; if not in memory, as many as are evaluated on.

        Raises:
            DataError: the held-out documents do not fit the source, none is found, or one cannot be read.
        """
        if not self.heldout:
            return []
        if self._found is None:
            self._found = find_heldout(self.source, self._is_held_out, tokenizer, self.max_eval_tokens)
        if not self._found:
            raise DataError(
                f"data.heldout {self.heldout} chooses none of the {len(self.source):,} documents, of which "
                f"{SEARCHED_CHUNKS:,} chunks are searched at most; raise it, or name some"
            )
        return self._found

    @property
    def max_eval_tokens(self) -> int | None:
        """Tokens to evaluate on; None for all."""
        return self.config.max_eval_tokens or (None if self.source.in_memory else EVAL_TOKENS)

    def entropy_floor_nats(self, tokenizer: Tokenizer) -> float | None:
        """Least loss per token that the data allows, where it is known: for synthetic data as bytes."""
        if isinstance(self.source, SyntheticDocuments) and isinstance(tokenizer, ByteTokenizer):
            return self.source.entropy_floor_nats
        return None

    def index(self) -> dict[str, Any]:
        """What the corpus is, as plain values for `data_index.json`."""
        config = self.config
        values: dict[str, Any] = {
            "source": "synthetic" if self.replaced_because else config.source,
            "asked_for": config.source,
            "replaced_because": self.replaced_because,
            "description": self.description,
            "fingerprint": self.source.fingerprint,
            "num_documents": self.num_documents,
            "held_out_rule": self._rule_text(),
            "read": "into memory at the start" if self.source.in_memory else "by chunks during the run",
            "paths": list(config.paths),
            "files": [asdict(file) for file in self.source.files],
        }
        if config.source == "fineweb_edu":
            hub = ("hub_repo", "hub_subset", "hub_revision", "hub_num_files", "hub_access")
            values |= {name: getattr(config, name) for name in hub}
        if isinstance(self.source, SyntheticDocuments):
            values |= {"synthetic_task": self.source.task, "synthetic_length": self.source.length}
            values |= {"entropy_floor_nats_per_byte": self.source.entropy_floor_nats}
        return values

    def _rule_text(self) -> str:
        if self._end_of:
            return f"the end of {self._end_of}, about {self.heldout:g} of it"
        if isinstance(self.heldout, float | int):
            return f"a fraction of {self.heldout:g}, by BLAKE2b of the name"
        return "names and patterns: " + "; ".join(self.heldout)
