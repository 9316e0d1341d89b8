"""Sizes of the problems that kernels are tried on."""

from __future__ import annotations

from dataclasses import dataclass, fields
from itertools import pairwise

import torch

from nsa.geometry import BlockGeometry

SMALL = BlockGeometry(8, 4, 16, 4, 1, 2, 24)


@dataclass(frozen=True, kw_only=True)
class Sizes:
    """Sizes, positions and number type of a problem.

    Args:
        tokens: queries of a sequence; the keys begin `q_start` tokens before them, those of the window `k_start` later.
        heads, groups: query heads, and key heads that they share.
        head_dim, value_head_dim: sizes of keys and values; values have that of keys if it is None.
        documents: where packed documents begin, and where the last one ends, perhaps before the tokens do.
    """

    batch: int = 1
    tokens: int = 75
    heads: int = 4
    groups: int = 1
    head_dim: int = 64
    value_head_dim: int | None = None
    geometry: BlockGeometry = SMALL
    documents: tuple[int, ...] | None = None
    q_start: int = 0
    k_start: int = 0
    dtype: torch.dtype = torch.float16

    @property
    def value_size(self) -> int:
        return self.head_dim if self.value_head_dim is None else self.value_head_dim

    @property
    def num_keys(self) -> int:
        return self.q_start + self.tokens

    @property
    def lengths(self) -> list[int]:
        """Keys of each document, of one if there are none."""
        return [b - a for a, b in pairwise(self.documents or (0, self.num_keys))]

    @property
    def num_compressed(self) -> int:
        return sum(self.geometry.num_compressed(length) for length in self.lengths)

    @property
    def num_used(self) -> int:
        """Tokens up to the end of the last document."""
        return self.tokens if self.documents is None else self.documents[-1]

    def cu_seqlens(self, device: str = "cpu") -> torch.Tensor | None:
        return None if self.documents is None else torch.tensor(self.documents, dtype=torch.int32, device=device)

    def __str__(self) -> str:
        """What is not as usual, for names of tests."""
        given = {field.name: getattr(self, field.name) for field in fields(self)}
        unusual = {field.name: given[field.name] for field in fields(self) if given[field.name] != field.default}
        return ",".join(f"{name}={_short(value)}" for name, value in unusual.items()) or "usual"


def _short(value: object) -> str:
    if isinstance(value, BlockGeometry):
        return "-".join(str(n) for n in value.as_tuple())
    if isinstance(value, tuple):
        return "-".join(str(n) for n in value)
    return str(value).removeprefix("torch.")
