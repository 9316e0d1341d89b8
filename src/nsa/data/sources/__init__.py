"""Documents with stable names, from files, the Hub, or nothing.

Reading order: `base.py` (what a source is), `chunked.py` (documents by blocks), `open.py` (from a config to a source);
`files.py`, `contents.py` and `unpack.py` (finding and reading files), `jsonl.py`, `parquet.py`, `hub.py`,
`synthetic.py`.
"""
