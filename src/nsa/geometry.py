"""The block arithmetic of Native Sparse Attention, as one frozen value object.

Everything that the operator, the cache, the counters and the docs need to know about blocks is here: how many
compressed tokens exist, which of them a query sees, how compressed scores map to selection blocks (paper Eq. 9), and
how many tokens a step reads. It is plain integer arithmetic and needs no torch.

    >>> geometry = BlockGeometry()
    >>> geometry.predicted_reads(65536)
    {'cmp': 4095, 'slc': 1024, 'win': 512}
    >>> geometry.overlap_weights
    (1, 2, 2, 2, 1)
"""

from __future__ import annotations

from dataclasses import dataclass, fields
from functools import cached_property

BRANCHES = ("cmp", "slc", "win")  # compressed, selected, sliding window: the order of gates and projections


@dataclass(frozen=True)
class BlockGeometry:
    """Block sizes and counts of the three branches; the defaults are the paper's (section 4.1).

    Args:
        compress_block_size: l, tokens summarised by one compressed token.
        compress_stride: d, tokens between the starts of compressed blocks; divides l and l'.
        select_block_size: l', tokens in one selection block; the blocks do not overlap.
        num_selected_blocks: n, selected blocks for each query, forced ones included.
        num_init_blocks: blocks at the start of the document that every query selects.
        num_local_blocks: the block that holds the query, and its predecessors, that every query selects.
        window_size: w, tokens in the sliding window, the query's own included.

    Raises:
        ValueError: a size is out of range, d does not divide l and l', or n has no room for the forced blocks.
    """

    compress_block_size: int = 32
    compress_stride: int = 16
    select_block_size: int = 64
    num_selected_blocks: int = 16
    num_init_blocks: int = 1
    num_local_blocks: int = 2
    window_size: int = 512

    def __post_init__(self) -> None:
        for field in fields(self):
            value = getattr(self, field.name)
            if isinstance(value, bool) or not isinstance(value, int):
                raise ValueError(f"{field.name} must be an integer, not {value!r}")
            least = 0 if field.name == "num_init_blocks" else 1
            if value < least:
                raise ValueError(f"{field.name} must be at least {least}, not {value}")
        for name in ("compress_block_size", "select_block_size"):
            size = getattr(self, name)
            if size % self.compress_stride:
                raise ValueError(
                    f"compress_stride {self.compress_stride} must divide {name} {size}; "
                    f"choose a stride that divides both block sizes"
                )
        forced = self.num_init_blocks + self.num_local_blocks
        if self.num_selected_blocks < forced:
            raise ValueError(
                f"num_selected_blocks {self.num_selected_blocks} must hold the forced blocks: num_init_blocks "
                f"{self.num_init_blocks} + num_local_blocks {self.num_local_blocks} = {forced}"
            )

    def as_tuple(self) -> tuple[int, ...]:
        """The fields in order, as `torch.library` operators take them."""
        return tuple(getattr(self, field.name) for field in fields(self))

    def num_compressed(self, length: int) -> int:
        """N(T): compressed tokens of a document of `length` tokens; also those that its last query sees."""
        if length < self.compress_block_size:
            return 0
        return (length - self.compress_block_size) // self.compress_stride + 1

    def max_num_compressed(self, total: int) -> int:
        """The most compressed tokens that documents of `total` tokens together can have, however they are cut."""
        return 0 if total < self.compress_block_size else total // self.compress_stride

    def num_select_blocks(self, length: int) -> int:
        """Selection blocks that a document of `length` tokens is cut into, the last one possibly short."""
        return -(-length // self.select_block_size)

    @cached_property
    def overlap_weights(self) -> tuple[int, ...]:
        """overlap(i, j) / d for the compressed tokens i that touch a selection block j (paper Eq. 9), a stencil.

        Entry o belongs to i = j * blocks_per_select + overlap_start + o and is the same for every j. It is an integer,
        because d divides both block sizes.
        """
        reach = self.compress_block_size // self.compress_stride
        span = self.strides_per_select
        return tuple(min(i + reach, span) - max(i, 0) for i in range(self.overlap_start, span))

    @property
    def overlap_start(self) -> int:
        """Offset of the first compressed token that touches a selection block (0 or negative)."""
        return 1 - self.compress_block_size // self.compress_stride

    @property
    def strides_per_select(self) -> int:
        """l'/d: compressed tokens that start in one selection block."""
        return self.select_block_size // self.compress_stride

    def predicted_reads(self, length: int) -> dict[str, int]:
        """Tokens that one decode step reads for a group at S tokens of context, by branch: N(S), n l', min(w, S)."""
        selected = self.num_selected_blocks * self.select_block_size
        return dict(zip(BRANCHES, (self.num_compressed(length), selected, min(self.window_size, length)), strict=True))
