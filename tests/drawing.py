"""Hypothesis strategies for geometries, head counts and packed documents, shared by the test files."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from hypothesis import strategies as st

from nsa import BlockGeometry


@st.composite
def geometries(draw) -> BlockGeometry:
    """Small legal geometries of every kind: l' below l, no initial block, a window of one token."""
    stride = draw(st.sampled_from([1, 2, 3, 4]))
    init, local = draw(st.integers(0, 2)), draw(st.integers(1, 3))
    return BlockGeometry(
        compress_block_size=stride * draw(st.integers(1, 4)),
        compress_stride=stride,
        select_block_size=stride * draw(st.integers(1, 5)),
        num_selected_blocks=init + local + draw(st.integers(0, 3)),
        num_init_blocks=init,
        num_local_blocks=local,
        window_size=draw(st.integers(1, 20)),
    )


@dataclass
class Problem:
    """Inputs of the operator in fp64; `lengths` is None for batched input."""

    geometry: BlockGeometry
    lengths: list[int] | None
    q: torch.Tensor
    k: torch.Tensor
    v: torch.Tensor
    k_win: torch.Tensor
    v_win: torch.Tensor
    gates: torch.Tensor

    @property
    def cu_seqlens(self) -> torch.Tensor | None:
        if self.lengths is None:
            return None
        return torch.tensor([0, *self.lengths]).cumsum(0).to(torch.int32)


@st.composite
def problems(draw, max_length: int = 40, packed: bool | None = None) -> Problem:
    """Batched or packed problems of a few tokens, empty and one-token documents among them."""
    geometry = draw(geometries())
    is_packed = draw(st.booleans()) if packed is None else packed
    lengths = draw(st.lists(st.integers(0, max_length // 2), min_size=1, max_size=4)) if is_packed else None
    batch = 1 if is_packed else draw(st.integers(1, 2))
    total = sum(lengths) if lengths is not None else draw(st.integers(1, max_length))
    groups, per_group = draw(st.integers(1, 2)), draw(st.sampled_from([1, 2, 3, 5]))
    dim, value_dim = draw(st.sampled_from([2, 4, 6])), draw(st.sampled_from([2, 3, 6]))
    generator = torch.Generator().manual_seed(draw(st.integers(0, 2**20)))

    def random(*shape: int) -> torch.Tensor:
        return torch.randn(*shape, generator=generator, dtype=torch.float64)

    return Problem(
        geometry,
        lengths,
        2 * random(batch, total, groups * per_group, dim),
        random(batch, total, groups, dim),
        random(batch, total, groups, value_dim),
        random(batch, total, groups, dim),
        random(batch, total, groups, value_dim),
        random(batch, total, groups * per_group, 3).softmax(-1),
    )
