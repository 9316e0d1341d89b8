"""The checks that read the data: is it there, is it enough, does it fit the tokenizer, is the held-out set apart."""

from __future__ import annotations

import hashlib
from collections.abc import Iterator, Sequence

from nsa.data.errors import DataError
from nsa.data.heldout import split_documents
from nsa.data.loader import build_train_loader
from nsa.data.sources import Source, open_source
from nsa.data.tokenizers import Tokenizer
from nsa.train.config import RunConfig
from nsa.train.preflight.findings import Finding

SAMPLE = 64  # documents whose length stands for that of all
MAX_COMPARED = 100_000  # training documents whose texts are compared with the held-out ones
REPEATS_WARNING = 4.0  # epochs after which more of the same text hardly teaches


def check_data(config: RunConfig, tokenizer: Tokenizer, world_size: int) -> list[Finding]:
    """Open the source, split off the held-out documents, and get the first batch."""
    remedy = "correct the section data; `nsa data check` reads the whole source"
    try:
        source = open_source(config.data)
        training, heldout = split_documents(source, config.data.heldout)
        if not heldout:
            raise DataError("no document is held out, so there is nothing to evaluate on; set data.heldout")
        findings = [*_tokens(source, training, tokenizer, config), *_overlap(source, training, heldout)]
        _first_batch(config, tokenizer, world_size)
    except (DataError, ValueError, OSError) as error:
        return [Finding("data-source", "error", str(error), remedy)]
    return findings


def _tokens(source: Source, training: Sequence[int], tokenizer: Tokenizer, config: RunConfig) -> Iterator[Finding]:
    """What the tokenizer makes of some documents, and how often the run reads all of them."""
    step = max(1, len(training) // SAMPLE)
    texts = [source.text(index) for index in training[::step]]
    encoded = tokenizer.encode_batch(texts)
    highest = max((int(ids.max()) for ids in encoded if len(ids)), default=0)
    if highest >= tokenizer.vocab_size or tokenizer.eos_id >= tokenizer.vocab_size:
        yield Finding(
            "tokenizer",
            "error",
            f"{tokenizer.name} gives token {max(highest, tokenizer.eos_id)}, its vocabulary has {tokenizer.vocab_size}",
            "save the tokenizer again, or take another (data.tokenizer)",
        )
    epoch = sum(len(ids) for ids in encoded) / max(1, len(encoded)) * len(training)
    epochs = config.train.steps * config.train.batch_tokens / max(1.0, epoch)
    if epochs > REPEATS_WARNING:
        yield Finding(
            "data-repeats",
            "info",
            f"the run reads the {len(training):,} training documents, about {epoch:,.0f} tokens, {epochs:.1f} times",
            "fine for a demonstration; else more text or fewer train.steps",
        )


def _overlap(source: Source, training: Sequence[int], heldout: Sequence[int]) -> Iterator[Finding]:
    """A held-out name or text that is trained on too."""
    names = {source.name(index) for index in heldout}
    texts = {_digest(source.text(index)): source.name(index) for index in heldout}
    for index in training[:MAX_COMPARED]:
        same = source.name(index) if source.name(index) in names else texts.get(_digest(source.text(index)))
        if same is not None:
            yield Finding(
                "heldout-overlap",
                "error",
                f"the training document {source.name(index)!r} is the held-out {same!r}",
                "remove the duplicate, or hold out documents that occur once (data.heldout)",
            )
            return


def _digest(text: str) -> bytes:
    return hashlib.blake2b(text.strip().encode(errors="surrogatepass"), digest_size=16).digest()


def _first_batch(config: RunConfig, tokenizer: Tokenizer, world_size: int) -> None:
    """The first batch of the run, from as few documents as fill it."""
    train = config.train
    needed = train.micro_batch_rows * train.sequence_length * world_size
    data = config.data.model_copy(update={"shuffle_window_tokens": min(needed, config.data.shuffle_window_tokens)})
    loader = build_train_loader(
        data,
        tokenizer=tokenizer,
        sequence_length=train.sequence_length,
        rows_per_batch=train.micro_batch_rows,
        seed=config.run.seed,
        world_size=world_size,
    )
    next(iter(loader))
