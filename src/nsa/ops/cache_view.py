"""What decoding reads: views of a layer's cache, `CacheView` for `nsa_decode` and `PagedView` for `paged_decode`.

Shapes: B rows, S tokens of capacity, N compressed tokens of capacity, W window tokens held, Hkv groups; P pages in the
pool, M pages a row, l' tokens a page, r = l'/d compressed tokens of a page.
Each row is left-aligned: row b's tokens are at positions 0 .. lengths[b]-1, whatever padding came with them.
"""

from __future__ import annotations

from typing import NamedTuple

from torch import Tensor


class CacheView(NamedTuple):
    """Keys and values of one layer after an append; entries past a row's length are undefined and never read.

    Attributes:
        k, v: `[B, S, Hkv, D]`, the selected branch's keys and values from position 0.
        k_cmp, v_cmp: `[B, N, Hkv, D]`, compressed tokens from index 0; row b has num_compressed(lengths[b]) of them.
        k_win, v_win: `[B, W, Hkv, D]`, the window branch's newest tokens; entry i of row b has position
            win_start[b] + i, and every position from max(0, lengths[b] - num_new[b] - w + 1) on is held.
        lengths: tokens in each row, the newest included.
        num_new: tokens of each row that the last append added; they are the queries of the step.
        win_start: position of each row's first entry in k_win.
    """

    k: Tensor
    v: Tensor
    k_cmp: Tensor
    v_cmp: Tensor
    k_win: Tensor
    v_win: Tensor
    lengths: tuple[int, ...]
    num_new: tuple[int, ...]
    win_start: tuple[int, ...]


class PagedView(NamedTuple):
    """Keys and values of one layer in pages of one selection block, after the step's own tokens were written.

    Attributes:
        k, v: `[P, Hkv, l', D]`, the selected branch's keys and values.
        k_cmp, v_cmp: `[P, Hkv, r, D]`; compressed token i of a row lies in the page of its block i // r.
        block_table: int32 `[B, M]`, the pool's page that holds block j of row b.
        lengths: int32 `[B]`, tokens of each row, the step's queries included; 0 for an idle row.
        k_win, v_win: `[B, Hkv, ring, D]`, the window branch's own newest tokens, position p in slot p % ring; None
            where it reads what the selected branch reads.
    """

    k: Tensor
    v: Tensor
    k_cmp: Tensor
    v_cmp: Tensor
    block_table: Tensor
    lengths: Tensor
    k_win: Tensor | None = None
    v_win: Tensor | None = None
