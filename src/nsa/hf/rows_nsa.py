"""How the tokens of a call become rows that begin with their first real token, and how outputs go back.

`generate()` pads a batch on the left, but NSA counts positions and blocks from each row's first real token. So at the
model's entry the real tokens of each row are moved to its front (`Rows.align`), all layers and caches work on such
rows, and at the exit hidden states return to where the tokens stood (`Rows.restore`).

Shapes: B rows, T columns of the call, W columns after alignment (at most T), C features.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace

import torch
from torch import Tensor, nn

from nsa.ops.packed import packed_positions

RESTARTS = (
    "positions that restart at 0 mark documents packed into a single row, without padding and without a cache; flatten "
    "the batch to [1, B*T], leave attention_mask out, give padding at the end a document of its own (or its bounds in "
    "cu_seqlens), and use_cache=False. Leaving position_ids out would let the documents see each other"
)


@dataclass(frozen=True)
class Rows:
    """The rows of one call.

    Attributes:
        positions: position of each aligned token in its row or document, `[B or 1, W]`.
        num_new: real tokens of each row, or None when all are.
        order: column that each aligned token comes from, `[B, W]`; None when nothing moves.
        rank: aligned column that each column goes to, `[B, T]`; None when nothing moves.
        real: which columns hold real tokens, `[B, T]`; None when all do.
        num_prefix: P aligned tokens before those of the call, whose keys and values the layers are given.
    """

    positions: Tensor
    num_new: tuple[int, ...] | None = None
    order: Tensor | None = None
    rank: Tensor | None = None
    real: Tensor | None = None
    num_prefix: int = 0

    def behind(self, num_prefix: int) -> Rows:
        """These rows behind `num_prefix` further tokens; W counts them."""
        first = torch.arange(num_prefix, device=self.positions.device).expand(self.positions.shape[0], -1)
        positions = torch.cat([first, self.positions + num_prefix], dim=1)
        num_new = None if self.num_new is None else tuple(n + num_prefix for n in self.num_new)
        return replace(self, positions=positions, num_new=num_new, num_prefix=num_prefix)

    def align(self, x: Tensor) -> Tensor:
        """`[B, T, C] -> [B, W, C]`: real tokens first, behind zeros for a prefix."""
        x = x if self.order is None else x.gather(1, self.order.unsqueeze(-1).expand(-1, -1, x.shape[-1]))
        return nn.functional.pad(x, (0, 0, self.num_prefix, 0)) if self.num_prefix else x

    def restore(self, x: Tensor) -> Tensor:
        """`[B, W, C] -> [B, T, C]`: every token where it stood; zeros for padding."""
        x = x[:, self.num_prefix :]
        if self.rank is not None:
            x = x.gather(1, self.rank.unsqueeze(-1).expand(-1, -1, x.shape[-1]))
        return x if self.real is None else x.masked_fill(~self.real.unsqueeze(-1), 0.0)


def arrange_rows(
    x: Tensor,
    attention_mask: Tensor | None,
    position_ids: Tensor | None,
    cached: Sequence[int] | None,
    num_columns: int,
) -> Rows:
    """The rows of a call that is not packed.

    A compiled call without a cache reads no contents of the mask on the host: it moves the tokens of every row, and
    leaves out those between which the mask has holes.

    Args:
        x: token embeddings `[B, T, C]`.
        attention_mask: `[B, num_columns + T]`, nonzero for real tokens; None when all are.
        position_ids: `[B or 1, T]`; only checked.
        cached: real tokens of each row in the cache, () while it is empty; None where the call has no cache.
        num_columns: tokens that the cache has seen, with their padding.

    Raises:
        ValueError: the mask has holes or does not fit the cache, or positions are not those of the tokens.
    """
    batch, length = x.shape[:2]
    if cached and len(cached) != batch:
        raise ValueError(f"the cache holds {len(cached)} rows but the input has {batch}")
    old = tuple(cached or ())
    first = torch.tensor(old if len(set(old)) > 1 else old[:1] or (0,), device=x.device).unsqueeze(1)
    column = torch.arange(length, device=x.device).unsqueeze(0)
    lazy = cached is None and torch.compiler.is_compiling()
    real = _real_columns(attention_mask, batch, length, old, num_columns, lazy)
    if real is None:
        rows = Rows(first + column)
        _check_positions(position_ids, rows.positions, None, batch)
        return rows
    rank = real.cumsum(1) - 1
    counts = real.sum(1)
    _check_positions(position_ids, first + rank, real, batch)
    if lazy:
        return Rows(first + column, None, _real_first(real), rank.clamp(min=0), real)
    num_new = tuple(counts.tolist())
    if bool((real == (column < counts.unsqueeze(1))).all()):  # on the right, where causality hides it
        return Rows(first + column, num_new, real=real)
    width = max(1, *num_new)
    return Rows(first + column[:, :width], num_new, _real_first(real)[:, :width], rank.clamp(min=0), real)


def packed_rows(x: Tensor, cu_seqlens: Tensor, position_ids: Tensor | None) -> Rows:
    """Rows of documents packed one after another: positions restart at each (B = 1).

    A compiled call does not compare `position_ids` with the bounds, as it does not read the bounds on the host.

    Raises:
        ValueError: `position_ids` are others.
    """
    positions = packed_positions(cu_seqlens, x.shape[1]).unsqueeze(0)
    if not torch.compiler.is_compiling():
        _check_positions(position_ids, positions, None, 1)
    return Rows(positions)


def check_prompts(attention_mask: Tensor) -> None:
    """Each row of `[B, T]` ends with a real token, behind which `generate()` can put the next one.

    Raises:
        ValueError: a row is empty, or is padded on the right.
    """
    empty, ends = ~attention_mask.any(1), attention_mask[:, -1:].any(1)
    if bool(ends.all()):
        return
    row = int((~ends).nonzero()[0])
    if bool(empty[row]):
        raise ValueError(f"row {row} has no token: an empty prompt; give it at least one, such as the tokenizer's bos")
    raise ValueError(
        f"row {row} is padded on the right, so that new tokens would stand behind padding; pad on the left "
        f'(tokenizer.padding_side = "left")'
    )


def documents_of(position_ids: Tensor | None) -> Tensor | None:
    """Bounds of packed documents, int32 `[documents + 1]`, where positions restart at 0; None where they do not."""
    if position_ids is None or position_ids.ndim != 2 or position_ids.shape[0] != 1:
        return None
    positions = position_ids[0]
    starts = (positions == 0).nonzero().flatten()
    if starts.numel() < 2 or starts[0] != 0:
        return None
    return torch.cat([starts, starts.new_tensor([positions.numel()])]).to(torch.int32)


def _real_first(real: Tensor) -> Tensor:
    """Columns `[B, T]` in the order real ones, then the others."""
    return (~real).to(torch.int8).argsort(dim=1, stable=True)


def _real_columns(
    attention_mask: Tensor | None, batch: int, length: int, old: tuple[int, ...], num_columns: int, lazy: bool
) -> Tensor | None:
    """Which of the call's columns are real, `[B, T]` bool; None when all are. A lazy call does not look at them."""
    if attention_mask is None:
        return None
    if attention_mask.ndim != 2:
        raise ValueError(f"attention_mask must be [B, T] of 0 and 1, not {list(attention_mask.shape)}")
    if attention_mask.shape != (batch, num_columns + length):
        raise ValueError(
            f"attention_mask is {list(attention_mask.shape)} but {batch} rows have {num_columns} cached and {length} "
            f"new tokens with their padding; give [{batch}, {num_columns + length}]"
        )
    mask = attention_mask != 0
    if lazy:
        return mask
    real = mask[:, num_columns:]
    past = mask[:, :num_columns].sum(1).tolist() if old else ()
    for row, (masked, held) in enumerate(zip(past, old, strict=True)):
        if masked != held:
            raise ValueError(
                f"attention_mask row {row} marks {masked} of the cached columns as real, but the cache holds {held} "
                f"tokens; pass the mask of the earlier calls, extended"
            )
    if bool(real.all()):
        return None
    edges = (real[:, 1:] != real[:, :-1]).sum(1) + real[:, :1].sum(1) + real[:, -1:].sum(1)
    holes = (edges > 2).nonzero().flatten().tolist()
    if holes:
        raise ValueError(
            f"attention_mask row {holes[0]} has holes: {real[holes[0]].int().tolist()[:64]}; padding may stand only "
            f"before or after a row's tokens (pack documents with cu_seqlens instead)"
        )
    return real


def _check_positions(position_ids: Tensor | None, expected: Tensor, real: Tensor | None, batch: int) -> None:
    """Positions follow from the rows; others than those are refused rather than ignored."""
    if position_ids is None:
        return
    if position_ids.ndim != 2 or position_ids.shape[0] not in (1, batch) or position_ids.shape[1] != expected.shape[1]:
        raise ValueError(f"position_ids must be [{batch} or 1, {expected.shape[1]}], not {list(position_ids.shape)}")
    wrong = position_ids != expected
    wrong = wrong if real is None else wrong & real
    if bool(wrong.any()):
        row, column = wrong.nonzero()[0].tolist()
        given = position_ids[row if position_ids.shape[0] > 1 else 0, column]
        right = expected[row if expected.shape[0] > 1 else 0, column]
        raise ValueError(
            f"position_ids give {int(given)} to token {column} of row {row}, whose position is {int(right)}: "
            + (
                RESTARTS
                if int(given) == 0
                else "positions count from each row's first real token; leave position_ids out"
            )
        )
