"""The configuration of an NSA model: the usual Llama keys, the block geometry and the options of `NSAAttention`.

>>> config = NSAConfig(hidden_size=256, num_hidden_layers=4, num_attention_heads=8)
>>> config.geometry.select_block_size, config.layer_types
(64, ['nsa', 'nsa', 'nsa', 'nsa'])
"""

from __future__ import annotations

from typing import Any, get_args

from transformers import PreTrainedConfig
from transformers.activations import ACT2FN

from nsa.geometry import BlockGeometry
from nsa.model_options import Backend, Compression, CompressRope, GateKind, LayerType, check_rope, head_sizes

# transformers' own classes read config.json too and refuse layer types that they do not know.
LAYER_TYPES_KEY = "nsa_layer_types"
LAYER_TYPES = get_args(LayerType)
OPTIONS = {
    "compression": get_args(Compression),
    "compress_rope": get_args(CompressRope),
    "gate": get_args(GateKind),
    "attention_backend": get_args(Backend),
}


class NSAConfig(PreTrainedConfig):
    """Sizes and options of `NSAModel`; the defaults are a model of about 125M parameters with the paper's geometry.

    Args:
        vocab_size: tokens in the vocabulary.
        hidden_size: width of the residual stream.
        intermediate_size: width of the SwiGLU layer.
        num_hidden_layers: decoder layers.
        num_attention_heads: query heads.
        num_key_value_heads: key/value heads (groups); divides the query heads.
        head_dim: size of a query or key head, even; hidden_size / num_attention_heads unless given.
        value_head_dim: size of a value head; head_dim unless given.
        layer_types: "nsa", "full_attention" or "sliding_attention" for each layer; all "nsa" unless given. Sliding
            layers see `window_size` tokens. config.json holds it as `nsa_layer_types`; both names are read.
        compress_block_size, compress_stride, select_block_size, num_selected_blocks, num_init_blocks,
            num_local_blocks, window_size: the fields of `BlockGeometry`.
        compression, compress_rope, shared_kv, gate, gate_temperature: as in `NSAAttention`.
        attention_backend: implementation of the operator: "auto", "reference", "torch" or "triton".
        attention_bias: whether query, key and value projections have a bias.
        hidden_act: activation of SwiGLU's gate, by its name in transformers; another than "silu" makes it no SwiGLU.
        rope_parameters: `{"rope_type": ..., "rope_theta": ..., ...}` as transformers defines it, of type "default",
            "linear", "yarn" or "llama3"; or "ntk" with a `factor`: the base becomes
            rope_theta * factor^(D/(D-2)). Types whose frequencies follow the length of the text ("dynamic",
            "longrope") are refused: an output would depend on later tokens.
        rope_theta: base of the rotary embedding, where `rope_parameters` does not say.
        max_position_embeddings: longest context that the model is meant for.
        rms_norm_eps: added to the mean square in RMSNorm.
        initializer_range: standard deviation of the initial weights; projections that write into the residual stream
            get it divided by sqrt(2 num_hidden_layers).
        tie_word_embeddings: whether the embedding is the output layer too.
        use_cache: whether the model returns a cache when no gradients are needed.

    Raises:
        ValueError: the numbers do not fit together, or an option is unknown.
    """

    model_type = "nsa"
    keys_to_ignore_at_inference = ["past_key_values", "cache"]  # noqa: RUF012  (transformers reads a plain list)

    vocab_size: int = 32000
    hidden_size: int = 768
    intermediate_size: int = 2048
    num_hidden_layers: int = 12
    num_attention_heads: int = 12
    num_key_value_heads: int = 2
    head_dim: int | None = None
    value_head_dim: int | None = None
    layer_types: list[str] | None = None
    compress_block_size: int = 32
    compress_stride: int = 16
    select_block_size: int = 64
    num_selected_blocks: int = 16
    num_init_blocks: int = 1
    num_local_blocks: int = 2
    window_size: int = 512
    compression: str = "mean"
    compress_rope: str = "before"
    shared_kv: bool = False
    gate: str = "softmax"
    gate_temperature: float = 1.0
    attention_backend: str = "auto"
    attention_bias: bool = False
    hidden_act: str = "silu"
    rope_parameters: dict | None = None
    max_position_embeddings: int = 8192
    rms_norm_eps: float = 1e-5
    initializer_range: float = 0.02
    tie_word_embeddings: bool = True
    use_cache: bool = True
    pad_token_id: int | None = None
    bos_token_id: int | None = None
    eos_token_id: int | list[int] | None = None

    def __post_init__(self, **kwargs: Any) -> None:
        self._check_counts()
        saved = kwargs.pop(LAYER_TYPES_KEY, None)
        if saved is not None and self.layer_types not in (None, saved):
            raise ValueError(f"layer_types and {LAYER_TYPES_KEY} differ; give one of them")
        self.layer_types = saved if self.layer_types is None else self.layer_types
        names = self.layer_types
        if names is not None and not (isinstance(names, list | tuple) and all(isinstance(x, str) for x in names)):
            raise ValueError(f"layer_types must be a list with a name for each layer, not {self.layer_types!r}")
        if not isinstance(self.rope_parameters, dict | None):
            raise ValueError(f"rope_parameters must be a dictionary, not {self.rope_parameters!r}")
        self.head_dim, self.value_head_dim = self._head_sizes()
        self.layer_types = ["nsa"] * self.num_hidden_layers if self.layer_types is None else list(self.layer_types)
        # transformers fills defaults into the dictionary; the caller's stays as it is.
        self.rope_parameters = None if self.rope_parameters is None else dict(self.rope_parameters)
        check_rope(self.rope_parameters or {})
        super().__post_init__(**kwargs)
        self.validate()

    def to_dict(self) -> dict[str, Any]:
        """Plain values, of which config.json is made."""
        values = super().to_dict()
        values[LAYER_TYPES_KEY] = values.pop("layer_types")
        return values

    @property
    def geometry(self) -> BlockGeometry:
        """The block sizes and counts as one value."""
        return BlockGeometry(**{name: getattr(self, name) for name in BlockGeometry.__dataclass_fields__})

    @property
    def sliding_window(self) -> int:
        """Tokens that a sliding layer sees; the name by which transformers asks."""
        return self.window_size

    def validate(self) -> None:
        """Raise `ValueError` unless everything fits together; transformers calls this before it saves."""
        self._check_counts()
        self._head_sizes()
        check_rope(self.rope_parameters or {})
        try:
            self.validate_rope()
        except KeyError as error:
            raise ValueError(error.args[0]) from error
        self.validate_layer_type()
        _ = self.geometry
        for name, allowed in OPTIONS.items():
            if getattr(self, name) not in allowed:
                raise ValueError(f"{name} must be one of {', '.join(allowed)}, not {getattr(self, name)!r}")
        if self.hidden_act not in ACT2FN:
            raise ValueError(f"hidden_act {self.hidden_act!r} is unknown to transformers; the usual one is 'silu'")
        for name in ("gate_temperature", "rms_norm_eps", "initializer_range"):
            value = getattr(self, name)
            if not isinstance(value, (int, float)) or not value > 0:
                raise ValueError(f"{name} must be a positive number, not {value!r}")

    def validate_layer_type(self) -> None:
        """Layer types are known and there is one for each layer."""
        layer_types = self.layer_types or []
        for index, name in enumerate(layer_types):
            if name not in LAYER_TYPES:
                raise ValueError(f"layer_types[{index}] is {name!r}; choose one of {', '.join(LAYER_TYPES)}")
        if len(layer_types) != self.num_hidden_layers:
            raise ValueError(
                f"layer_types has {len(layer_types)} entries for num_hidden_layers {self.num_hidden_layers}; "
                f"give one for each layer"
            )

    def _head_sizes(self) -> tuple[int, int]:
        names = ("num_attention_heads", "num_key_value_heads")
        counts = (self.num_attention_heads, self.num_key_value_heads)
        return head_sizes(self.hidden_size, *counts, self.head_dim, self.value_head_dim, names=names)

    def _check_counts(self) -> None:
        names = ("vocab_size", "hidden_size", "intermediate_size", "num_hidden_layers", "num_attention_heads")
        for name in (*names, "num_key_value_heads", "max_position_embeddings"):
            value = getattr(self, name)
            if isinstance(value, bool) or not isinstance(value, int) or value < 1:
                raise ValueError(f"{name} must be a positive integer, not {value!r}")

    def _validate_ntk_rope_parameters(
        self, rope_parameters: dict[str, Any], ignore_keys: set[str] | None = None
    ) -> None:
        """Called by `validate_rope` of transformers, which finds it by its name."""
        keys = set(rope_parameters)
        self._check_received_keys("ntk", keys, {"rope_type", "factor"}, {"rope_theta"}, ignore_keys=ignore_keys)
