"""Mistakes in a config file and in the overrides behind it."""

from __future__ import annotations

from bad_inputs.case import BadInput, tiny

CASES = [
    BadInput("no such config", "train absent.yaml", ("absent.yaml", "configs/")),
    BadInput("unknown key", "train c.yaml", ("train.stepz", "train.steps"), tiny("steps: 2,", "stepz: 2,")),
]
