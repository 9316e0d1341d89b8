"""Learn the tokenizer "bpe1k" from the State of the Union messages that the showcase trains on.

    python benchmarks/learn_bpe1k.py src/nsa/data/bpe1k

Byte-level BPE with GPT-2's word pattern and 1,024 tokens; the held-out messages have no part in it.
"""

from __future__ import annotations

import sys
from pathlib import Path

from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers

from nsa.data import open_source
from nsa.data.config import DataConfig
from nsa.data.heldout import heldout_rule

END, VOCAB_SIZE = "<|endoftext|>", 1024

if __name__ == "__main__":
    config = DataConfig()
    source = open_source(config)
    is_held_out = heldout_rule(source, config.heldout)
    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    alphabet = pre_tokenizers.ByteLevel.alphabet()
    trainer = trainers.BpeTrainer(
        vocab_size=VOCAB_SIZE, special_tokens=[END], initial_alphabet=alphabet, show_progress=False
    )
    tokenizer.train_from_iterator((document.text for document in source if not is_held_out(document.name)), trainer)
    tokenizer.save(str(Path(sys.argv[1]) / "tokenizer.json"), pretty=False)
