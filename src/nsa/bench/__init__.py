"""Measurements: `protocol.py` is how, `settings.py` what can be told, every other file one benchmark of `nsa bench`;
`smoke.py` is `nsa smoke`.
"""
