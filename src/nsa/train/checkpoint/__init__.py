"""A run's full state on disk: `save.py` (while training goes on), `load.py`, `read.py` (strangers' files), `rng.py`."""
