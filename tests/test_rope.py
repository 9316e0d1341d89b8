"""Rotary embedding: relative for each head, dtype kept, scaled positions."""

import pytest
import torch

from nsa.rope import RotaryEmbedding, apply_rope


def test_logits_depend_on_distance_only_for_every_head():
    rope = RotaryEmbedding(8)
    q, k = (torch.randn(1, 1, 3, 8, dtype=torch.float64) for _ in range(2))

    def logits(q_pos: int, k_pos: int) -> torch.Tensor:
        at = [rope(torch.tensor([[p]]), torch.float64) for p in (q_pos, k_pos)]
        return (apply_rope(q, *at[0]) * apply_rope(k, *at[1])).sum(-1)

    torch.testing.assert_close(logits(1005, 1000), logits(5, 0))
    assert not torch.allclose(logits(6, 0), logits(5, 0))


def test_heads_are_rotated_each_by_itself():
    """Rotating heads as one flat vector would give every head other frequencies."""
    cos, sin = RotaryEmbedding(8)(torch.arange(5).unsqueeze(0))
    x = torch.randn(2, 5, 3, 8)
    together = apply_rope(x, cos, sin)
    for head in range(3):
        assert torch.equal(together[:, :, head : head + 1], apply_rope(x[:, :, head : head + 1], cos, sin))


def test_rotation_equals_complex_multiplication():
    positions = torch.tensor([[0, 3, 11]])
    cos, sin = RotaryEmbedding(6, base=100.0)(positions, torch.float64)
    x = torch.randn(1, 3, 1, 6, dtype=torch.float64)
    frequency = 100.0 ** (-torch.arange(3, dtype=torch.float64) / 3)
    turned = torch.complex(x[..., :3], x[..., 3:]) * torch.exp(1j * positions[0].view(1, 3, 1, 1) * frequency)
    torch.testing.assert_close(apply_rope(x, cos, sin), torch.cat([turned.real, turned.imag], dim=-1))


def test_scaling_interpolates_positions():
    plain, scaled = RotaryEmbedding(8), RotaryEmbedding(8, scaling_factor=4.0)
    torch.testing.assert_close(scaled(torch.tensor([[40]])), plain(torch.tensor([[10]])))


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float32, torch.float64])
def test_dtype_is_kept(dtype):
    x = torch.randn(1, 4, 2, 8).to(dtype)
    assert apply_rope(x, *RotaryEmbedding(8)(torch.arange(4).unsqueeze(0), dtype)).dtype == dtype


@pytest.mark.parametrize(("arguments", "named"), [((7,), "7"), ((8, 0.0), "0.0"), ((8, 1e4, -1.0), "-1.0")])
def test_bad_arguments(arguments, named):
    with pytest.raises(ValueError, match=named):
        RotaryEmbedding(*arguments)
