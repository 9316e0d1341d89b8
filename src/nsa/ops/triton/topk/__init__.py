"""The choice of blocks (Eq. 8 to 12): `scores.py` and `scores_sm90.py` (importance), `choice.py` (the best n)."""
