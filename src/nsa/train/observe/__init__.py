"""What a run tells of itself, and who looks at it.

Reading order: `telemetry.py` (all of it, around the loop); `recorder.py`, `csv_log.py`, `progress.py` and `eta.py`
(tables, TensorBoard, terminal), `heartbeat.py`, `stacks.py`, `windows.py` (profiles), `probe.py` (gates and selection);
`thresholds.py` and `health.py` (what is healthy), `watch.py` and `watch_view.py` (another process looks);
`environment.py`, `routes.py`, `summary.py`, `report.py`, `curves.py`, `page.py` (what stands in the folder),
`compare.py` (several runs). docs/operations.md is the guide.
"""
