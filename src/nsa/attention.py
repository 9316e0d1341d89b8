"""`NSAAttention`: Native Sparse Attention as a drop-in module for decoder-only Transformers. Start reading here.

One query projection; keys and values projected for each branch; RoPE on every head; compressed keys and values; a gate;
and the operator `nsa.ops.api.nsa_attention`, or `nsa_decode` from a cache (arXiv 2502.11089, section 3).

Legend: B batch, T tokens, C features, H query heads, Hkv key/value heads (groups), D head size, N compressed tokens.

    >>> layer = NSAAttention(256, num_heads=8, num_kv_heads=2)
    >>> layer(torch.randn(2, 1000, 256)).shape
    torch.Size([2, 1000, 256])
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import cast

import torch
from torch import Tensor, nn

from nsa.cache import NSACache
from nsa.compress import block_starts, build_compression
from nsa.gate import Gate
from nsa.geometry import BRANCHES, BlockGeometry
from nsa.model_options import head_sizes
from nsa.ops.api import nsa_attention, nsa_decode
from nsa.ops.call import DecodeAux, NSAAux
from nsa.ops.packed import packed_positions
from nsa.rope import RotaryEmbedding, apply_rope


class NSAAttention(nn.Module):
    """Causal self-attention with three gated branches: compressed, selected, sliding window.

    Args:
        hidden_size: C, features of the input and output.
        num_heads: H, query heads.
        num_kv_heads: Hkv; H/Hkv heads of a group share keys, values and the chosen blocks.
        head_dim: D of queries and keys; C/H unless given.
        value_head_dim: D of values; head_dim unless given.
        geometry: block sizes and counts; the paper's unless given.
        compression: "mean", "conv" or "mlp" (see `nsa.compress`).
        compress_rope: "before": keys are rotated, then compressed; "after": compressed, then rotated as the last
            position of their block.
        shared_kv: one key and value projection for all branches instead of one for each.
        gate: "softmax" over the branches, or "sigmoid" for each (the paper's).
        gate_temperature: divides the gate's logits.
        rope_base: wavelength base of the rotary embedding; None: there is none here, the caller gives
            `position_embeddings`.
        rope_scaling_factor: linear position interpolation.
        bias: whether the query, key and value projections have a bias.
        backend: "auto", "reference", "torch" or "triton".

    Attributes:
        forced_branch: None, or "cmp", "slc", "win": that branch alone, for ablation; may change at run time.
        aux_sink: None, or a function that receives `NSAAux` or `DecodeAux` after each forward, to watch the choice.

    Raises:
        ValueError: head counts, sizes or options do not fit.
    """

    def __init__(
        self,
        hidden_size: int,
        num_heads: int,
        num_kv_heads: int,
        *,
        head_dim: int | None = None,
        value_head_dim: int | None = None,
        geometry: BlockGeometry | None = None,
        compression: str = "mean",
        compress_rope: str = "before",
        shared_kv: bool = False,
        gate: str = "softmax",
        gate_temperature: float = 1.0,
        rope_base: float | None = 10000.0,
        rope_scaling_factor: float = 1.0,
        bias: bool = False,
        backend: str = "auto",
    ) -> None:
        super().__init__()
        if compress_rope not in ("before", "after"):
            raise ValueError(f"compress_rope must be 'before' or 'after', not {compress_rope!r}")
        self.hidden_size, self.num_heads, self.num_kv_heads = hidden_size, num_heads, num_kv_heads
        self.head_dim, self.value_head_dim = head_sizes(hidden_size, num_heads, num_kv_heads, head_dim, value_head_dim)
        self.geometry = geometry or BlockGeometry()
        self.compress_rope, self.shared_kv, self.backend = compress_rope, shared_kv, backend
        self.forced_branch: str | None = None
        self.aux_sink: Callable[[NSAAux | DecodeAux], None] | None = None

        self.num_projections = 1 if shared_kv else len(BRANCHES)
        self.q_proj = nn.Linear(hidden_size, num_heads * self.head_dim, bias=bias)
        self.k_proj = nn.Linear(hidden_size, self.num_projections * num_kv_heads * self.head_dim, bias=bias)
        self.v_proj = nn.Linear(hidden_size, self.num_projections * num_kv_heads * self.value_head_dim, bias=bias)
        self.o_proj = nn.Linear(num_heads * self.value_head_dim, hidden_size, bias=False)
        self.compress_k = build_compression(compression, self.geometry, num_kv_heads, self.head_dim)
        self.compress_v = build_compression(compression, self.geometry, num_kv_heads, self.value_head_dim)
        self.gate = Gate(hidden_size, num_heads, gate, gate_temperature)
        self.rope = None if rope_base is None else RotaryEmbedding(self.head_dim, rope_base, rope_scaling_factor)

    def forward(
        self,
        x: Tensor,
        *,
        cu_seqlens: Tensor | None = None,
        cache: NSACache | None = None,
        num_new: Sequence[int] | None = None,
        position_embeddings: tuple[Tensor, Tensor] | None = None,
        prefix: tuple[Tensor, Tensor] | None = None,
    ) -> Tensor:
        """Attend from every token to its past, `[B, T, C] -> [B, T, C]`.

        Rows are left-aligned: their tokens are at positions 0.. T-1, or continue what the cache holds; put padding on
        the right, where causality keeps it from being seen.

        Args:
            cu_seqlens: int32 `[documents + 1]`, bounds of packed documents (B = 1); not together with a cache.
            cache: holds earlier tokens and takes these; None to attend within `x` alone.
            num_new: with a cache, how many tokens of each row are real; outputs of the others mean nothing.
            position_embeddings: cosines and sines `[B or 1, T, D]` in place of the module's own RoPE.
            prefix: keys `[B, P, Hkv, Dk]`, taken as rotated, and values `[B, P, Hkv, Dv]` that take the place of the
                first P tokens' own in every branch (prefix tuning, arXiv 2101.00190).

        Raises:
            ValueError: shapes or options do not fit.
        """
        if x.ndim != 3 or x.shape[2] != self.hidden_size:
            raise ValueError(f"x must be [B, T, {self.hidden_size}], not {list(x.shape)}")
        if cache is not None and cu_seqlens is not None:
            raise ValueError("packed input (cu_seqlens) has no cache: decode documents as rows of a batch")
        if cache is None and num_new is not None:
            raise ValueError("num_new goes with a cache; without one put padding on the right and ignore its outputs")
        if cache is not None:
            num_new = cache.check_new(x, num_new)
        cos, sin = position_embeddings or self._own_rope(x, cu_seqlens, cache)
        q = apply_rope(self.q_proj(x).unflatten(-1, (self.num_heads, self.head_dim)), cos, sin)
        keys = self._split(self.k_proj(x), self.head_dim)
        values = self._split(self.v_proj(x), self.value_head_dim)
        rotated = [apply_rope(k, cos, sin) for k in keys]
        if prefix is not None:
            keys, rotated = ([with_prefix(prefix[0], k) for k in x] for x in (keys, rotated))
            values = [with_prefix(prefix[1], v) for v in values]
        k_cmp = rotated[0] if self.compress_rope == "before" else keys[0]
        slc, win = (0, 0) if self.shared_kv else (1, 2)
        k_slc, k_win, v_slc, v_win = rotated[slc], rotated[win], values[slc], values[win]
        gates = self.gate(x, self.forced_branch)

        if cache is None:
            bound = None if cu_seqlens is None else self.geometry.max_num_compressed(x.shape[1])
            ends = block_starts(x, self.geometry, cu_seqlens, bound) + self.geometry.compress_block_size - 1
            compressed = self._compress(k_cmp, values[0], cos[:, ends], sin[:, ends], cu_seqlens)
            out = self._attend(q, k_slc, v_slc, compressed, gates, k_win, v_win, cu_seqlens)
        else:
            out = self._from_cache(
                cache, num_new, q, (k_slc, v_slc), (k_win, v_win), (k_cmp, values[0]), gates, (cos, sin)
            )
        return self.o_proj(out.flatten(2))

    def _attend(
        self,
        q: Tensor,
        k: Tensor,
        v: Tensor,
        compressed: tuple[Tensor, Tensor],
        gates: Tensor,
        k_win: Tensor,
        v_win: Tensor,
        cu_seqlens: Tensor | None,
    ) -> Tensor:
        result = nsa_attention(
            *(q, k, v, *compressed, gates, self.geometry),
            k_win=k_win,
            v_win=v_win,
            cu_seqlens=cu_seqlens,
            backend=self.backend,
            return_aux=self.aux_sink is not None,
        )
        if self.aux_sink is None:
            return cast(Tensor, result)
        out, aux = cast(tuple[Tensor, NSAAux], result)
        self.aux_sink(aux)
        return out

    def _from_cache(
        self,
        cache: NSACache,
        num_new: Sequence[int] | None,
        q: Tensor,
        selected: tuple[Tensor, Tensor],
        window: tuple[Tensor, Tensor],
        to_compress: tuple[Tensor, Tensor],
        gates: Tensor,
        rope: tuple[Tensor, Tensor],
    ) -> Tensor:
        empty = not any(cache.lengths)
        old = cache.lengths or (0,) * q.shape[0]

        def compress(k: Tensor, v: Tensor, rows: Sequence[int], first: Sequence[int]) -> tuple[Tensor, Tensor]:
            ends = block_starts(k, self.geometry, None) + self.geometry.compress_block_size - 1
            # A block that these tokens complete ends at one of them, so its cosines and sines are at hand.
            at_ends = [ends + position - old[row] for row, position in zip(rows, first, strict=True)]
            cos, sin = (
                torch.stack([x[row if x.shape[0] > 1 else 0, at] for row, at in zip(rows, at_ends, strict=True)])
                for x in rope
            )
            return self._compress(k, v, cos, sin, None)

        view = cache.append(selected, None if self.shared_kv else window, to_compress, compress, num_new)
        if empty:
            count = self.geometry.num_compressed(q.shape[1])
            compressed = (view.k_cmp[:, :count], view.v_cmp[:, :count])
            return self._attend(q, *selected, compressed, gates, *window, None)
        result = nsa_decode(q, view, gates, self.geometry, backend=self.backend, return_aux=True)
        out, aux = cast(tuple[Tensor, DecodeAux], result)
        cache.last_block_indices = aux.block_indices
        if self.aux_sink is not None:
            self.aux_sink(aux)
        return out

    def _compress(
        self, k: Tensor, v: Tensor, end_cos: Tensor, end_sin: Tensor, cu_seqlens: Tensor | None
    ) -> tuple[Tensor, Tensor]:
        """Compressed keys and values; cosines and sines `[B or 1, N, D]` are those of each block's last position."""
        bound = None if cu_seqlens is None else self.geometry.max_num_compressed(k.shape[1])
        k_cmp = self.compress_k(k, cu_seqlens, bound, self.backend)
        v_cmp = self.compress_v(v, cu_seqlens, bound, self.backend)
        if self.compress_rope == "after":
            k_cmp = apply_rope(k_cmp, end_cos, end_sin)
        return k_cmp, v_cmp

    def _split(self, x: Tensor, head_dim: int) -> list[Tensor]:
        """One projection's output as the branches' keys or values, in the order compressed, selected, window."""
        return list(x.unflatten(-1, (self.num_projections, self.num_kv_heads, head_dim)).unbind(2))

    def _own_rope(self, x: Tensor, cu_seqlens: Tensor | None, cache: NSACache | None) -> tuple[Tensor, Tensor]:
        if self.rope is None:
            raise ValueError("the module was built with rope_base=None: give position_embeddings=(cos, sin)")
        if cu_seqlens is not None:
            return self.rope(packed_positions(cu_seqlens, x.shape[1]).unsqueeze(0), x.dtype)
        positions = torch.arange(x.shape[1], device=x.device).unsqueeze(0)
        if cache is not None and any(cache.lengths):
            positions = positions + torch.tensor(cache.lengths, device=x.device).unsqueeze(1)
        return self.rope(positions, x.dtype)


def with_prefix(prefix: Tensor, x: Tensor) -> Tensor:
    """`x` `[B, T, Hkv, D]` with its first P tokens' keys or values replaced by `prefix` `[B, P, Hkv, D]`."""
    return torch.cat([prefix.to(x.dtype), x[:, prefix.shape[1] :]], dim=1)
