"""The options of a model stand in four places, which agree: YAML, `NSAConfig`, `BlockGeometry`, `NSAAttention`."""

from __future__ import annotations

import inspect
from dataclasses import fields
from pathlib import Path
from typing import Any

import pytest
import yaml

from nsa.attention import NSAAttention
from nsa.config.load import ConfigError, load_config
from nsa.config.run import ModelSection
from nsa.geometry import BlockGeometry
from nsa.hf import NSAConfig
from nsa.hf.dense_nsa import DenseAttention
from nsa.train.model import build_model

# Sizes have the defaults of a small model in YAML, of a large one in `NSAConfig`.
SIZES = {
    *("hidden_size", "intermediate_size", "num_hidden_layers", "num_attention_heads"),
    *("layer_types", "max_position_embeddings"),
}
# What no run chooses: it comes from the tokenizer, or holds for generation alone.
NOT_IN_YAML = {"vocab_size", "pad_token_id", "bos_token_id", "eos_token_id", "use_cache", "hidden_act"}
# Option of the module -> key.
OF_MODULE = {"num_heads": "num_attention_heads", "num_kv_heads": "num_key_value_heads"}
OF_MODULE |= {"bias": "attention_bias", "backend": "attention_backend"}
# The model gives cosines and sines to all of its layers.
OF_MODULE_ALONE = {"self", "geometry", "rope_base", "rope_scaling_factor"}
CHANGED: dict[str, Any] = {
    "hidden_size": 48,
    "intermediate_size": 40,
    "num_hidden_layers": 2,
    "num_attention_heads": 6,
    "num_key_value_heads": 3,
    "head_dim": 10,
    "value_head_dim": 6,
    "layer_types": ["nsa", "full_attention"],
    "max_position_embeddings": 4096,
    "rope_theta": 5000.0,
    "rope_parameters": {"rope_type": "linear", "factor": 2.0},
    "attention_bias": True,
    "rms_norm_eps": 1e-4,
    "initializer_range": 0.01,
    "tie_word_embeddings": False,
    "compress_block_size": 16,
    "compress_stride": 8,
    "select_block_size": 32,
    "num_selected_blocks": 6,
    "num_init_blocks": 2,
    "num_local_blocks": 3,
    "window_size": 40,
    "compression": "conv",
    "compress_rope": "after",
    "shared_kv": True,
    "gate": "sigmoid",
    "gate_temperature": 2.0,
    "attention_backend": "torch",
}


def defaults_of_config() -> dict[str, Any]:
    """The own options of `NSAConfig`."""
    return {name: getattr(NSAConfig, name, None) for name in NSAConfig.__annotations__ if not name.startswith("_")}


def defaults_of_module() -> dict[str, Any]:
    found = inspect.signature(NSAAttention.__init__).parameters.values()
    return {OF_MODULE.get(p.name, p.name): p.default for p in found if p.name not in OF_MODULE_ALONE}


def test_every_option_is_a_key_and_a_field_with_the_same_default() -> None:
    section = {name: field.default for name, field in ModelSection.model_fields.items()}
    section["rope_parameters"] = section["rope_parameters"] or None  # {} in YAML, where None says nothing
    config = defaults_of_config()
    assert section.keys() - {"rope_theta"} == config.keys() - NOT_IN_YAML
    same = config.keys() - NOT_IN_YAML - SIZES
    assert {name: section[name] for name in same} == {name: config[name] for name in same}
    geometry = {field.name: field.default for field in fields(BlockGeometry)}
    assert {name: section[name] for name in geometry} == geometry
    module = defaults_of_module()
    options = {name for name, default in module.items() if default is not inspect.Parameter.empty}
    assert {name: section[name] for name in options} == {name: module[name] for name in options}
    assert module.keys() <= section.keys()
    assert section["rope_theta"] == inspect.signature(NSAAttention.__init__).parameters["rope_base"].default


def test_every_key_reaches_the_model(tmp_path: Path) -> None:
    assert CHANGED.keys() == ModelSection.model_fields.keys()
    for name, field in ModelSection.model_fields.items():
        assert CHANGED[name] != field.default, name
    path = tmp_path / "c.yaml"
    path.write_text(yaml.safe_dump({"model": CHANGED}))
    model = build_model(load_config(path), vocab_size=61, eos_token_id=0)
    rope = {**CHANGED["rope_parameters"], "rope_theta": 5000.0}
    expected = {**CHANGED, "rope_parameters": rope}
    del expected["rope_theta"]
    assert {name: getattr(model.config, name) for name in expected} == expected
    nsa, dense = (layer.self_attn for layer in model.model.layers)
    assert isinstance(nsa, NSAAttention)
    assert isinstance(dense, DenseAttention)
    assert nsa.geometry == BlockGeometry(16, 8, 32, 6, 2, 3, 40)
    assert (nsa.num_heads, nsa.num_kv_heads, nsa.head_dim, nsa.value_head_dim) == (6, 3, 10, 6)
    assert type(nsa.compress_k).__name__ == type(nsa.compress_v).__name__ == "ConvCompression"
    assert (nsa.compress_rope, nsa.shared_kv, nsa.backend) == ("after", True, "torch")
    assert (nsa.gate.kind, nsa.gate.temperature) == ("sigmoid", 2.0)
    for layer in (nsa, dense):
        assert all(projection.bias is not None for projection in (layer.q_proj, layer.k_proj, layer.v_proj))


def test_rope_parameters_can_be_given_as_an_option(tmp_path: Path) -> None:
    path = tmp_path / "c.yaml"
    path.write_text("")
    option = "--model.rope_parameters"
    config = load_config(path, [option, "{rope_type: yarn, factor: 4.0}", "--model.attention_bias", "true"])
    assert config.model.rope_parameters == {"rope_type": "yarn", "factor": 4.0}
    assert config.model.attention_bias
    assert load_config(path, [option, "{}"]).model.rope_parameters == {}
    with pytest.raises(ConfigError, match=r'--model.rope_parameters must be keys with values, as "{key: value}"'):
        load_config(path, [option, "yarn"])
