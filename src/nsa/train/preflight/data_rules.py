"""The checks that read the data: is it there, is it enough, does it fit the tokenizer, is the held-out set apart."""

from __future__ import annotations

import hashlib
from collections.abc import Iterator
from itertools import islice

from nsa.data.corpus import Corpus, open_corpus
from nsa.data.documents import Documents
from nsa.data.errors import DataError
from nsa.data.loader import build_train_loader
from nsa.data.tokenizers import Tokenizer
from nsa.train.config import RunConfig
from nsa.train.preflight.findings import Finding

SAMPLE = 64  # documents whose length stands for that of all
MAX_COMPARED = 100_000  # training documents whose texts are compared with the held-out ones
MAX_BLOCKS = 2  # blocks of a source that is not in memory which are read for that
MAX_EVAL_TOKENS = 2**17  # held-out tokens that are looked for in such a source
REPEATS = 4.0  # epochs after which more of the same text hardly teaches


def check_data(config: RunConfig, tokenizer: Tokenizer, world_size: int) -> list[Finding]:
    """Open the source, find held-out documents, and get the first batch.

    A dataset of the Hub is looked at through one of its files, which is streamed: nothing is downloaded whole.
    """
    data, train = config.data, config.train
    needed = train.micro_batch_rows * train.sequence_length * world_size
    data = data.model_copy(
        update={
            "shuffle_window_tokens": min(needed, data.shuffle_window_tokens),
            "max_eval_tokens": min(data.max_eval_tokens or MAX_EVAL_TOKENS, MAX_EVAL_TOKENS),
            **({"hub_access": "stream", "hub_num_files": 1} if data.source == "fineweb_edu" else {}),
        }
    )
    try:
        corpus = open_corpus(data)
        findings = [*_replaced(corpus), *_tokens(corpus, tokenizer, config), *_overlap(corpus, tokenizer)]
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


def _replaced(corpus: Corpus) -> Iterator[Finding]:
    if corpus.replaced_because:
        yield Finding("data-replaced", "warning", corpus.description, "mend the source, or set data.on_error to stop")


def _tokens(corpus: Corpus, tokenizer: Tokenizer, config: RunConfig) -> Iterator[Finding]:
    """What the tokenizer makes of some documents, and how often the run reads all of them."""
    texts = [text for _, text in islice(_training(corpus), SAMPLE)]
    encoded = tokenizer.encode_batch(texts)
    highest = max((int(ids.max()) for ids in encoded if len(ids)), default=0)
    if max(highest, tokenizer.eos_id) >= tokenizer.vocab_size:
        yield Finding(
            "tokenizer",
            "error",
            f"{tokenizer.name} gives token {max(highest, tokenizer.eos_id)}, its vocabulary has {tokenizer.vocab_size}",
            "save the tokenizer again, or take another (data.tokenizer)",
        )
    if corpus.num_documents is None or not encoded or config.data.source == "fineweb_edu":
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


def _overlap(corpus: Corpus, tokenizer: Tokenizer) -> Iterator[Finding]:
    """A held-out document that is trained on too, under its own name or another."""
    source, indices = corpus.heldout_documents(tokenizer)
    if not indices:
        raise DataError("no document is held out, so there is nothing to evaluate on; set data.heldout")
    names = {source.name(index) for index in indices}
    texts = {_digest(source.text(index)): source.name(index) for index in indices}
    for document, text in islice(_training(corpus), MAX_COMPARED):
        name = corpus.source.name(document)
        same = name if name in names else texts.get(_digest(text))
        if same is not None:
            yield Finding(
                "heldout-overlap",
                "error",
                f"the training document {name!r} is the held-out {same!r}",
                "remove the duplicate, or hold out documents that occur once (data.heldout)",
            )
            return


def _training(corpus: Corpus) -> Iterator[tuple[int, str]]:
    """Documents to train on, in drawn order: all where they are in memory, else those of the first blocks."""
    documents = corpus.training_documents()
    order = documents.order(0, 0)
    for unit in order if isinstance(corpus.source, Documents) else order[:MAX_BLOCKS]:
        yield from documents.read([unit])


def _digest(text: str) -> bytes:
    return hashlib.blake2b(text.strip().encode(errors="surrogatepass"), digest_size=16).digest()
