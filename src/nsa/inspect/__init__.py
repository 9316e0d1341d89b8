"""Looking into a model: which blocks its queries select, and how its gates weigh the branches.

Reading order: `statistics.py` and `text_selection.py` (plain numbers, without torch), `gates.py` and `selection.py`
(recorded from a model), `one_text.py`, `picture.py`.
"""
