"""Text to packed training rows and exact evaluation batches.

Reading order: `config.py` (what can be set), `sources.py` (documents: in memory, `documents.py`, or by `blocks.py`;
from `files.py`, `contents.py`, `unpack.py`, `jsonl.py`, `parquet.py`, `hub.py` or `synthetic.py`), `heldout.py` and
`corpus.py` (which of them are trained on), `mix.py` (several sources as one), `tokenizers.py`, `packing.py`,
`windows.py` and `rows.py` (documents to rows), `loader.py` (the stream), `prefetch.py` (the stream made ahead, by
`background.py`), `eval_batches.py`; `check.py` runs the loader alone. `errors.py` and `progress.py` are what it says.
docs/data.md is the guide.
"""

from nsa.data.config import DataConfig
from nsa.data.corpus import Corpus, open_corpus
from nsa.data.documents import Documents, Source
from nsa.data.errors import DataError, DataTimeoutError
from nsa.data.eval_batches import EvalBatches
from nsa.data.loader import TrainLoader, build_eval_batches, build_train_loader
from nsa.data.packing import Batch
from nsa.data.prefetch import Prefetcher, build_prefetcher
from nsa.data.sources import open_source
from nsa.data.tokenizers import ByteTokenizer, Tokenizer, load_tokenizer
from nsa.data.windows import ChosenDocuments

__all__ = [
    "Batch",
    "ByteTokenizer",
    "ChosenDocuments",
    "Corpus",
    "DataConfig",
    "DataError",
    "DataTimeoutError",
    "Documents",
    "EvalBatches",
    "Prefetcher",
    "Source",
    "Tokenizer",
    "TrainLoader",
    "build_eval_batches",
    "build_prefetcher",
    "build_train_loader",
    "load_tokenizer",
    "open_corpus",
    "open_source",
]
