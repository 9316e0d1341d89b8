"""Attention to the blocks that each query chose (Eq. 11 and 12).

Reading order: `invert.py` (blocks to the queries that chose them), `forward.py` and `backward.py` (by block),
`union.py` (by query, where neighbours choose from few blocks); for Hopper, in Gluon, `panels_sm90.py` (items and
blocks, rows cut into panels) with `forward_sm90.py` and `backward_sm90.py`, `parts_sm90.py` (tiles of whole tokens)
with `union_sm90.py` and `union_dq_sm90.py`.
"""
