"""Attention to intervals of keys: the compressed branch, the window, and the selected branch's forced blocks.

Reading order: `step.py` (one step of a tile, and where loops run), `forward.py`, `backward.py`, `forced.py` (initial
and local blocks as intervals); for Hopper, in Gluon, `mask_sm90.py` (who sees whom), `forward_sm90.py`,
`forced_sm90.py` (its mask for the forced blocks), `dkdv_sm90.py`, `dq_sm90.py`.

Legend: a pair is a batch row and a group of its heads, a row one head of the group at one token (token * G + head); a
tile is BLOCK_M rows of a pair, a step BLOCK_N keys, in the kernel for dK and dV the other way round.
"""
