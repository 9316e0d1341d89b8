"""What a run tells of itself, and who looks at it.

Reading order: `telemetry.py` (all of it, around the loop); `recorder.py`, `csv_log.py`, `progress.py`, `eta.py` and
`output.py` (tables, TensorBoard, terminal, and a terminal that goes away), `pace.py` (tokens per second),
`heartbeat.py` and `machine.py`, `stacks.py`, `windows.py` (profiles), `probe.py` (gates and selection);
`thresholds.py` and `health.py` (what is healthy), `watch.py` and `watch_view.py` (another process looks), `folders.py`;
`environment.py`, `routes.py`, `summary.py`, `report.py` and `text.py`, `curves.py`, `page.py` (what stands in the
folder), `run_facts.py` and `compare.py` (one run or several, in any state). docs/operations.md is the guide.
"""
