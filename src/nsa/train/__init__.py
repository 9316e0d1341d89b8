"""The trainer.

Reading order: `loop.py` (the main path), `trainer.py` (one optimizer step), `position.py` (where a run stands);
`parallel.py` (the processes of a run), `model.py`, `activation.py` (what backward computes again), `optim.py`,
`guards.py`, `stop.py`; `checkpoint/` (full state, written and read back), `telemetry/` (what a run tells of itself),
`summary.py` (how it looks before and after). Configs are in `nsa.config`, the files of a run in `nsa.runs`, its
beginning in `nsa.launch`. The guides are docs/training.md and checkpoints.md.
"""
