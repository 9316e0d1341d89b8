"""The options of a model that its config file, `NSAConfig` and `NSAAttention` share, and their checks, without torch.

>>> head_sizes(128, 4, 2)
(32, 32)
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from typing import Any, Literal

LayerType = Literal["nsa", "full_attention", "sliding_attention"]
Compression = Literal["mean", "conv", "mlp"]
CompressRope = Literal["before", "after"]
GateKind = Literal["softmax", "sigmoid"]
Backend = Literal["auto", "reference", "torch", "triton"]

ROPE_KEYS = {
    "default": (),
    "linear": ("factor",),
    "ntk": ("factor",),
    "yarn": (
        *("factor", "original_max_position_embeddings", "attention_factor"),
        *("beta_fast", "beta_slow", "mscale", "mscale_all_dim", "truncate"),
    ),
    "llama3": ("factor", "original_max_position_embeddings", "low_freq_factor", "high_freq_factor"),
}
"""The types of `rope_parameters`, and what each takes besides its base."""


def head_sizes(
    hidden_size: int,
    num_heads: int,
    num_kv_heads: int,
    head_dim: int | None = None,
    value_head_dim: int | None = None,
    *,
    names: tuple[str, str] = ("num_heads", "num_kv_heads"),
) -> tuple[int, int]:
    """Sizes of a query or key head and of a value head, as given or as they follow.

    Args:
        hidden_size: C, width of the residual stream.
        num_heads, num_kv_heads: H and Hkv.
        head_dim: D of queries and keys; C/H unless given.
        value_head_dim: D of values; that of keys unless given.
        names: what the caller calls the two counts, for errors.

    Raises:
        ValueError: the counts do not divide, or a size is odd or not positive.
    """
    if num_heads < 1 or num_kv_heads < 1 or num_heads % num_kv_heads:
        raise ValueError(f"{names[0]} {num_heads} must be a positive multiple of {names[1]} {num_kv_heads}")
    if head_dim is None and hidden_size % num_heads:
        raise ValueError(f"hidden_size {hidden_size} is no multiple of {names[0]} {num_heads}; give head_dim")
    key_size = hidden_size // num_heads if head_dim is None else head_dim
    if key_size < 2 or key_size % 2:
        raise ValueError(f"head_dim must be positive and even, not {key_size}: rotary embedding pairs features")
    value_size = key_size if value_head_dim is None else value_head_dim
    if value_size < 1:
        raise ValueError(f"value_head_dim must be positive, not {value_size}")
    return key_size, value_size


def check_rope(parameters: Mapping[str, Any]) -> None:
    """Check `rope_parameters`, as transformers defines them: one set for all layers, of a type that NSA can have.

    Raises:
        ValueError: the type is unknown or its frequencies follow the length of the text, or a number is out of range.
    """
    nested = [name for name in LayerType.__args__ if name in parameters]
    if nested:
        raise ValueError(f"rope_parameters holds {', '.join(nested)}; all layers share one set, give it flat")
    kind = parameters.get("rope_type", parameters.get("type", "default"))
    if kind not in ROPE_KEYS:
        raise ValueError(f"rope_type must be one of {', '.join(ROPE_KEYS)}, not {kind!r}")
    if parameters.get("partial_rotary_factor", 1.0) != 1.0:
        raise ValueError(f"partial_rotary_factor must be 1, not {parameters['partial_rotary_factor']}")
    factor, theta = parameters.get("factor"), parameters.get("rope_theta", 1)
    if kind != "default" and not (isinstance(factor, int | float) and factor >= 1):
        raise ValueError(f"rope_type {kind!r} needs a factor of at least 1, not {factor!r}")
    if not isinstance(theta, int | float) or not theta > 0:
        raise ValueError(f"rope_theta must be a positive number, not {theta!r}")


def check_known_rope(parameters: Mapping[str, Any]) -> None:
    """Check `rope_parameters` of a config file: also, that no key is misspelt, and that the values are numbers.

    Raises:
        ValueError: as `check_rope`, or a key is unknown, is missing or has a wrong value.
    """
    check_rope(parameters)
    kind = parameters.get("rope_type", "default")
    known = ROPE_KEYS[kind]
    if unknown := [key for key in parameters if key not in ("rope_type", *known)]:
        hint = "; the base is model.rope_theta" if "rope_theta" in unknown else ""
        raise ValueError(f"rope_type {kind!r} takes {', '.join(known) or 'no more keys'}, not {unknown[0]!r}{hint}")
    if kind == "llama3" and (missing := [key for key in known if key not in parameters]):
        raise ValueError(f"rope_type {kind!r} needs {', '.join(missing)} too")
    for key, value in parameters.items():
        if key == "truncate":
            right, what = isinstance(value, bool), "true or false"
        else:
            is_number = isinstance(value, int | float) and not isinstance(value, bool)
            right, what = key == "rope_type" or (is_number and 0 < value < math.inf), "a positive number"
        if not right:
            raise ValueError(f"{key} must be {what}, not {value!r}")
