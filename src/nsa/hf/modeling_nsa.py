"""A Llama-style decoder with Native Sparse Attention as a transformers model.

RMSNorm, attention by `layer_types` (NSA, dense or sliding), SwiGLU. Works with `generate()`, `Trainer`,
`save_pretrained` and the auto classes; `nsa.attention` and `dense_nsa` hold the attention, `rows_nsa` what becomes of
padding.

    >>> model = NSAForCausalLM(NSAConfig(vocab_size=256, hidden_size=64, num_hidden_layers=2, num_attention_heads=4))
    >>> model.generate(torch.tensor([[1, 2, 3]]), max_new_tokens=8, do_sample=False).shape
    torch.Size([1, 11])

Shapes: B rows, T tokens, C features, D head size.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint
from transformers import Cache, GenerationMixin, PreTrainedModel
from transformers.activations import ACT2FN
from transformers.modeling_layers import GradientCheckpointingLayer
from transformers.modeling_outputs import BaseModelOutputWithPast, CausalLMOutputWithPast
from transformers.modeling_rope_utils import ROPE_INIT_FUNCTIONS
from transformers.utils.generic import can_return_tuple

from nsa.attention import NSAAttention
from nsa.compress import ConvCompression, MLPCompression
from nsa.ops.validate import check_cu_seqlens
from nsa.rope import rotations

from .cache_nsa import CACHE_NAME, NSACacheLayer, adopt_cache, new_cache, take_prefix
from .configuration_nsa import NSAConfig
from .dense_nsa import DenseAttention
from .rows_nsa import Rows, arrange_rows, check_prompts, documents_of, packed_rows


class NSARMSNorm(nn.Module):
    """x / sqrt(mean(x^2) + eps) times a learned weight; computed in fp32 or better."""

    def __init__(self, size: int, eps: float) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.ones(size))
        self.eps = eps

    def forward(self, x: Tensor) -> Tensor:
        wide = x.to(torch.promote_types(x.dtype, torch.float32))
        return self.weight * nn.functional.rms_norm(wide, wide.shape[-1:], eps=self.eps).to(x.dtype)


class NSARotary(nn.Module):
    """Cosines and sines of positions, by `rope_parameters`.

    Holds no buffer: the frequencies follow from the config, so that neither a dtype cast nor loading can damage them.
    """

    def __init__(self, config: NSAConfig) -> None:
        super().__init__()
        self.config = config

    def frequencies(self, device: torch.device) -> tuple[Tensor, float]:
        """Angle per position of each pair of features, `[D/2]`, and the factor on cosines and sines."""
        assert self.config.rope_parameters is not None
        assert self.config.head_dim is not None
        rope, size = self.config.rope_parameters, self.config.head_dim
        kind, base = rope["rope_type"], rope["rope_theta"]
        if kind not in ("default", "ntk"):
            return ROPE_INIT_FUNCTIONS[kind](self.config, device)
        if kind == "ntk" and size > 2:
            base = base * rope["factor"] ** (size / (size - 2))
        return base ** -(torch.arange(0, size, 2, device=device, dtype=torch.float32) / size), 1.0

    def forward(self, positions: Tensor, dtype: torch.dtype) -> tuple[Tensor, Tensor]:
        """`[B, T]` positions to cosines and sines `[B, T, D]`, in fp32, or fp64 if `dtype` is."""
        frequencies, scaling = self.frequencies(positions.device)
        dtype = torch.promote_types(dtype, torch.float32)
        cos, sin = rotations(positions.to(dtype), frequencies.to(dtype))
        return cos * scaling, sin * scaling


class NSAMLP(nn.Module):
    """SwiGLU: down(act(gate(x)) up(x))."""

    def __init__(self, config: NSAConfig) -> None:
        super().__init__()
        self.gate_proj = nn.Linear(config.hidden_size, config.intermediate_size, bias=False)
        self.up_proj = nn.Linear(config.hidden_size, config.intermediate_size, bias=False)
        self.down_proj = nn.Linear(config.intermediate_size, config.hidden_size, bias=False)
        self.act_fn = ACT2FN[config.hidden_act]

    def forward(self, x: Tensor) -> Tensor:
        return self.down_proj(self.act_fn(self.gate_proj(x)) * self.up_proj(x))


def build_attention(config: NSAConfig, layer_type: str) -> NSAAttention | DenseAttention:
    """The attention of a layer of that type, without rotary embedding of its own."""
    if layer_type != "nsa":
        return DenseAttention(config, config.window_size if layer_type == "sliding_attention" else None)
    return NSAAttention(
        config.hidden_size,
        config.num_attention_heads,
        config.num_key_value_heads,
        head_dim=config.head_dim,
        value_head_dim=config.value_head_dim,
        geometry=config.geometry,
        compression=config.compression,
        compress_rope=config.compress_rope,
        shared_kv=config.shared_kv,
        gate=config.gate,
        gate_temperature=config.gate_temperature,
        rope_base=None,
        bias=config.attention_bias,
        backend=config.attention_backend,
    )


class NSADecoderLayer(GradientCheckpointingLayer):
    """Attention and SwiGLU, each behind a norm and beside a residual connection.

    Attributes:
        checkpoint_contexts: None, or the `context_fn` of `torch.utils.checkpoint` that says what backward keeps of
            this layer; the rest it computes again.
    """

    def __init__(self, config: NSAConfig, layer_idx: int) -> None:
        super().__init__()
        assert config.layer_types is not None
        self.self_attn = build_attention(config, config.layer_types[layer_idx])
        self.mlp = NSAMLP(config)
        self.input_layernorm = NSARMSNorm(config.hidden_size, config.rms_norm_eps)
        self.post_attention_layernorm = NSARMSNorm(config.hidden_size, config.rms_norm_eps)
        # Read by _init_weights, which transformers calls only for modules with parameters of their own.
        for projection in (self.self_attn.o_proj, self.mlp.down_proj):  # these write into the residual stream
            projection.init_scale = (2 * config.num_hidden_layers) ** -0.5  # pyright: ignore[reportArgumentType]
        if isinstance(self.self_attn, NSAAttention):
            self.self_attn.gate.down.init_scale = 0.0  # pyright: ignore[reportArgumentType]
        self.checkpoint_contexts: Callable[[], Any] | None = None

    def forward(self, x: Tensor, **attention: Any) -> Tensor:
        if self.checkpoint_contexts is None or not torch.is_grad_enabled():
            return self._forward(x, **attention)
        options = {"use_reentrant": False, "preserve_rng_state": False, "context_fn": self.checkpoint_contexts}
        return checkpoint(self._forward, x, **options, **attention)  # pyright: ignore[reportReturnType]

    def _forward(self, x: Tensor, **attention: Any) -> Tensor:
        x = x + self.self_attn(self.input_layernorm(x), **attention)
        return x + self.mlp(self.post_attention_layernorm(x))


class NSAPreTrainedModel(PreTrainedModel):
    """What `NSAModel` and `NSAForCausalLM` share: initial weights and what they support."""

    config_class = NSAConfig
    config: NSAConfig
    base_model_prefix = "model"
    supports_gradient_checkpointing = True
    _no_split_modules = ["NSADecoderLayer"]  # noqa: RUF012  (transformers reads plain lists)
    _skip_keys_device_placement = ["past_key_values"]  # noqa: RUF012
    _supports_sdpa = True

    @torch.no_grad()
    def _init_weights(self, module: nn.Module) -> None:
        """Children come before their parents, so that what compression starts as has the last word."""
        std = self.config.initializer_range
        if isinstance(module, nn.Linear):
            nn.init.normal_(module.weight, std=std * getattr(module, "init_scale", 1.0))
            if module.bias is not None:
                nn.init.zeros_(module.bias)
        elif isinstance(module, nn.Embedding):
            nn.init.normal_(module.weight, std=std)
        elif isinstance(module, NSARMSNorm):
            nn.init.ones_(module.weight)
        elif isinstance(module, ConvCompression):
            module.reset_to_mean()
        elif isinstance(module, MLPCompression):
            module.reset_position()


class NSAModel(NSAPreTrainedModel):
    """Token embedding, decoder layers, final norm."""

    def __init__(self, config: NSAConfig) -> None:
        super().__init__(config)
        self.embed_tokens = nn.Embedding(config.vocab_size, config.hidden_size)
        self.layers = nn.ModuleList(NSADecoderLayer(config, i) for i in range(config.num_hidden_layers))
        self.norm = NSARMSNorm(config.hidden_size, config.rms_norm_eps)
        self.rotary_emb = NSARotary(config)
        self.gradient_checkpointing = False
        self.post_init()

    @can_return_tuple
    def forward(
        self,
        input_ids: Tensor | None = None,
        attention_mask: Tensor | None = None,
        position_ids: Tensor | None = None,
        past_key_values: Cache | None = None,
        inputs_embeds: Tensor | None = None,
        use_cache: bool | None = None,
        cu_seqlens: Tensor | None = None,
        cache: Cache | None = None,
        **kwargs: Any,
    ) -> BaseModelOutputWithPast:
        """Hidden states of every token.

        Args:
            input_ids: `[B, T]`, or give `inputs_embeds` `[B, T, C]`.
            attention_mask: `[B, T]`, with a cache `[B, cached + T]`; zeros before or after a row's tokens are padding.
            position_ids: `[B or 1, T]`, never needed. With batch 1, positions that restart at 0 mark packed documents;
                others than the tokens' own are refused.
            past_key_values: the cache of earlier calls; or a DynamicCache with keys and values `[B, Hkv, P, D]` of each
                layer, which stand before every row (prefix tuning). A mask then begins with P ones.
            use_cache: return a cache; the config's value unless given, and never where gradients are needed.
            cu_seqlens: int32 `[documents + 1]`, bounds of documents packed into one row (also `cu_seq_lens_q`, as
                transformers' collators call it); they do not see each other.
            cache: `past_key_values` by the name that transformers gives it since 5.24.
            max_length_q: the longest document's length, or a bound on it; dense layers on a GPU waste less by it.

        Returns:
            `last_hidden_state` `[B, T, C]`, zero at padding; `past_key_values`, or `cache`; `hidden_states` when
            `output_hidden_states` is true.

        Raises:
            ValueError: arguments do not fit together; the message says which.
        """
        if (input_ids is None) == (inputs_embeds is None):
            raise ValueError("give exactly one of input_ids and inputs_embeds")
        if kwargs.get("output_attentions"):
            raise ValueError("output_attentions is not supported: no attention matrix is ever made; see nsa.inspect")
        x = self.embed_tokens(input_ids) if inputs_embeds is None else inputs_embeds
        past_key_values = past_key_values if cache is None else cache
        cu_seqlens = _document_bounds(cu_seqlens, position_ids, attention_mask, past_key_values, kwargs)
        prefix = take_prefix(past_key_values, self.config)
        num_prefix = prefix[0][0].shape[1] if prefix else 0
        if prefix is not None:
            attention_mask = None if attention_mask is None else attention_mask[:, num_prefix:]
            position_ids = None if position_ids is None else position_ids - num_prefix
        cache = self._cache((x, *(prefix[0] if prefix else ())), past_key_values, use_cache, cu_seqlens is not None)
        caches = [] if cache is None else adopt_cache(cache, self.config)
        rows = _rows(x, attention_mask, position_ids, cu_seqlens, caches[0] if caches else None)
        rows = rows.behind(num_prefix) if num_prefix else rows
        num_columns, keep_hidden = num_prefix + x.shape[1], bool(kwargs.get("output_hidden_states"))

        x = rows.align(x)
        shared = {"position_embeddings": self.rotary_emb(rows.positions, x.dtype), "cu_seqlens": cu_seqlens}
        hidden = [rows.restore(x)] if keep_hidden else []
        for index, layer in enumerate(self.layers):
            held = {"cache": caches[index].state, "num_new": rows.num_new} if caches else {}
            if prefix is not None:
                held["prefix"] = prefix[index]
            if isinstance(layer.self_attn, DenseAttention):
                held["max_seqlen"] = kwargs.get("max_length_q")
            x = layer(x, **shared, **held)
            if keep_hidden:
                hidden.append(rows.restore(x))
        for cached in caches:
            cached.num_columns += num_columns
        x = rows.restore(self.norm(x))
        return BaseModelOutputWithPast(
            last_hidden_state=x,  # pyright: ignore[reportArgumentType]
            hidden_states=(*hidden[:-1], x) if keep_hidden else None,  # pyright: ignore[reportArgumentType]
            **{CACHE_NAME: cache},  # pyright: ignore[reportArgumentType]
        )

    def _cache(
        self, inputs: tuple[Tensor, ...], given: Cache | None, use_cache: bool | None, packed: bool
    ) -> Cache | None:
        """The cache of this call: the given one, a new one where one is wanted, or None."""
        if packed:
            if given is not None or use_cache:
                raise ValueError("packed documents have no cache: decode them as rows of a batch, or use_cache=False")
            return None
        prefix = inputs[1:]
        wanted = self.config.use_cache if use_cache is None else use_cache
        if (given is None or prefix) and torch.is_grad_enabled():
            wanted = wanted and not any(y.requires_grad for y in (*inputs, *self.parameters()))
        if given is not None and (wanted or not prefix):
            return given
        return new_cache(self.config) if wanted else None


class NSAForCausalLM(NSAPreTrainedModel, GenerationMixin):
    """`NSAModel` with an output layer over the vocabulary."""

    _tied_weights_keys = {"lm_head.weight": "model.embed_tokens.weight"}  # noqa: RUF012

    def __init__(self, config: NSAConfig) -> None:
        super().__init__(config)
        self.model = NSAModel(config)
        self.vocab_size = config.vocab_size
        self.lm_head = nn.Linear(config.hidden_size, config.vocab_size, bias=False)
        self.post_init()

    @can_return_tuple
    def forward(
        self,
        input_ids: Tensor | None = None,
        attention_mask: Tensor | None = None,
        position_ids: Tensor | None = None,
        past_key_values: Cache | None = None,
        inputs_embeds: Tensor | None = None,
        labels: Tensor | None = None,
        use_cache: bool | None = None,
        logits_to_keep: int | Tensor = 0,
        cu_seqlens: Tensor | None = None,
        cache: Cache | None = None,
        **kwargs: Any,
    ) -> CausalLMOutputWithPast:
        """Logits of the next token, and their loss when `labels` are given; other arguments as in `NSAModel.forward`.

        Args:
            labels: `[B, T]`, the input ids themselves, -100 where there is nothing to predict. The logits at t are
                held against the label at t + 1; the first token of a packed document is nobody's label.
            logits_to_keep: only the last so many logits, or those at the given indices of T; 0 keeps all.
            num_items_in_batch: divides the summed loss in place of the number of labels in this call.
        """
        past_key_values = past_key_values if cache is None else cache
        outputs = self.model(
            input_ids=input_ids,
            attention_mask=attention_mask,
            position_ids=position_ids,
            past_key_values=past_key_values,
            inputs_embeds=inputs_embeds,
            use_cache=use_cache,
            cu_seqlens=cu_seqlens,
            **kwargs,
        )
        kept = slice(-logits_to_keep, None) if isinstance(logits_to_keep, int) else logits_to_keep
        logits = self.lm_head(outputs.last_hidden_state[:, kept])
        loss = None
        if labels is not None:
            bounds = _document_bounds(cu_seqlens, position_ids, attention_mask, past_key_values, kwargs)
            if bounds is not None:
                # Documents without tokens begin where the next one does, or one behind the row.
                padded = nn.functional.pad(labels, (0, 1))
                labels = padded.index_fill(1, bounds[:-1].long(), -100)[:, :-1]
            loss = self.loss_function(logits=logits, labels=labels.long(), vocab_size=self.vocab_size, **kwargs)
        return CausalLMOutputWithPast(
            loss=loss,
            logits=logits,
            hidden_states=outputs.hidden_states,
            **{CACHE_NAME: outputs.get(CACHE_NAME)},
        )

    def _prefill(self, *args: Any, **options: Any) -> Any:
        """Called by `generate()` once, with whole prompts; `prepare_inputs_for_generation` may see parts of them.

        Raises:
            ValueError: a prompt is empty or padded on the right.
        """
        model_kwargs = options.get("model_kwargs", args[-1])
        if model_kwargs.get("attention_mask") is not None:
            check_prompts(model_kwargs["attention_mask"])
        return super()._prefill(*args, **options)  # pyright: ignore[reportAttributeAccessIssue]


def _document_bounds(
    cu_seqlens: Tensor | None,
    position_ids: Tensor | None,
    attention_mask: Tensor | None,
    past_key_values: Cache | None,
    kwargs: dict[str, Any],
) -> Tensor | None:
    """Bounds of packed documents, however they were given; None when the rows are not packed."""
    cu_seqlens = kwargs.get("cu_seq_lens_q") if cu_seqlens is None else cu_seqlens
    if cu_seqlens is not None:
        return cu_seqlens.int() if cu_seqlens.dtype == torch.int64 else cu_seqlens
    if past_key_values is not None:
        return None
    bounds = documents_of(position_ids)
    # A mask of ones says nothing that the positions do not.
    return bounds if bounds is None or attention_mask is None or bool(attention_mask.all()) else None


def _rows(
    x: Tensor,
    attention_mask: Tensor | None,
    position_ids: Tensor | None,
    cu_seqlens: Tensor | None,
    cached: NSACacheLayer | None,
) -> Rows:
    if cu_seqlens is None:
        lengths, num_columns = None, 0
        if cached is not None:
            assert cached.state is not None
            lengths, num_columns = cached.state.lengths, cached.num_columns
        return arrange_rows(x, attention_mask, position_ids, lengths, num_columns)
    check_cu_seqlens(cu_seqlens, x, "input_ids")
    if attention_mask is not None and not bool(attention_mask.all()):
        raise ValueError("packed documents need no attention_mask; give padding at the end a document of its own")
    return packed_rows(x, cu_seqlens, position_ids)
