"""Documents to rows to batches, without losing or repeating a token.

Reading order: `packing.py`, `shuffle.py` and `rows.py` (an epoch's documents to rows), `loader.py` (the stream),
`prefetch.py` (the stream made ahead, by `background.py`), `eval_batches.py`.
"""
