"""Text to packed training rows and exact evaluation batches.

Reading order: `config.py` (what can be set), `sources.py` (documents: in memory, `documents.py`, or by `blocks.py`;
from `files.py`, `jsonl.py`, `parquet.py`, `hub.py` or `synthetic.py`), `heldout.py` and `corpus.py` (which of them are
trained on), `tokenizers.py`, `packing.py` and `windows.py` (documents to rows), `loader.py` (the stream), `prefetch.py`
(the stream made ahead, by `background.py`), `eval_batches.py`; `check.py` runs the loader alone. `errors.py` and
`progress.py` are what it says. docs/data.md is the guide.
"""

from __future__ import annotations

import importlib
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from nsa.data.config import DataConfig as DataConfig
    from nsa.data.corpus import Corpus as Corpus, open_corpus as open_corpus
    from nsa.data.documents import Documents as Documents, Source as Source
    from nsa.data.errors import DataError as DataError, DataTimeoutError as DataTimeoutError
    from nsa.data.eval_batches import EvalBatches as EvalBatches
    from nsa.data.loader import (
        TrainLoader as TrainLoader,
        build_eval_batches as build_eval_batches,
        build_train_loader as build_train_loader,
    )
    from nsa.data.packing import Batch as Batch
    from nsa.data.prefetch import Prefetcher as Prefetcher, build_prefetcher as build_prefetcher
    from nsa.data.sources import open_source as open_source
    from nsa.data.tokenizers import (
        ByteTokenizer as ByteTokenizer,
        Tokenizer as Tokenizer,
        load_tokenizer as load_tokenizer,
    )
    from nsa.data.windows import ChosenDocuments as ChosenDocuments

# Imported when first used, so that reading a config needs no torch.
_MODULES = {
    "Batch": "packing",
    "ByteTokenizer": "tokenizers",
    "ChosenDocuments": "windows",
    "Corpus": "corpus",
    "DataConfig": "config",
    "DataError": "errors",
    "DataTimeoutError": "errors",
    "Documents": "documents",
    "EvalBatches": "eval_batches",
    "Prefetcher": "prefetch",
    "Source": "documents",
    "Tokenizer": "tokenizers",
    "TrainLoader": "loader",
    "build_eval_batches": "loader",
    "build_prefetcher": "prefetch",
    "build_train_loader": "loader",
    "load_tokenizer": "tokenizers",
    "open_corpus": "corpus",
    "open_source": "sources",
}

__all__ = list(_MODULES)  # pyright: ignore[reportUnsupportedDunderAll]


def __getattr__(name: str) -> Any:
    if name not in _MODULES:
        raise AttributeError(f"module 'nsa.data' has no attribute {name!r}")
    return getattr(importlib.import_module(f"nsa.data.{_MODULES[name]}"), name)


def __dir__() -> list[str]:
    return sorted([*globals(), *_MODULES])
