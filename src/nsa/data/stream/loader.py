"""The training stream and the evaluation batches of one run.

The documents of an epoch come in an order drawn from (seed, epoch). They are taken a shuffle window at a time,
tokenized, cut and packed into rows, and the window's rows are shuffled (`shuffle.py`), so that a batch mixes many
documents even where one document fills eighty rows. What does not fill the window's last row opens the next window.
The stream of rows does not depend on the number of ranks: of each world_size * rows_per_batch rows, rank r takes the
r-th rows_per_batch ones.

    >>> sizes = dict(sequence_length=512, rows_per_batch=4)
    >>> loader = build_train_loader(DataConfig(), tokenizer=ByteTokenizer(), seed=0, **sizes)
    >>> next(loader).input_ids.shape
    torch.Size([4, 512])
    >>> state = loader.state_dict()          # a small JSON object, the same on all ranks
    >>> loader = build_train_loader(DataConfig(), tokenizer=ByteTokenizer(), seed=0, **sizes, start=state)
"""

from __future__ import annotations

import hashlib
from collections.abc import Mapping, Sequence
from typing import Any, NamedTuple, NotRequired, TypedDict, Unpack

from nsa.data.config import DataConfig
from nsa.data.corpus import Corpus, open_corpus
from nsa.data.errors import DataError
from nsa.data.mix import MixedCorpus, MixPart, Turns
from nsa.data.sources.base import digest_of
from nsa.data.stream.eval_batches import EvalBatches
from nsa.data.stream.packing import Batch, BatchBuilder, check_sizes
from nsa.data.stream.rows import RowStream
from nsa.data.stream.shuffle import TrainingDocuments
from nsa.data.tokenizers import Tokenizer

MAX_FILES_IN_STATE = 1000  # of more files, a state does not say which of them has changed
MAX_NAMED = 3  # files in an error


class StreamOptions(TypedDict):
    """Which rows a stream has, and which of them are this process's."""

    tokenizer: Tokenizer
    """of the model"""
    sequence_length: int
    """T, input tokens in a row"""
    rows_per_batch: int
    """B, rows of this rank in a batch"""
    seed: int
    """of the order of documents and rows"""
    rank: NotRequired[int]
    """which of the `world_size` disjoint shares; 0 unless given"""
    world_size: NotRequired[int]
    """shares in all; 1 unless given"""


class StreamStatistics(NamedTuple):
    """What making the batches so far has taken.

    Attributes:
        epoch_tokens: input tokens of an epoch, where they are known: when all documents, of one source, fit one window.
        prepared_tokens: tokens of all windows opened.
        prepare_s: seconds that making those windows took.
    """

    epoch_tokens: int | None
    prepared_tokens: int
    prepare_s: float


def build_train_loader(
    config: DataConfig,
    *,
    corpus: Corpus | MixedCorpus | None = None,
    read_ahead: bool = False,
    start: Mapping[str, Any] | None = None,
    **options: Unpack[StreamOptions],
) -> TrainLoader:
    """The endless training stream of `config`'s documents, without the held-out ones.

    Args:
        config: source, held-out documents and shuffle.
        corpus: the corpus of `config`, where it is open already.
        read_ahead: make the next window on another thread while one is given out.
        start: the `state_dict` of a loader, whose number of ranks may differ, to begin exactly where it was taken.
        options: what `StreamOptions` lists.

    Raises:
        ValueError: `start` belongs to other documents, another tokenizer, row length, seed or window.
        DataError: the source is missing or malformed, the held-out documents do not fit it, or an epoch has too few
            tokens for one batch of all ranks.
    """
    return TrainLoader(
        (corpus or open_corpus(config)).training_documents(),
        window_tokens=config.shuffle_window_tokens,
        read_ahead=read_ahead,
        start=start,
        **options,
    )


def build_eval_batches(
    config: DataConfig,
    *,
    tokenizer: Tokenizer,
    sequence_length: int,
    rows_per_batch: int,
    corpus: Corpus | MixedCorpus | None = None,
) -> EvalBatches:
    """The held-out documents of `config`, for exact loss, perplexity and bits per byte; see `EvalBatches`.

    Raises:
        DataError: the source is missing or malformed, or no document is held out.
    """
    corpus = corpus or open_corpus(config)
    return EvalBatches(
        corpus.heldout_documents(tokenizer),
        tokenizer=tokenizer,
        sequence_length=sequence_length,
        rows_per_batch=rows_per_batch,
        max_tokens=corpus.max_eval_tokens,
    )


class TrainLoader:
    """An endless iterator of `Batch`es; another one can begin where its `state_dict` was taken.

    Every label of the documents (each token but a document's first) comes exactly once in an epoch; only the last
    row of an epoch, where it is incomplete, is filled up with the next epoch's tokens. In a mix that holds for each
    source; its rows come in turns (`mix.py`), and the window is shared by weight.

    Args:
        documents: what to train on, or the parts of a mix.
        window_tokens: rows are shuffled among this many tokens, which are in memory at a time.
        read_ahead: make the next window on another thread while one is given out; two are then in memory.
        tokenizer, sequence_length, rows_per_batch, seed, rank, world_size: as in `StreamOptions`.
        start: as in `build_train_loader`.

    Raises:
        ValueError: `start` is the state of other data.
        DataError: an epoch has too few tokens for one batch of all ranks, or a document cannot be read.
    """

    def __init__(
        self,
        documents: TrainingDocuments | Sequence[MixPart],
        *,
        tokenizer: Tokenizer,
        sequence_length: int,
        rows_per_batch: int,
        seed: int,
        rank: int = 0,
        world_size: int = 1,
        window_tokens: int = 2**24,
        read_ahead: bool = False,
        start: Mapping[str, Any] | None = None,
    ) -> None:
        check_sizes(sequence_length, rows_per_batch)
        if not 0 <= rank < world_size:
            raise ValueError(f"rank must be 0..{world_size - 1} for world_size {world_size}, not {rank}")
        self._eos_id = tokenizer.eos_id
        self._sequence_length, self._rows_per_batch = sequence_length, rows_per_batch
        self._rank, self._world_size, self._read_ahead = rank, world_size, read_ahead
        self._parts = list(documents) if isinstance(documents, Sequence) else [MixPart("", 1.0, documents, 0)]
        identity = (*_identity(self._parts), tokenizer.name, tokenizer.vocab_size, tokenizer.eos_id)
        settings = (sequence_length, seed, window_tokens)
        self._fingerprint = hashlib.blake2b(repr((identity, settings)).encode(), digest_size=16).hexdigest()
        self._data = {
            "documents": digest_of(repr(_identity(self._parts))),
            "files": _files(self._parts),
            "tokenizer": f"{tokenizer.name} of {tokenizer.vocab_size} tokens",
            "sequence_length": sequence_length,
            "seed": seed,
            "shuffle_window_tokens": window_tokens,
        }
        self._check_window(window_tokens)
        self._turns = Turns([part.weight for part in self._parts])
        places: Sequence[Mapping[str, Any] | None] = [None] * len(self._parts)
        if start is not None:
            self._check_state(start)
            places = start.get("mix", [start])
            self._turns.taken = list(start.get("turns", [0]))
        total = sum(part.weight for part in self._parts)
        self._streams = [
            RowStream(
                part.documents,
                tokenizer,
                sequence_length=sequence_length,
                seed=seed,
                window_tokens=max(1, round(window_tokens * part.weight / total)),
                first_id=part.first_id,
                start=place,
            )
            for part, place in zip(self._parts, places, strict=True)
        ]
        self._check_enough()

    def __iter__(self) -> TrainLoader:
        return self

    def __next__(self) -> Batch:
        builder = BatchBuilder(self._rows_per_batch, self._sequence_length, self._eos_id)
        for index in range(self._rows_per_batch * self._world_size):
            stream = self._streams[self._turns.next()]
            row, tokens = stream.next_row()
            if index // self._rows_per_batch == self._rank:
                builder.add(row, tokens, stream.first_id)
        if self._read_ahead:
            for stream in self._streams:
                stream.read_ahead()
        return builder.build()

    def close(self) -> None:
        """Give up the windows that are being made ahead and end their threads; no more batches come."""
        for stream in self._streams:
            stream.close()

    @property
    def epoch(self) -> int:
        """Whole passes over the documents that lie behind the open window; of a mix, over every source."""
        return min(stream.window.epoch for stream in self._streams)

    @property
    def num_documents(self) -> int | None:
        """Documents to train on; None where they are not counted, because they are read by chunks."""
        counts = [part.documents.num_documents for part in self._parts]
        return None if None in counts else sum(count for count in counts if count is not None)

    @property
    def fingerprint(self) -> str:
        """Digest of documents, tokenizer, row length, seed and window: equal streams have equal ones."""
        return self._fingerprint

    def statistics(self) -> StreamStatistics:
        """What making the batches so far has taken."""
        return StreamStatistics(
            self._streams[0].epoch_tokens if len(self._streams) == 1 else None,
            sum(stream.prepared_tokens for stream in self._streams),
            sum(stream.prepare_s for stream in self._streams),
        )

    def state_dict(self) -> dict[str, Any]:
        """Where the stream stands after the batches given so far: JSON, equal on all ranks."""
        if len(self._streams) == 1:
            place = self._streams[0].place()
        else:
            places = [stream.place() for stream in self._streams]
            place = {"epoch": self.epoch, "mix": places, "turns": list(self._turns.taken)}
        return {**place, "fingerprint": self._fingerprint, "data": self._data}

    def _check_state(self, state: Mapping[str, Any]) -> None:
        if state.get("fingerprint") != self._fingerprint:
            raise ValueError(
                f"the loader's state is of other data: {_difference(state.get('data'), self._data)}; documents, "
                f"held-out documents, tokenizer, sequence length, seed and shuffle window must be the same to resume: "
                f"put them back as they were, or begin a new run"
            )

    def _check_window(self, window_tokens: int) -> None:
        needed = self._rows_per_batch * self._world_size * self._sequence_length
        if window_tokens < needed:
            raise ValueError(
                f"data.shuffle_window_tokens is {window_tokens} but one batch of all ranks takes {needed}; raise it"
            )

    def _check_enough(self) -> None:
        needed = self._rows_per_batch * self._world_size if len(self._parts) == 1 else 1
        for part, stream in zip(self._parts, self._streams, strict=True):
            if stream.epoch_tokens is None:  # it takes several windows, each of more than a batch
                continue
            num_rows = stream.epoch_tokens // self._sequence_length
            if num_rows < needed:
                of_part = f" of {part.label}" if part.label else ""
                raise DataError(
                    f"the {stream.window.num_documents} training documents{of_part} fill {num_rows} "
                    f"rows of {self._sequence_length} tokens, but one batch of all ranks takes {needed}; use shorter "
                    f"rows, fewer rows or more text"
                )


def _identity(parts: Sequence[MixPart]) -> tuple:
    if len(parts) == 1:
        return parts[0].documents.identity
    return ("mix", *((part.label, part.weight, *part.documents.identity) for part in parts))


def _files(parts: Sequence[MixPart]) -> dict[str, str]:
    """The digests of all files, or nothing where there are too many for a state."""
    files = [(part.label, file) for part in parts for file in part.documents.files]
    if len(files) > MAX_FILES_IN_STATE:
        return {}
    return {f"{label}/{file.name}" if label else file.name: file.digest or "" for label, file in files}


def _difference(saved: Mapping[str, Any] | None, here: Mapping[str, Any]) -> str:
    """What is other than in the saved description of the data, in words."""
    if saved is None:
        return "their digest is another one"
    before, now = saved["files"], here["files"]
    found = [f"the file {name} is missing" for name in before if name not in now]
    found += [f"the file {name} was not there" for name in now if name not in before]
    found += [f"the file {name} has other contents" for name in before if now.get(name, before[name]) != before[name]]
    if len(found) > MAX_NAMED:
        found = [*found[:MAX_NAMED], f"and {len(found) - MAX_NAMED} files more"]
    settings = [key for key in here if key not in ("files", "documents") and saved[key] != here[key]]
    found += [f"{key} was {saved[key]} and is {here[key]}" for key in settings]
    return "; ".join(found) or "the documents, or which of them are held out, are others"
