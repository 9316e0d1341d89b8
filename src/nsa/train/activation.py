"""What backward computes a second time to save memory, and what it never does.

    checkpoint_activations(model, "selective")

Each decoder layer keeps its input. "selective" also keeps the results of its attention operators, which cost the most
time for each byte that they take, and recomputes projections, norms, rotations and SwiGLU; "full" recomputes attention
too. Both keep the chosen blocks: they are small, and choosing again, from inputs that may differ in the last bit, could
give others. On a GPU branches and choice are one operator, whose results both kinds keep.
"""

from __future__ import annotations

from functools import partial
from typing import Any, Literal

import torch
from torch.utils.checkpoint import CheckpointPolicy, create_selective_checkpoint_contexts

from nsa.hf import NSAForCausalLM
from nsa.ops import registry  # noqa: F401  (defines torch.ops.nsa; nsa.hf has had torch.ops.torch_attn defined)

Kind = Literal["none", "selective", "full"]
CHOICE = frozenset({torch.ops.nsa.select_blocks.default, torch.ops.nsa.attention.default})
ATTENTION = CHOICE | {
    torch.ops.nsa.compressed_attention.default,
    torch.ops.nsa.selected_attention.default,
    torch.ops.nsa.window_attention.default,
    torch.ops.aten._scaled_dot_product_flash_attention.default,
    torch.ops.aten._scaled_dot_product_flash_attention_for_cpu.default,
    torch.ops.aten._scaled_dot_product_cudnn_attention.default,
    torch.ops.aten._scaled_dot_product_efficient_attention.default,
    torch.ops.torch_attn._varlen_attn.default,
}


def checkpoint_activations(model: NSAForCausalLM, kind: Kind) -> None:
    """Make every decoder layer recompute what `kind` says; the gradients stay the same."""
    if kind == "none":
        return
    contexts = selective_contexts if kind == "selective" else full_contexts
    for layer in model.model.layers:
        layer.checkpoint_contexts = contexts  # pyright: ignore[reportArgumentType]


def selective_contexts() -> Any:
    """Context managers of forward and recomputation that keep all attention results."""
    return create_selective_checkpoint_contexts(partial(_policy, ATTENTION))


def full_contexts() -> Any:
    """Context managers of forward and recomputation that keep the choice of blocks."""
    return create_selective_checkpoint_contexts(partial(_policy, CHOICE))


def _policy(kept: frozenset[Any], context: Any, operator: Any, *arguments: Any, **options: Any) -> CheckpointPolicy:
    return CheckpointPolicy.MUST_SAVE if operator in kept else CheckpointPolicy.PREFER_RECOMPUTE
