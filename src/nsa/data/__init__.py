"""Text to packed training rows and exact evaluation batches.

Reading order: `config.py` (what can be set), `sources.py` and `heldout.py` (documents), `tokenizers.py`, `packing.py`
(documents to rows), `loader.py` (the stream, and the two functions that build it).
"""

from nsa.data.config import DataConfig
from nsa.data.errors import DataError
from nsa.data.loader import EvalBatches, TrainLoader, build_eval_batches, build_train_loader
from nsa.data.packing import Batch
from nsa.data.sources import Documents, Source, open_source
from nsa.data.tokenizers import ByteTokenizer, Tokenizer, load_tokenizer

__all__ = [
    "Batch",
    "ByteTokenizer",
    "DataConfig",
    "DataError",
    "Documents",
    "EvalBatches",
    "Source",
    "Tokenizer",
    "TrainLoader",
    "build_eval_batches",
    "build_train_loader",
    "load_tokenizer",
    "open_source",
]
