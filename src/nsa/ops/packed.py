"""Packed documents: which one a row belongs to, and where in it the row stands. Nothing is read on the host.

>>> import torch
>>> packed_positions(torch.tensor([0, 3, 3, 5], dtype=torch.int32), 5)
tensor([0, 1, 2, 0, 1])
"""

from __future__ import annotations

import torch
from torch import Tensor


def document_of(rows: Tensor, bounds: Tensor) -> Tensor:
    """The document of each row; the last one for rows behind it.

    Args:
        rows: integers, of any shape.
        bounds: `[documents + 1]`, ascending from 0; documents may be empty.
    """
    document = torch.searchsorted(bounds, rows.to(bounds.dtype), right=True) - 1
    return document.clamp(max=bounds.numel() - 2)


def packed_positions(cu_seqlens: Tensor, length: int) -> Tensor:
    """The position of each of `length` packed tokens in its document, `[T]`."""
    index = torch.arange(length, device=cu_seqlens.device)
    return index - cu_seqlens[document_of(index, cu_seqlens)]
