"""Measurements: `protocol.py` is how, every other file one benchmark of `nsa bench`.

`settings.py` is what each can be told, `prefill_picture.py` draws one.
"""
