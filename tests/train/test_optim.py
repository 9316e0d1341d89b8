"""The schedule's values and which parameters decay."""

from __future__ import annotations

import pytest

from nsa.config.run import OptimSection
from nsa.train.model import build_model
from nsa.train.optim import build_optimizer, decays, learning_rate, set_learning_rate


def test_the_rate_rises_linearly_and_falls_as_a_cosine_to_the_floor() -> None:
    config = OptimSection(lr=1.0, warmup_steps=4, min_lr_ratio=0.2)
    rates = [learning_rate(step, 12, config) for step in range(1, 13)]
    assert rates[:4] == [0.25, 0.5, 0.75, 1.0]
    # Half of a cosine over steps 4..12 between 1.0 and 0.2: at its quarters 1 - 0.8 (1 - cos) / 2.
    assert rates[5] == pytest.approx(0.6 + 0.4 * 2**-0.5)
    assert rates[7] == pytest.approx(0.6)
    assert rates[9] == pytest.approx(0.6 - 0.4 * 2**-0.5)
    assert rates[11] == pytest.approx(0.2)


def test_the_schedule_works_without_warm_up_and_when_all_steps_warm_up() -> None:
    assert learning_rate(1, 1, OptimSection(lr=1.0, warmup_steps=0, min_lr_ratio=0.5)) == pytest.approx(0.5)
    assert learning_rate(3, 3, OptimSection(lr=1.0, warmup_steps=10)) == pytest.approx(0.3)


def test_only_maps_between_features_decay(tiny) -> None:
    config = tiny(model={"compression": "conv"})
    model = build_model(config, vocab_size=259, eos_token_id=257)
    chosen = decays(model)
    names = {name for name, _ in model.named_parameters()}
    assert chosen <= names
    assert "model.layers.0.mlp.gate_proj.weight" in chosen
    assert "model.layers.0.self_attn.o_proj.weight" in chosen
    rest = names - chosen
    assert {"model.embed_tokens.weight", "model.norm.weight"} <= rest
    assert any(".gate.down.weight" in name for name in rest)
    assert all(not name.endswith("bias") for name in chosen)
    assert not any(dict(model.named_parameters())[name].ndim < 2 for name in chosen)


def test_an_untied_output_layer_decays_and_every_parameter_is_optimised_once(tiny) -> None:
    model = build_model(tiny(model={"tie_word_embeddings": False}), vocab_size=259, eos_token_id=257)
    assert "lm_head.weight" in decays(model)
    optimizer = build_optimizer(model, OptimSection(weight_decay=0.3))
    grouped = [id(p) for group in optimizer.param_groups for p in group["params"]]
    assert sorted(grouped) == sorted(id(p) for p in model.parameters())
    assert [group["weight_decay"] for group in optimizer.param_groups] == [0.3, 0.0]
    set_learning_rate(optimizer, 0.125)
    assert [group["lr"] for group in optimizer.param_groups] == [0.125, 0.125]
