"""Measurements: `protocol.py` is how, every other file one benchmark of `nsa bench`, and `smoke.py` is `nsa smoke`.

`settings.py` is what each can be told, `prefill_picture.py` draws one, `calibration.py` tells machines apart.
"""
