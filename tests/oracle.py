"""An oracle that shares nothing with the package: the definitions of the operator, one query and one head at a time.

Written from the paper (sections 3.2-3.4) in numpy and Python loops over positions. `Geo` is a plain tuple
(l, d, l', n, init, local, w); documents are handled one by one.
"""

from __future__ import annotations

import numpy as np


def softmax_attention(q, keys, values, scale):
    """One query over some keys; zeros and -inf when there are none."""
    if len(keys) == 0:
        return np.zeros(values.shape[-1]), np.array([]), -np.inf
    logits = np.array([scale * float(np.dot(q, k)) for k in keys])
    top = logits.max()
    weights = np.exp(logits - top)
    total = weights.sum()
    return (weights / total) @ values, weights / total, top + np.log(total)


def compressed_tokens(x, geo):
    """Mean of each complete block of `[T, D]`."""
    size, stride = geo[0], geo[1]
    blocks, start = [], 0
    while start + size <= len(x):
        blocks.append(x[start : start + size].mean(axis=0))
        start += stride
    return np.array(blocks).reshape(-1, x.shape[-1])


def importance_of_block(j, p_cmp, geo):
    """Eq. 9 by counting positions: the share of compressed block i that lies in selection block j, in strides."""
    size, stride, block = geo[0], geo[1], geo[2]
    total = 0.0
    for i, p in enumerate(p_cmp):
        shared = sum(1 for pos in range(i * stride, i * stride + size) if j * block <= pos < (j + 1) * block)
        total += shared / stride * p
    return total


def chosen_blocks(t, importance, geo):
    """Forced blocks, then the rest by importance with ties to the lower index; `importance` is a function of j."""
    block, count, init, local = geo[2], geo[3], geo[4], geo[5]
    own = t // block
    chosen = []
    for j in [*range(init), *range(own, own - local, -1)]:
        if 0 <= j <= own and j not in chosen:
            chosen.append(j)
    rest = [j for j in range(own + 1) if j not in chosen]
    rest.sort(key=lambda j: (-importance(j), j))
    return sorted(chosen + rest[: max(0, count - len(chosen))])


def document(q, k, v, k_cmp, v_cmp, k_win, v_win, gates, geo, scale):
    """One document: q `[T,H,Dk]`, keys `[T,K,Dk]`, ... -> outputs of the branches, combined output, blocks, lses."""
    length, heads = q.shape[:2]
    groups = k.shape[1]
    per_group = heads // groups
    size, stride, block, window = geo[0], geo[1], geo[2], geo[6]
    outs = {name: np.zeros((length, heads, v.shape[-1])) for name in ("cmp", "slc", "win", "all")}
    lses = {name: np.full((length, heads), -np.inf) for name in ("cmp", "slc", "win")}
    blocks = [[None] * groups for _ in range(length)]
    for t in range(length):
        for g in range(groups):
            visible = [i for i in range(len(k_cmp)) if i * stride + size - 1 <= t]
            probabilities = []
            for h in range(g * per_group, (g + 1) * per_group):
                outs["cmp"][t, h], p, lses["cmp"][t, h] = softmax_attention(
                    q[t, h], k_cmp[visible, g], v_cmp[visible, g], scale
                )
                probabilities.append(p)
            summed = np.sum(probabilities, axis=0)
            blocks[t][g] = chosen_blocks(t, lambda j, p=summed: importance_of_block(j, p, geo), geo)
            seen = [p for j in blocks[t][g] for p in range(j * block, (j + 1) * block) if p <= t]
            near = list(range(max(0, t - window + 1), t + 1))
            for h in range(g * per_group, (g + 1) * per_group):
                outs["slc"][t, h], _, lses["slc"][t, h] = softmax_attention(q[t, h], k[seen, g], v[seen, g], scale)
                outs["win"][t, h], _, lses["win"][t, h] = softmax_attention(
                    q[t, h], k_win[near, g], v_win[near, g], scale
                )
                outs["all"][t, h] = sum(gates[t, h, c] * outs[n][t, h] for c, n in enumerate(("cmp", "slc", "win")))
    return outs, lses, blocks
