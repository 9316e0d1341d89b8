"""Measurements, one benchmark of `nsa bench` a file.

Reading order: `settings.py` (what each can be told), `protocol.py` (how all of them measure), `prefill.py` with
`prefill_picture.py`, `decode.py`, `train.py`, `telemetry.py`.
"""
