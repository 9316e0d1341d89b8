"""Text to packed training rows and exact evaluation batches.

Reading order: `config.py` (what can be set), `sources/` (documents), `heldout.py` and `corpus.py` (which of them are
trained on), `mix.py` (several sources as one), `tokenizers.py`, `stream/` (rows and batches); `check.py` runs the
loader alone. `errors.py` and `progress.py` are what it says.
docs/data.md is the guide.
"""

from __future__ import annotations

import importlib
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from nsa.data.config import DataConfig as DataConfig
    from nsa.data.corpus import Corpus as Corpus, open_corpus as open_corpus
    from nsa.data.errors import DataError as DataError, DataTimeoutError as DataTimeoutError
    from nsa.data.sources.base import Document as Document, Documents as Documents, Source as Source
    from nsa.data.sources.open import open_source as open_source
    from nsa.data.stream.eval_batches import EvalBatches as EvalBatches
    from nsa.data.stream.loader import (
        StreamOptions as StreamOptions,
        TrainLoader as TrainLoader,
        build_eval_batches as build_eval_batches,
        build_train_loader as build_train_loader,
    )
    from nsa.data.stream.packing import Batch as Batch
    from nsa.data.stream.prefetch import Prefetcher as Prefetcher, build_prefetcher as build_prefetcher
    from nsa.data.stream.shuffle import TrainingDocuments as TrainingDocuments
    from nsa.data.tokenizers import (
        ByteTokenizer as ByteTokenizer,
        Tokenizer as Tokenizer,
        load_tokenizer as load_tokenizer,
    )

# Imported when first used, so that reading a config needs no torch.
_MODULES = {
    "Batch": "stream.packing",
    "ByteTokenizer": "tokenizers",
    "Corpus": "corpus",
    "DataConfig": "config",
    "DataError": "errors",
    "DataTimeoutError": "errors",
    "Document": "sources.base",
    "Documents": "sources.base",
    "EvalBatches": "stream.eval_batches",
    "Prefetcher": "stream.prefetch",
    "Source": "sources.base",
    "StreamOptions": "stream.loader",
    "Tokenizer": "tokenizers",
    "TrainLoader": "stream.loader",
    "TrainingDocuments": "stream.shuffle",
    "build_eval_batches": "stream.loader",
    "build_prefetcher": "stream.prefetch",
    "build_train_loader": "stream.loader",
    "load_tokenizer": "tokenizers",
    "open_corpus": "corpus",
    "open_source": "sources.open",
}

__all__ = list(_MODULES)  # pyright: ignore[reportUnsupportedDunderAll]


def __getattr__(name: str) -> Any:
    if name not in _MODULES:
        raise AttributeError(f"module 'nsa.data' has no attribute {name!r}")
    return getattr(importlib.import_module(f"nsa.data.{_MODULES[name]}"), name)


def __dir__() -> list[str]:
    return sorted([*globals(), *_MODULES])
