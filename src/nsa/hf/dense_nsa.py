"""Dense and sliding-window attention with the interface of `NSAAttention`, for hybrid models and as a baseline.

Grouped heads and rotary embedding as there; the product is PyTorch's scaled_dot_product_attention, or its varlen_attn
for packed documents on a GPU.

Shapes: B rows, T tokens, S keys, H query heads, Hkv key/value heads, D head size; heads are `[B, T, H, D]`.
"""

from __future__ import annotations

import inspect
from collections.abc import Sequence
from itertools import pairwise
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.attention.varlen import varlen_attn

from nsa.attention import with_prefix
from nsa.ops.api import window_attention
from nsa.rope import apply_rope

from .cache_nsa import HeldKeys, KeyValueRows
from .configuration_nsa import NSAConfig

MAX_VARLEN_HEAD_DIM, VARLEN_ALIGNMENT = 256, 8  # of the kernels behind varlen_attn
# torch 2.11 has no such argument and takes grouped heads as they are.
GROUPED: dict[str, Any] = {"enable_gqa": True} if "enable_gqa" in inspect.signature(varlen_attn).parameters else {}


class DenseAttention(nn.Module):
    """Causal attention over all earlier tokens, or over the last `window` ones.

    Args:
        config: sizes.
        window: tokens that a query sees, its own included; None for all.
    """

    def __init__(self, config: NSAConfig, window: int | None = None) -> None:
        super().__init__()
        assert config.head_dim is not None
        assert config.value_head_dim is not None
        self.head_dim, self.value_head_dim, self.window = config.head_dim, config.value_head_dim, window
        self.geometry, self.backend = config.geometry, config.attention_backend
        heads, kv_heads, bias = config.num_attention_heads, config.num_key_value_heads, config.attention_bias
        self.q_proj = nn.Linear(config.hidden_size, heads * self.head_dim, bias=bias)
        self.k_proj = nn.Linear(config.hidden_size, kv_heads * self.head_dim, bias=bias)
        self.v_proj = nn.Linear(config.hidden_size, kv_heads * self.value_head_dim, bias=bias)
        self.o_proj = nn.Linear(heads * self.value_head_dim, config.hidden_size, bias=False)

    def forward(
        self,
        x: Tensor,
        *,
        position_embeddings: tuple[Tensor, Tensor],
        cu_seqlens: Tensor | None = None,
        max_seqlen: int | None = None,
        cache: KeyValueRows | None = None,
        num_new: Sequence[int] | None = None,
        prefix: tuple[Tensor, Tensor] | None = None,
    ) -> Tensor:
        """`[B, T, C] -> [B, T, C]`; arguments as in `NSAAttention.forward`, and `max_seqlen` of `packed_attention`."""
        cos, sin = position_embeddings
        q = apply_rope(self.q_proj(x).unflatten(-1, (-1, self.head_dim)), cos, sin)
        k = apply_rope(self.k_proj(x).unflatten(-1, (-1, self.head_dim)), cos, sin)
        v = self.v_proj(x).unflatten(-1, (-1, self.value_head_dim))
        if prefix is not None:
            k, v = with_prefix(prefix[0], k), with_prefix(prefix[1], v)
        old = () if cache is None else cache.lengths
        held = None if cache is None else cache.append(k, v, num_new)
        if cache is not None and held is not None and any(old):
            out = self._from_cache(q, held, old, cache.lengths)
        elif self.window is not None:
            out = window_attention(q, k, v, self.geometry, cu_seqlens=cu_seqlens, backend=self.backend)[0]
        elif cu_seqlens is not None:
            out = packed_attention(q, k, v, cu_seqlens, max_seqlen)
        else:
            out = _attend(q, k, v, is_causal=True)
        return self.o_proj(out.flatten(2))

    def _from_cache(self, q: Tensor, held: HeldKeys, old: Sequence[int], lengths: Sequence[int]) -> Tensor:
        """Queries at positions old[b].. against the cache; padding queries see what their row's last token sees."""
        k, v, start = held
        if len(set(lengths)) == 1 and q.shape[1] == 1 and self.window is None:
            return _attend(q, k, v)
        first, length, begin = (torch.tensor(x, device=q.device).unsqueeze(1) for x in (old, lengths, start))
        query = torch.minimum(first + torch.arange(q.shape[1], device=q.device), (length - 1).clamp(min=0))
        key = begin + torch.arange(k.shape[1], device=q.device)
        distance = query.unsqueeze(2) - key.unsqueeze(1)  # [B, T, S]
        visible = distance >= 0
        if self.window is not None:
            visible &= distance < self.window
        return _attend(q, k, v, mask=visible.unsqueeze(1))


def packed_attention(q: Tensor, k: Tensor, v: Tensor, cu_seqlens: Tensor, max_seqlen: int | None = None) -> Tensor:
    """Causal attention within each packed document, `[1, T, H, D]`.

    Args:
        q, k, v: `[1, T, H, Dk]`, `[1, T, Hkv, Dk]`, `[1, T, Hkv, Dv]`.
        cu_seqlens: int32 `[documents + 1]`, bounds of the documents.
        max_seqlen: a bound on the documents' lengths, T unless given. The nearer the less is launched for nothing on a
            GPU; the outputs of a document that is longer are undefined there.
    """
    if varlen_serves(q, v):
        return _packed_by_varlen(q, k, v, cu_seqlens, q.shape[1] if max_seqlen is None else max_seqlen)
    return _packed_by_buckets(q, k, v, cu_seqlens)  # pyright: ignore[reportCallIssue]


def varlen_serves(q: Tensor, v: Tensor) -> bool:
    """Whether varlen_attn has kernels for such tensors: half precision on an NVIDIA GPU since Ampere."""
    return (
        q.is_cuda
        and q.dtype == v.dtype
        and q.dtype in (torch.float16, torch.bfloat16)
        and max(q.shape[3], v.shape[3]) <= MAX_VARLEN_HEAD_DIM
        and torch.cuda.get_device_properties(q.device).major >= 8
    )


def _packed_by_varlen(q: Tensor, k: Tensor, v: Tensor, cu_seqlens: Tensor, max_seqlen: int) -> Tensor:
    """One kernel for all documents as they lie: neither its shapes nor the host depend on their lengths."""
    scale, value_size = q.shape[3] ** -0.5, v.shape[3]
    # The kernels want keys and values of one size; zeros change neither scores nor what is kept of the output.
    size = -(-max(q.shape[3], value_size) // VARLEN_ALIGNMENT) * VARLEN_ALIGNMENT
    q, k, v = (x[0] if x.shape[3] == size else nn.functional.pad(x[0], (0, size - x.shape[3])) for x in (q, k, v))
    out = varlen_attn(
        q, k, v, cu_seqlens, cu_seqlens, max_seqlen, max_seqlen, scale=scale, window_size=(-1, 0), **GROUPED
    )
    assert isinstance(out, Tensor)
    return out[..., :value_size].unsqueeze(0)


@torch.compiler.disable  # its shapes depend on the bounds; what stands around it can be compiled
def _packed_by_buckets(q: Tensor, k: Tensor, v: Tensor, cu_seqlens: Tensor) -> Tensor:
    """Documents of similar length as one batch.

    They are padded on the right, where causality hides it, to the longest of those whose length has the same number of
    binary digits: at most log2(T) calls, and less than twice the tokens.
    """
    lengths = [end - start for start, end in pairwise(cu_seqlens.tolist())]
    documents = [x[0].split(lengths) for x in (q, k, v)]
    buckets: dict[int, list[int]] = {}
    for index, length in enumerate(lengths):
        if length:
            buckets.setdefault(length.bit_length(), []).append(index)
    out: list[Tensor] = [q.new_empty(0, q.shape[2], v.shape[3])] * len(lengths)
    for members in buckets.values():
        batch = (nn.utils.rnn.pad_sequence([x[i] for i in members], batch_first=True) for x in documents)
        attended = _attend(*batch, is_causal=True)
        for row, index in enumerate(members):
            out[index] = attended[row, : lengths[index]]
    return torch.cat(out).unsqueeze(0)


def _attend(q: Tensor, k: Tensor, v: Tensor, *, mask: Tensor | None = None, is_causal: bool = False) -> Tensor:
    q, k, v = (x.transpose(1, 2) for x in (q, k, v))
    out = nn.functional.scaled_dot_product_attention(q, k, v, attn_mask=mask, is_causal=is_causal, enable_gqa=True)
    return out.transpose(1, 2)
