"""Floating-point operations of a training step, by NSA's own count, and what share of the device's peak they are.

    count = FlopCount(model.config, max_length=2048)
    mfu = count.training(torch.tensor([2048, 700, 1348])) / seconds / peak_flops("NVIDIA H200", "bf16")

A multiplication and an addition are 2. Counted are the matrix products: projections, gates, SwiGLU, output layer and
learned compression for every token; and for each query the keys that its branches see, from the actual lengths of the
packed documents: all complete compressed blocks, the selected blocks up to the query itself, the window; all earlier
tokens in a dense layer. Backward is twice forward. Not counted is what an implementation does beyond that:
recomputed activations, scores computed again for the choice of blocks, norms, softmax, the embedding's lookup.

Legend: C hidden size, H query heads, Hkv key/value heads, Dk, Dv head sizes, I width of SwiGLU, V vocabulary.
"""

from __future__ import annotations

import torch
from torch import Tensor

from nsa.geometry import BlockGeometry
from nsa.hf import NSAConfig

BACKWARD_PER_FORWARD = 2


class FlopCount:
    """Counts for one model.

    Args:
        config: the model's sizes and layer types.
        max_length: tokens of the longest document that will be counted.
    """

    def __init__(self, config: NSAConfig, max_length: int) -> None:
        assert config.layer_types is not None
        self.per_token = linear_flops(config)
        kinds = {kind: config.layer_types.count(kind) for kind in set(config.layer_types)}
        per_key = 2 * config.num_attention_heads * (config.head_dim + config.value_head_dim)  # pyright: ignore
        position = torch.arange(max_length)
        at = sum(
            (count * per_key * keys_seen(kind, position, config.geometry) for kind, count in kinds.items()),
            start=torch.zeros(max_length, dtype=torch.int64),
        )
        at = at + kinds.get("nsa", 0) * compression_flops(config) * new_compressed(position, config.geometry)
        self._up_to = torch.cat([torch.zeros(1, dtype=torch.int64), at.cumsum(0)])

    def forward(self, lengths: Tensor) -> int:
        """Operations of one forward pass over documents of `lengths` tokens, output layer included."""
        return self.per_token * int(lengths.sum()) + int(self._up_to[lengths.long()].sum())

    def training(self, lengths: Tensor) -> int:
        """Operations of forward and backward."""
        return (1 + BACKWARD_PER_FORWARD) * self.forward(lengths)


def linear_flops(config: NSAConfig) -> int:
    """Operations for each token in the linear layers of the whole model, output layer included."""
    assert config.layer_types is not None
    assert config.head_dim is not None
    assert config.value_head_dim is not None
    size, heads, groups = config.hidden_size, config.num_attention_heads, config.num_key_value_heads
    total = config.vocab_size * size
    for kind in config.layer_types:
        copies = 1 if kind != "nsa" or config.shared_kv else 3
        total += size * heads * (config.head_dim + config.value_head_dim)
        total += size * copies * groups * (config.head_dim + config.value_head_dim)
        total += 3 * size * config.intermediate_size
        if kind == "nsa":
            inner = max(32, size // 8)
            total += inner * (size + 3 * heads)
    return 2 * total


def keys_seen(kind: str, position: Tensor, geometry: BlockGeometry) -> Tensor:
    """Keys that the query at each position of its document is multiplied with, all branches together."""
    if kind == "full_attention":
        return position + 1
    window = (position + 1).clamp(max=geometry.window_size)
    if kind == "sliding_attention":
        return window
    size, stride = geometry.compress_block_size, geometry.compress_stride
    compressed = torch.where(position + 1 < size, 0, (position + 1 - size) // stride + 1)
    own = position // geometry.select_block_size
    others = own.clamp(max=geometry.num_selected_blocks - 1)  # the query's own block is always among the chosen
    selected = others * geometry.select_block_size + position % geometry.select_block_size + 1
    return compressed + selected + window


def new_compressed(position: Tensor, geometry: BlockGeometry) -> Tensor:
    """1 where a compressed block ends at the position, else 0."""
    past = position + 1 - geometry.compress_block_size
    return ((past >= 0) & (past % geometry.compress_stride == 0)).long()


def compression_flops(config: NSAConfig) -> int:
    """Operations of the learned compression of one block to a key and a value, all groups; 0 for the mean."""
    assert config.head_dim is not None
    assert config.value_head_dim is not None
    length, total = config.geometry.compress_block_size, 0
    for size in (config.head_dim, config.value_head_dim):
        if config.compression == "conv":
            total += length * size + 4 * size * size
        elif config.compression == "mlp":
            total += 2 * length * size * size + 2 * size * size
    return 2 * config.num_key_value_heads * total
