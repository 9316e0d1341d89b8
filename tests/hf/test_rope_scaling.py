"""Rotary scaling through `rope_parameters`, against the formulas of its papers."""

import math

import pytest
import torch
from transformers import LlamaConfig
from transformers.models.llama.modeling_llama import LlamaRotaryEmbedding

from tiny_models import tiny_config, tiny_model

POSITIONS = torch.arange(300)[None]
LLAMA3 = {"low_freq_factor": 1.0, "high_freq_factor": 4.0, "original_max_position_embeddings": 64}


def cosines_and_sines(**rope):
    config = tiny_config(rope_parameters=rope, rope_theta=5000.0, head_dim=16, max_position_embeddings=128)
    rotary = tiny_model(**config.to_diff_dict()).model.rotary_emb
    return rotary(POSITIONS, torch.float32)


def angles(base: float, positions: torch.Tensor) -> torch.Tensor:
    return torch.tensor([[p * base ** (-2 * (i % 8) / 16) for i in range(16)] for p in positions.tolist()])


def test_default_frequencies_fall_by_powers_of_the_base():
    cos, sin = cosines_and_sines(rope_type="default")
    expected = angles(5000.0, POSITIONS[0])
    assert torch.allclose(cos[0], expected.cos(), atol=1e-4)
    assert torch.allclose(sin[0], expected.sin(), atol=1e-4)


def test_linear_scaling_divides_positions():
    cos, _ = cosines_and_sines(rope_type="linear", factor=4.0)
    assert torch.allclose(cos[0], angles(5000.0, POSITIONS[0] / 4).cos(), atol=1e-4)


def test_ntk_scaling_stretches_the_slowest_frequency_by_the_factor_and_leaves_the_fastest():
    cos, _ = cosines_and_sines(rope_type="ntk", factor=4.0)
    plain = 5000.0 ** (-14 / 16)
    assert torch.allclose(cos[0, :, 7], (POSITIONS[0] * plain / 4).cos(), atol=1e-4)
    assert torch.allclose(cos[0, :, 0], POSITIONS[0].float().cos(), atol=1e-4)


def test_yarn_scales_attention_by_its_temperature():
    cos, sin = cosines_and_sines(rope_type="yarn", factor=4.0)
    assert torch.allclose(cos[0, 0], torch.full((16,), 0.1 * math.log(4.0) + 1), atol=1e-5)
    assert not sin[0, 0].any()


@pytest.mark.parametrize(
    "rope",
    [
        {"rope_type": "default"},
        {"rope_type": "linear", "factor": 4.0},
        {"rope_type": "yarn", "factor": 4.0},
        {"rope_type": "llama3", "factor": 4.0, **LLAMA3},
    ],
    ids=lambda rope: rope["rope_type"],
)
def test_every_type_that_transformers_has_equals_its_llama(rope):
    llama = LlamaConfig(
        head_dim=16, rope_parameters={**rope, "rope_theta": 5000.0}, max_position_embeddings=128, num_attention_heads=4
    )
    expected = LlamaRotaryEmbedding(llama)(torch.zeros(1), POSITIONS)
    for ours, theirs in zip(cosines_and_sines(**rope), expected, strict=True):
        assert torch.allclose(ours, theirs, atol=1e-4)


@pytest.mark.parametrize("rope", ["linear", "ntk", "yarn"])
def test_decoding_equals_the_whole_with_scaled_positions(rope):
    model = tiny_model("nsa", "full_attention", rope_parameters={"rope_type": rope, "factor": 4.0})
    ids = torch.arange(90)[None] * 7 % 61
    with torch.no_grad():
        cache = model(ids[:, :60], use_cache=True).past_key_values
        steps = [model(ids[:, i : i + 1], past_key_values=cache).logits for i in range(60, 90)]
        assert torch.allclose(torch.cat(steps, dim=1), model(ids).logits[:, 60:], atol=1e-10)
