"""What a run tells of itself.

Reading order: `telemetry.py` (all of it, around the loop); `recorder.py` and `progress.py` (tables, TensorBoard,
terminal), `output.py` (a terminal that goes away), `pace.py` and `eta.py`, `heartbeat_writer.py`, `stacks.py`,
`health_probe.py` (gates and selection), `profiler.py`. docs/operations.md is the guide.
"""
