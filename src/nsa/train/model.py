"""The model of a run: a `ModelSection` and a tokenizer become an `NSAForCausalLM`."""

from __future__ import annotations

from collections.abc import Callable
from functools import partial
from typing import Any

import torch
from torch import Tensor
from torch.distributed.checkpoint.state_dict import StateDictOptions, get_model_state_dict

from nsa.attention import NSAAttention
from nsa.config.run import RunConfig
from nsa.hf import NSAConfig, NSAForCausalLM
from nsa.ops.routing import RoutingReport, routing_report
from nsa.train.parallel import Parallel


def build_model(config: RunConfig, *, vocab_size: int, eos_token_id: int) -> NSAForCausalLM:
    """A freshly initialised model in fp32; its weights come from torch's current random state.

    Raises:
        ValueError: the sizes do not fit together.
    """
    return NSAForCausalLM(model_config(config, vocab_size=vocab_size, eos_token_id=eos_token_id))


def model_config(config: RunConfig, *, vocab_size: int, eos_token_id: int) -> NSAConfig:
    """The transformers config of a run's model.

    Raises:
        ValueError: the sizes do not fit together.
    """
    values = config.model.model_dump()
    layer_types = list(values.pop("layer_types"))
    if len(layer_types) == 1:
        layer_types *= config.model.num_hidden_layers
    rope = {"rope_type": "default", **values.pop("rope_parameters"), "rope_theta": values.pop("rope_theta")}
    values = {name: value for name, value in values.items() if value is not None}
    values.setdefault("max_position_embeddings", config.train.sequence_length)
    return NSAConfig(
        **values,
        layer_types=layer_types,
        vocab_size=vocab_size,
        rope_parameters=rope,
        eos_token_id=eos_token_id,
        bos_token_id=None,
        pad_token_id=None,
    )


def training_route(config: RunConfig, device: torch.device) -> RoutingReport | None:
    """What runs the NSA layers of a model in a training step, and why; None for a model without such layers.

    Raises:
        ValueError: the backend that the config names cannot run on the device.
    """
    model, train = config.model, config.train
    if "nsa" not in model.layer_types:
        return None
    (key_size, value_size), groups = model.head_sizes, model.num_key_value_heads
    shapes = ((model.num_attention_heads, key_size), (groups, key_size), (groups, value_size))
    one = torch.empty(1, dtype=torch.bfloat16 if train.precision == "bf16" else torch.float32, device=device)
    tokens = train.micro_batch_rows * train.sequence_length
    q, k, v = (one.expand(1, tokens, heads, size) for heads, size in shapes)
    bounds = torch.empty(train.micro_batch_rows + 1, dtype=torch.int32, device=device)
    return routing_report(q, k, v, model.geometry, cu_seqlens=bounds, backend=model.attention_backend)


def compile_layers(model: NSAForCausalLM, backend: str = "inductor") -> None:
    """Compile every decoder layer by itself, for training; alike layers share one compilation.

    Without gradients, in evaluation and generation, the layers run as they are: their shapes are many.

    Args:
        backend: of torch.compile.
    """
    for layer in model.model.layers:
        # Dense attention over packed documents reads their bounds on the host where varlen_attn does not serve.
        whole = isinstance(layer.self_attn, NSAAttention)
        compiled = torch.compile(layer.forward, fullgraph=whole, backend=backend)
        layer.forward = partial(_forward, layer.forward, compiled)


def _forward(eager: Callable[..., Tensor], compiled: Callable[..., Tensor], *inputs: Any, **options: Any) -> Tensor:
    if not torch.is_grad_enabled():
        return eager(*inputs, **options)
    if options.get("cu_seqlens") is not None:
        # Its length differs from batch to batch; without this the first one would get a graph of its own.
        torch._dynamo.maybe_mark_dynamic(options["cu_seqlens"], 0)
    return compiled(*inputs, **options)


def whole_model(model: NSAForCausalLM, parallel: Parallel) -> NSAForCausalLM | None:
    """The model itself where it is whole, else a copy that is, on rank 0; None on the others."""
    if parallel.mode != "fsdp2":
        return model if parallel.is_main else None
    # Every rank sends its part.
    weights = get_model_state_dict(model, options=StateDictOptions(full_state_dict=True, cpu_offload=True))
    if not parallel.is_main:
        return None
    with torch.random.fork_rng(devices=[]):
        copy = NSAForCausalLM(model.config)
    copy.load_state_dict(weights)
    return copy.to(parallel.device)  # pyright: ignore[reportArgumentType]  (transformers wraps `to`)
