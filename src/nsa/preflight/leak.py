"""Whether the configured model sees the future or a neighbouring document, found by changing what it must not see.

A small model with the config's attention (geometry, kinds of layers, compression, gate, group and head sizes; fewer
heads, layers and features) reads random tokens. Changing tokens after t must leave its outputs up to t alone, in plain
rows and in packed documents; changing other documents must leave a document's outputs alone.

    leaks = find_leaks(config, torch.device("cpu"))    # [] for a causal model, else a sentence for each leak
"""

from __future__ import annotations

from collections.abc import Iterator

import torch
from torch import Tensor, nn

from nsa.config.run import RunConfig
from nsa.train.model import build_model

MAX_LENGTH = 1536  # tokens of a probe; enough for the paper's geometry to leave blocks out
VOCAB_SIZE = 97
WEIGHT_NOISE = 0.3  # added to every weight, so that layers which start at zero pass a leak on too
DRAWS = 2  # a leak is one that shows in each of so many draws; rounding near a tie does not
# A change at or before t, as a share of the change after t, that rounding cannot explain.
TOLERANCE = {torch.float64: 1e-7, torch.float32: 1e-3}


@torch.no_grad()
def find_leaks(config: RunConfig, device: torch.device) -> list[str]:
    """What the model sees and must not, one sentence for each; torch's random state is left as it was.

    Args:
        config: of the run. On the CPU its backend "triton" is probed as "torch", which computes the same.
        device: where to probe; fp64 on the CPU, fp32 on a GPU.

    Raises:
        ValueError: no model can be built from the config.
    """
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(config.run.seed)
        found = [_leaks_of_one_draw(config, device)]
        while found[-1] and len(found) < DRAWS:
            found.append(_leaks_of_one_draw(config, device))
    return found[-1]


def probe_length(config: RunConfig) -> int:
    """Tokens that show every branch at work: selection leaves blocks out, the window ends before the start."""
    geometry = config.model.geometry
    reach = max(geometry.num_selected_blocks * geometry.select_block_size, geometry.window_size)
    return min(config.train.sequence_length, reach + 2 * geometry.select_block_size + 7, MAX_LENGTH)


def _leaks_of_one_draw(config: RunConfig, device: torch.device) -> list[str]:
    model = _probe_model(config, device)
    length = probe_length(config)
    tokens = torch.randint(VOCAB_SIZE, (length,), device=device)
    return [*_leaks_in_rows(model, tokens, config), *_leaks_in_documents(model, tokens)]


def _probe_model(config: RunConfig, device: torch.device) -> nn.Module:
    """The configured model with few heads, features and layers (one of each kind), and all weights away from zero."""
    model = config.model
    group = model.num_attention_heads // model.num_key_value_heads
    num_groups = min(2, model.num_key_value_heads)
    kinds = tuple(dict.fromkeys(model.layer_types))
    on_cpu = device.type == "cpu"
    changes = {
        "head_dim": model.head_sizes[0],
        "hidden_size": min(model.hidden_size, 64),
        "intermediate_size": min(model.intermediate_size, 64),
        "num_hidden_layers": len(kinds),
        "layer_types": kinds,
        "num_attention_heads": group * num_groups,
        "num_key_value_heads": num_groups,
        "attention_backend": "torch" if on_cpu and model.attention_backend == "triton" else model.attention_backend,
    }
    small = config.model_copy(update={"model": model.model_copy(update=changes)})
    probe = build_model(small, vocab_size=VOCAB_SIZE, eos_token_id=0)
    probe.to(device, torch.float64 if on_cpu else torch.float32)  # pyright: ignore[reportCallIssue, reportArgumentType]
    for parameter in probe.parameters():
        parameter.add_(torch.randn_like(parameter), alpha=WEIGHT_NOISE)
    return probe.eval()


def _leaks_in_rows(model: nn.Module, tokens: Tensor, config: RunConfig) -> Iterator[str]:
    """Plain rows: the same tokens in each, but for those after the row's own t."""
    geometry, length = config.model.geometry, len(tokens)
    block = length // 2 // geometry.select_block_size * geometry.select_block_size
    before_compressed = geometry.compress_block_size - 2  # the first compressed block lacks one token
    last_seen = {block - 1, block, length // 3, before_compressed, length - 2}
    times = sorted(t for t in last_seen if 0 <= t < length - 1)
    rows = tokens.repeat(len(times) + 1, 1)
    for row, t in zip(rows[1:], times, strict=True):
        row[t + 1 :] = _others(row[t + 1 :])
    out = model(input_ids=rows, use_cache=False).logits
    for row, t in zip(out[1:], times, strict=True):
        if position := _seen(out[0], row, slice(0, t + 1), slice(t + 1, None)):
            yield f"the output at position {position[0]} of {length} depends on tokens after {t} ({position[1]})"


def _leaks_in_documents(model: nn.Module, tokens: Tensor) -> Iterator[str]:
    """Three documents packed into one row, of lengths that are no multiples of a block."""
    length = len(tokens)
    if length < 8:
        return
    first, second = length * 3 // 10 + 1, length * 3 // 4 + 1
    bounds = torch.tensor([0, first, second, length], dtype=torch.int32, device=tokens.device)
    middle = (first + second) // 2
    later, earlier = tokens.clone(), tokens.clone()
    later[middle + 1 :] = _others(later[middle + 1 :])
    earlier[:second] = _others(earlier[:second])
    out, after_later, after_earlier = (
        model(input_ids=x.unsqueeze(0), cu_seqlens=bounds, use_cache=False).logits[0] for x in (tokens, later, earlier)
    )
    if position := _seen(out, after_later, slice(0, middle + 1), slice(middle + 1, None)):
        yield f"in packed documents, the output at {position[0]} depends on tokens after {middle} ({position[1]})"
    if position := _seen(out, after_earlier, slice(second, length), slice(0, second)):
        yield f"in packed documents, the output at {position[0]} depends on earlier documents ({position[1]})"


def _seen(one: Tensor, other: Tensor, fixed: slice, free: slice) -> tuple[int, str] | None:
    """The first position of `fixed` where two outputs differ by more than rounding, and by how much; None if none."""
    change = (one - other).abs().amax(dim=-1)
    share = change[fixed] / change[free].max()
    above = (share > TOLERANCE[one.dtype]).nonzero().flatten().tolist()
    if not above:
        return None
    return (fixed.start or 0) + above[0], f"{share.max().item():.1%} of the change that those tokens may make"


def _others(tokens: Tensor) -> Tensor:
    """Other tokens than these at every position."""
    return (tokens + torch.randint_like(tokens, 1, VOCAB_SIZE)) % VOCAB_SIZE
