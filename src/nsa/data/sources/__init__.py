"""Documents with stable names, from files, the Hub, or nothing.

Reading order: `base.py` (what a source is, and the one in memory), `open.py` (from a config to a source); `files.py`,
`contents.py` and `unpack.py` (finding and reading files); `chunked.py` (large files by chunks), `jsonl.py`,
`parquet.py`, `hub.py`; `synthetic.py`.
"""
