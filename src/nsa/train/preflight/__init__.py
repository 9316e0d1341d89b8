"""Everything that can be known to be wrong with a run before it starts.

Reading order: `findings.py` (what can be found, by name), `rules.py` and `data_rules.py` (where each is found),
`leak.py` (does the model see the future), `report.py` (all of it together, as text and JSON). Sizes and times come from
`nsa.train.estimate`, devices from `machine.py`.
"""
