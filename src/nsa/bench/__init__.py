"""Measurements: `protocol.py` is how, every other file one benchmark of `nsa bench`, and `smoke.py` is `nsa smoke`."""
