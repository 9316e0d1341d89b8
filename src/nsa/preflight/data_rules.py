"""The checks that read the data: is it there, is it enough, does it fit the tokenizer, is the held-out set apart.

`check_data` is preflight's, which opens the data; `check_corpus` is that of `nsa train`, which has them open.
"""

from __future__ import annotations

import hashlib
from collections.abc import Iterator, Sequence
from itertools import islice

import numpy as np

from nsa.config.findings import Finding
from nsa.config.run import RunConfig
from nsa.data.corpus import Corpus, open_corpus
from nsa.data.errors import DataError
from nsa.data.mix import MixedCorpus
from nsa.data.sources.base import Document
from nsa.data.sources.synthetic import SyntheticDocuments
from nsa.data.stream.loader import build_train_loader
from nsa.data.tokenizers import Tokenizer

SAMPLE = 64  # documents whose length stands for that of all
MAX_CHUNKS = 16  # chunks of a source that is not in memory which are compared with the held-out documents
MAX_CHARACTERS = 2**25  # of those chunks; a row group may be of any size
MAX_STREAMED_CHUNKS = 2  # the same where they come from the Hub
MAX_EVAL_TOKENS = 2**12  # held-out tokens that are looked for in such a source; it may be far away
REPEATS = 4.0  # epochs after which more of the same text hardly teaches
ENCODED_CHARACTERS = 2**16  # of a document, where only the range of its tokens is of interest


def check_data(config: RunConfig, tokenizer: Tokenizer, world_size: int) -> list[Finding]:
    """Open the source, find held-out documents, and get the first batch.

    A dataset of the Hub is looked at through one of its files, which is streamed: nothing is downloaded whole.
    """
    data, train = config.data, config.train
    needed = train.micro_batch_rows * train.sequence_length * world_size
    streamed = {"hub_access": "stream", "hub_num_files": 1}
    data = data.model_copy(
        update={
            "shuffle_window_tokens": min(needed, data.shuffle_window_tokens),
            "max_eval_tokens": min(data.max_eval_tokens or MAX_EVAL_TOKENS, MAX_EVAL_TOKENS),
            "mix": tuple(e.model_copy(update=streamed if e.source == "fineweb_edu" else {}) for e in data.mix),
            **(streamed if data.source == "fineweb_edu" else {}),
        }
    )
    try:
        corpus = open_corpus(data)
        findings = [
            *_replaced(corpus),
            *_epochs(corpus, tokenizer, config),
            *_overlap(corpus, tokenizer),
        ]
        loader = build_train_loader(
            data,
            tokenizer=tokenizer,
            sequence_length=train.sequence_length,
            rows_per_batch=train.micro_batch_rows,
            seed=config.run.seed,
            world_size=world_size,
            corpus=corpus,
        )
        next(iter(loader))
    except (ValueError, OSError) as error:
        remedy = "correct the section data; `nsa data check` reads on"
        return [Finding("data-source", "error", str(error), remedy)]
    return findings


def check_corpus(corpus: Corpus | MixedCorpus, tokenizer: Tokenizer) -> list[Finding]:
    """What can be found in little time in data that are open: in all of them in memory, else in the first chunks.

    Raises:
        DataError: no document is held out, or one cannot be read.
    """
    texts = [document.text[:ENCODED_CHARACTERS] for document in islice(_training(corpus), SAMPLE)]
    beyond = _beyond_vocabulary(tokenizer.encode_batch(texts), tokenizer)
    return [*_replaced(corpus), *beyond, *_overlap(corpus, tokenizer)]


def _replaced(corpus: Corpus | MixedCorpus) -> Iterator[Finding]:
    if corpus.replaced_because:
        yield Finding("data-replaced", "warning", corpus.description, "mend the source, or set data.on_error to stop")


def _epochs(corpus: Corpus | MixedCorpus, tokenizer: Tokenizer, config: RunConfig) -> Iterator[Finding]:
    """What the tokenizer makes of some documents, and how often the run reads all of them."""
    encoded = tokenizer.encode_batch([document.text for document in islice(_training(corpus), SAMPLE)])
    yield from _beyond_vocabulary(encoded, tokenizer)
    if corpus.num_documents is None or not encoded or config.data.source in ("fineweb_edu", "mix"):
        return
    epoch = sum(len(ids) for ids in encoded) / len(encoded) * corpus.num_documents
    epochs = config.train.steps * config.train.batch_tokens / max(1.0, epoch)
    if epochs > REPEATS:
        yield Finding(
            "data-repeats",
            "info",
            f"the run reads the {corpus.num_documents:,} documents, about {epoch:,.0f} tokens, {epochs:.1f} times",
            "fine for a demonstration; else more text or fewer train.steps",
        )


def _beyond_vocabulary(encoded: Sequence[np.ndarray], tokenizer: Tokenizer) -> Iterator[Finding]:
    highest = max((int(ids.max()) for ids in encoded if len(ids)), default=0)
    if max(highest, tokenizer.eos_id) >= tokenizer.vocab_size:
        yield Finding(
            "tokenizer",
            "error",
            f"{tokenizer.name} gives token {max(highest, tokenizer.eos_id)}, its vocabulary has {tokenizer.vocab_size}",
            "save the tokenizer again, or take another (data.tokenizer)",
        )


def _overlap(corpus: Corpus | MixedCorpus, tokenizer: Tokenizer) -> Iterator[Finding]:
    """A held-out document that is trained on too, under its own name or another; drawn ones may well repeat."""
    held_out = corpus.heldout_documents(tokenizer)
    if not held_out:
        raise DataError("no document is held out, so there is nothing to evaluate on; set data.heldout")
    drawn = [part for part in corpus.parts if isinstance(part.source, SyntheticDocuments)]
    if len(drawn) == len(corpus.parts):
        return
    names = {document.name for document in held_out}
    texts = {_digest(document.text): document.name for document in held_out}
    lengths = {len(document.text.strip()) for document in held_out}  # few texts need a digest
    for _, name, text in _training(corpus):
        same = name if name in names else None
        if same is None and len(text.strip()) in lengths:
            same = texts.get(_digest(text))
        if same is not None:
            yield Finding(
                "heldout-overlap",
                "error",
                f"the training document {name!r} is the held-out {same!r}",
                "remove the duplicate, or hold out documents that occur once (data.heldout)",
            )
            return


def _training(corpus: Corpus | MixedCorpus) -> Iterator[Document]:
    """Documents to train on, in drawn order: all where they are in memory, else those of some chunks."""
    for number, part in enumerate(corpus.parts):
        documents, prefix = part.training_documents(), ""
        if isinstance(corpus, MixedCorpus):
            prefix = f"{corpus.labels[number]}/"
        chunks = documents.order(0, 0)
        if not part.source.in_memory:
            chunks = chunks[: MAX_STREAMED_CHUNKS if part.config.source == "fineweb_edu" else MAX_CHUNKS]
        num_characters = 0
        for chunk in chunks:
            for document in documents.read([chunk]):
                num_characters += len(document.text)
                yield document._replace(name=prefix + document.name)
            if not part.source.in_memory and num_characters > MAX_CHARACTERS:
                break


def _digest(text: str) -> bytes:
    return hashlib.blake2b(text.strip().encode(errors="surrogatepass"), digest_size=16).digest()
