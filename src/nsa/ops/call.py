"""What one call of the operator hands from stage to stage: `Call`, its tensors, and what its branches give.

`torch.library` passes tensors, numbers and lists of numbers, so a `Call` travels flat through the operators of
`nsa.ops.registry`, as `CALL_SCHEMA` says.

Legend as in `nsa.ops.api`: B batch, T tokens, N compressed tokens, H query heads, Hkv key/value heads, n blocks.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import NamedTuple

from torch import Tensor

from nsa.geometry import BlockGeometry

CALL_SCHEMA = "Tensor? cu_seqlens, int[] geometry, int q_start, int k_start, float scale"


@dataclass(frozen=True)
class Call:
    """What the stages of a call share beside their tensors.

    Attributes:
        geometry: block sizes and counts.
        scale: factor on q.k.
        cu_seqlens: int32 `[documents + 1]`, bounds of packed documents; None where the rows are one document each.
        q_start: position of the first query; 0 for packed documents.
        k_start: position of the first key of the window branch.
    """

    geometry: BlockGeometry
    scale: float
    cu_seqlens: Tensor | None = None
    q_start: int = 0
    k_start: int = 0

    def flatten(self) -> tuple[Tensor | None, tuple[int, ...], int, int, float]:
        """The arguments of `CALL_SCHEMA`."""
        return self.cu_seqlens, self.geometry.as_tuple(), self.q_start, self.k_start, self.scale

    @classmethod
    def unflatten(
        cls, cu_seqlens: Tensor | None, geometry: Sequence[int], q_start: int, k_start: int, scale: float
    ) -> Call:
        """The call that `flatten` made these of."""
        return cls(BlockGeometry(*geometry), scale, cu_seqlens, q_start, k_start)


class AttentionInputs(NamedTuple):
    """The tensors of a whole call.

    Attributes:
        q: queries `[B, T, H, Dk]`.
        k, v: keys `[B, T, Hkv, Dk]` and values `[B, T, Hkv, Dv]` of the selected branch.
        k_cmp, v_cmp: those of the compressed branch, `[B, N, Hkv, D]`.
        k_win, v_win: those of the window branch, `[B, T, Hkv, D]`.
        gates: `[B, T, H, 3]` in the order compressed, selected, window.
    """

    q: Tensor
    k: Tensor
    v: Tensor
    k_cmp: Tensor
    v_cmp: Tensor
    k_win: Tensor
    v_win: Tensor
    gates: Tensor


class BranchResults(NamedTuple):
    """What the branches of a whole call give, before the gates; its backward needs them.

    Attributes:
        out_cmp, out_slc, out_win: `[B, T, H, Dv]`.
        lse_cmp, lse_slc, lse_win: natural log-sum-exps `[B, T, H]`, -inf where a query sees no key.
        block_indices: int32 `[B, T, Hkv, n]`.
    """

    out_cmp: Tensor
    out_slc: Tensor
    out_win: Tensor
    lse_cmp: Tensor
    lse_slc: Tensor
    lse_win: Tensor
    block_indices: Tensor


class NSAAux(NamedTuple):
    """What `nsa_attention(..., return_aux=True)` adds: the choice of blocks and each branch's log-sum-exp.

    To watch a call changes nothing of it: the same operators run. None of these carries a gradient; the log-sum-exps
    that `compressed_attention`, `selected_attention` and `window_attention` return do.

    Attributes:
        block_indices: int32 `[B, T, Hkv, n]`, ascending, padded with -1.
        lse_cmp, lse_slc, lse_win: natural log-sum-exps `[B, T, H]`, at least fp32; -inf where a query sees no key.
    """

    block_indices: Tensor
    lse_cmp: Tensor
    lse_slc: Tensor
    lse_win: Tensor


class DecodeAux(NamedTuple):
    """What `nsa_decode(..., return_aux=True)` adds: int32 `block_indices` `[B, T, Hkv, n]`, as in `NSAAux`."""

    block_indices: Tensor
