"""Small transformers models, away from their zero-initialised start, for the tests of everything that uses one."""

import torch

from nsa.hf import NSAConfig, NSAForCausalLM

SIZES = {
    "vocab_size": 61,
    "hidden_size": 32,
    "intermediate_size": 48,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "compress_block_size": 8,
    "compress_stride": 4,
    "select_block_size": 16,
    "num_selected_blocks": 4,
    "window_size": 20,
    "attention_backend": "torch",
}


def tiny_config(*layer_types: str, **changes) -> NSAConfig:
    """Two layers of the given types, "nsa" unless given."""
    if layer_types:
        changes |= {"layer_types": list(layer_types), "num_hidden_layers": len(layer_types)}
    return NSAConfig(**{**SIZES, **changes})


def tiny_model(*layer_types: str, seed: int = 0, **changes) -> NSAForCausalLM:
    """A model in fp64 whose matrices, the zero-initialised ones too, are large enough to tell tokens apart."""
    torch.manual_seed(seed)
    model = NSAForCausalLM(tiny_config(*layer_types, **changes)).double().eval()
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if "norm" not in name:
                parameter.add_(torch.randn_like(parameter), alpha=0.3)
    return model


def left_padded(rows: list[torch.Tensor], pad: int = 0) -> tuple[torch.Tensor, torch.Tensor]:
    """`[B, T]` token ids and their attention mask."""
    length = max(map(len, rows))
    ids = torch.full((len(rows), length), pad)
    mask = torch.zeros(len(rows), length, dtype=torch.long)
    for i, row in enumerate(rows):
        ids[i, length - len(row) :], mask[i, length - len(row) :] = row, 1
    return ids, mask
