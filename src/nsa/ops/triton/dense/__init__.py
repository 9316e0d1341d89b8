"""Attention to intervals of keys: the compressed branch, the window, and the selected branch's forced blocks.

Reading order: `step.py` (one step of a tile), `forward.py`, `backward.py`, `forced.py` (initial and local blocks as
intervals); for Hopper, in Gluon, `mask_sm90.py` (who sees whom), `forward_sm90.py`, `forced_sm90.py` (its
mask for the forced blocks), `dkdv_sm90.py`, `dq_sm90.py`.
"""
