"""A run as files, and who reads them. Nothing here imports torch, so that any machine can watch a run.

Reading order: `folder.py` (what lies where), `files.py`, `lock.py` and `places.py` (no links, one writer, paths that a
user gives), `errors.py`; `tables.py` (CSV), `heartbeat.py` and `host.py`, `checkpoints.py` (what a whole one is),
`export.py`, `restore.py`; `halt.py`; `thresholds.py` and `health.py` (what is healthy), `watch.py` and `watch_view.py`;
`curves.py`, `report.py`, `page.py` and `markdown.py`; `facts.py` and `compare.py` (one run or several, in any state).
docs/operations.md is the guide.
"""
