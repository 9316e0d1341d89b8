"""The cache that `generate()` and `NSAModel` use: a transformers cache whose layers hold rows of real tokens only.

transformers builds a `DynamicCache` from the config's `layer_types`; `adopt_cache` gives each of its layers a state of
ours: `nsa.cache.NSACache` for an NSA layer, `KeyValueRows` for a dense or sliding one. Padding never enters a state,
so that rows may differ in length and block grids start at each row's first token; what transformers counts, tokens
with their padding, is kept beside it as `num_columns`.

Shapes: B rows, T new tokens, S tokens held, Hkv key/value heads, D head size.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, NamedTuple

import torch
from torch import Tensor
from transformers import Cache, DynamicCache
from transformers.cache_utils import CacheLayerMixin, DynamicLayer, StaticLayer
from transformers.modeling_outputs import BaseModelOutputWithPast

from nsa.cache import GrowingBuffer, NSACache, RollingBuffer

from .configuration_nsa import NSAConfig

# The field of a model's outputs; transformers 5.24 has renamed it.
CACHE_NAME = "cache" if "cache" in BaseModelOutputWithPast.__dataclass_fields__ else "past_key_values"


class HeldKeys(NamedTuple):
    """What the queries of a dense layer read from its cache.

    Attributes:
        k, v: `[B, S, Hkv, D]`.
        start: position of each row's first entry.
    """

    k: Tensor
    v: Tensor
    start: Sequence[int]


class KeyValueRows:
    """Keys and values of a dense layer, or the newest ones of a sliding layer; rows may differ in length.

    Args:
        window: tokens that a query sees, its own included; None for all.

    Attributes:
        lengths: tokens of each row so far, () before the first append.
    """

    def __init__(self, window: int | None = None) -> None:
        self.window = window
        self.reset()

    def reset(self) -> None:
        """Forget everything."""
        self.lengths: tuple[int, ...] = ()
        self._all = GrowingBuffer(multiple=64)
        self._newest = RollingBuffer((self.window or 1) - 1)

    def append(self, k: Tensor, v: Tensor, num_new: Sequence[int] | None) -> HeldKeys:
        """Add tokens `[B, T, Hkv, D]`, of which row b's first num_new[b] are real (all unless given).

        Raises:
            ValueError: the batch differs from what is held, or gradients are needed.
        """
        batch, length = k.shape[:2]
        old = self.lengths or (0,) * batch
        if len(old) != batch:
            raise ValueError(f"the cache holds {len(old)} rows but {batch} were appended; use a new cache")
        if torch.is_grad_enabled() and k.requires_grad:
            raise ValueError("the cache keeps no gradients: decode under torch.no_grad(), or train without a cache")
        num_new = (length,) * batch if num_new is None else tuple(num_new)
        self.lengths = tuple(a + n for a, n in zip(old, num_new, strict=True))
        if self.window is not None:
            (k, v), start = self._newest.append((k, v), old, num_new)
            return HeldKeys(k, v, start)
        longest = max(1, *self.lengths)
        self._all.reserve((k, v), longest)
        self._all.write((k, v), old, num_new)
        k, v = self._all.view()
        return HeldKeys(k[:, :longest], v[:, :longest], (0,) * batch)

    def reorder(self, index: Tensor) -> None:
        """Replace row b by row index[b]; `index` may be of another length than the batch."""
        self._all.reorder(index)
        self._newest.reorder(index)
        self.lengths = tuple(self.lengths[i] for i in index.tolist())

    def repeat(self, repeats: int) -> None:
        """Repeat every row `repeats` times, each row's copies together."""
        if self.lengths:
            self.reorder(torch.arange(len(self.lengths)).repeat_interleave(repeats))


class NSACacheLayer(CacheLayerMixin):
    """One layer of a transformers cache around a state of ours; made empty, `adopt_cache` gives it its state.

    Attributes:
        state: `NSACache` or `KeyValueRows`.
        num_columns: tokens seen with their padding, the length that `generate()` counts in.
    """

    _layer_type = "nsa"
    supports_early_init = False

    def __init__(self, state: NSACache | KeyValueRows | None = None, **_: Any) -> None:
        super().__init__()
        self.state = state
        self.num_columns = 0

    def lazy_initialization(self, key_states: Tensor, value_states: Tensor) -> None:
        raise ValueError("this cache layer is filled by NSAModel only")

    def update(self, key_states: Tensor, value_states: Tensor, *args: Any, **kwargs: Any) -> tuple[Tensor, Tensor]:
        raise ValueError("this cache layer is filled by NSAModel only")

    def get_mask_sizes(self, query_length: int) -> tuple[int, int]:
        """Length and offset of a mask over all tokens with their padding."""
        return self.num_columns + query_length, 0

    def get_seq_length(self) -> int:
        """Tokens seen with their padding."""
        return self.num_columns

    def get_max_length(self) -> int:
        """-1: no limit."""
        return -1

    def reset(self) -> None:
        """Forget everything."""
        self.num_columns = 0
        if self.state is not None:
            self.state.reset()

    def reorder_cache(self, beam_idx: Tensor) -> None:
        """Replace row b by row beam_idx[b]."""
        if self.state is not None and self.state.lengths:
            self.state.reorder(beam_idx)

    def batch_repeat_interleave(self, repeats: int) -> None:
        """Repeat every row `repeats` times."""
        if self.state is not None:
            self.state.repeat(repeats)

    def batch_select_indices(self, indices: Tensor) -> None:
        """Keep the rows `indices`, given as numbers or as a boolean mask."""
        self.reorder_cache(indices.nonzero().flatten() if indices.dtype == torch.bool else indices)

    def crop(self, tokens_to_remove: int) -> None:
        raise ValueError("an NSA cache cannot give tokens back, which assisted generation asks for; use a new cache")

    def offload(self) -> None:
        raise ValueError("an NSA cache cannot be offloaded; leave cache_implementation unset")

    def prefetch(self) -> None:
        self.offload()


class _NoStaticLayer(StaticLayer):
    """Makes `cache_implementation="static"` an error that says what to do."""

    _layer_type = "nsa"

    def __init__(self, max_cache_len: int, **kwargs: Any) -> None:
        raise ValueError("NSA models have no static cache; leave cache_implementation unset")


def new_cache(config: NSAConfig) -> DynamicCache:
    """An empty cache for a model of this config, as `generate()` makes it."""
    return DynamicCache(config=config)


def adopt_cache(cache: Cache, config: NSAConfig) -> list[NSACacheLayer]:
    """The layers of a transformers cache, each with its state; layers of an empty cache are given theirs.

    Raises:
        ValueError: the cache is of another kind, or was filled by another model.
    """
    if type(cache) is not DynamicCache or cache.offloading:
        raise ValueError(
            f"NSA models keep their own cache inside a DynamicCache, not a {type(cache).__name__}"
            f"{' with offloading' if getattr(cache, 'offloading', False) else ''}; leave cache_implementation unset"
        )
    if cache.layer_class_to_replicate is not None and not cache.layers:
        cache.layers.extend(NSACacheLayer() for _ in range(config.num_hidden_layers))
        cache.layer_class_to_replicate = None
    assert config.layer_types is not None
    if len(cache.layers) != len(config.layer_types):
        raise ValueError(f"the cache has {len(cache.layers)} layers but the model {len(config.layer_types)}")
    layers = []
    for index, (layer, layer_type) in enumerate(zip(cache.layers, config.layer_types, strict=True)):
        if not isinstance(layer, NSACacheLayer):
            if not isinstance(layer, CacheLayerMixin) or layer.get_seq_length():
                raise ValueError(f"layer {index} of the cache was filled by another model; use a new cache")
            layer = cache.layers[index] = NSACacheLayer()
        if layer.state is None:
            layer.state = _new_state(layer_type, config)
        layers.append(layer)
    return layers


def take_prefix(cache: Cache | None, config: NSAConfig) -> list[tuple[Tensor, Tensor]] | None:
    """Keys and values `[B, P, Hkv, D]` that stand before the rows, for each layer; None where the cache holds none.

    Prefix tuning hands them over as a cache that others filled; it is left empty, for the rows with their prefix.

    Raises:
        ValueError: they do not fit the model.
    """
    if type(cache) is not DynamicCache or not cache.layers:
        return None
    layers = [layer for layer in cache.layers if type(layer) is DynamicLayer and layer.get_seq_length()]
    if len(layers) < len(cache.layers):
        return None
    if len(cache.layers) != config.num_hidden_layers:
        raise ValueError(f"the cache has {len(cache.layers)} layers but the model {config.num_hidden_layers}")
    prefix = []
    for index, layer in enumerate(layers):
        k, v = layer.keys, layer.values
        assert k is not None
        assert v is not None
        for name, x, size in (("keys", k, config.head_dim), ("values", v, config.value_head_dim)):
            if x.ndim != 4 or (x.shape[1], x.shape[3]) != (config.num_key_value_heads, size):
                raise ValueError(
                    f"{name} of layer {index} of the cache are {list(x.shape)}; a prefix for this model is [B, "
                    f"{config.num_key_value_heads}, P, {size}]"
                )
        prefix.append((k.transpose(1, 2), v.transpose(1, 2)))
    cache.layers[:] = [NSACacheLayer() for _ in cache.layers]
    return prefix


def _new_state(layer_type: str, config: NSAConfig) -> NSACache | KeyValueRows:
    if layer_type == "nsa":
        return NSACache(config.geometry)
    return KeyValueRows(config.window_size if layer_type == "sliding_attention" else None)
