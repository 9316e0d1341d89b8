"""Everything that can be known to be wrong with a run before it starts.

Reading order: `rules.py` and `data_rules.py` (where each of `nsa.config.findings` is found), `leak.py` (does the model
see the future), `estimate.py` (memory, time, disk) and `budget.py`, `examine.py` (all of it together, as text and
JSON); `doctor.py` (this machine), `smoke.py` (the whole way of a run). docs/before_a_run.md is the guide.
"""
