"""The config: what it derives, and that numbers which do not fit are named."""

import json

import pytest
from transformers import PreTrainedConfig

from nsa import BlockGeometry
from nsa.hf import NSAConfig
from tiny_models import tiny_config


def test_the_defaults_are_the_papers_geometry_in_every_layer():
    config = NSAConfig()
    assert config.geometry == BlockGeometry()
    assert config.layer_types == ["nsa"] * config.num_hidden_layers
    assert (config.head_dim, config.value_head_dim) == (64, 64)


def test_the_callers_rope_parameters_stay_as_they_are():
    rope = {"rope_type": "linear", "factor": 2.0}
    config = tiny_config(rope_parameters=rope, rope_theta=5000.0)
    assert rope == {"rope_type": "linear", "factor": 2.0}
    assert config.rope_parameters == {"rope_type": "linear", "factor": 2.0, "rope_theta": 5000.0}


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"compress_stride": 3}, "compress_stride 3 must divide compress_block_size 8"),
        ({"num_selected_blocks": 2}, "num_selected_blocks 2 must hold the forced blocks"),
        ({"window_size": "wide"}, "window_size must be an integer, not 'wide'"),
        ({"num_key_value_heads": 3}, "num_attention_heads 4 must be a positive multiple of num_key_value_heads 3"),
        ({"hidden_size": 33}, "hidden_size 33 is no multiple of num_attention_heads 4; give head_dim"),
        ({"hidden_size": 0}, "hidden_size must be a positive integer, not 0"),
        ({"head_dim": 7}, "head_dim must be positive and even, not 7"),
        ({"value_head_dim": 0}, "value_head_dim must be positive, not 0"),
        ({"layer_types": ["nsa"]}, "layer_types has 1 entries for num_hidden_layers 2"),
        ({"layer_types": ["nsa", "dense"]}, r"layer_types\[1\] is 'dense'; choose one of nsa, full_attention"),
        ({"layer_types": 3}, "layer_types must be a list with a name for each layer, not 3"),
        ({"layer_types": [["nsa"], "nsa"]}, "layer_types must be a list with a name for each layer"),
        ({"layer_types": ["nsa"] * 2, "nsa_layer_types": ["full_attention"] * 2}, "nsa_layer_types differ"),
        ({"hidden_act": "nope"}, "hidden_act 'nope' is unknown to transformers"),
        ({"rope_parameters": "linear"}, "rope_parameters must be a dictionary, not 'linear'"),
        ({"rope_parameters": {"rope_theta": 0}}, "rope_theta must be a positive number, not 0"),
        ({"rope_parameters": {"rope_theta": "x"}}, "rope_theta must be a positive number, not 'x'"),
        ({"rope_parameters": {"rope_type": "ntk", "factor": "x"}}, "needs a factor of at least 1, not 'x'"),
        ({"compression": "max"}, "compression must be one of mean, conv, mlp, not 'max'"),
        ({"gate_temperature": 0.0}, "gate_temperature must be a positive number, not 0.0"),
        ({"rope_parameters": {"rope_type": "dynamic", "factor": 2.0}}, "rope_type must be one of .* not 'dynamic'"),
        ({"rope_parameters": {"rope_type": "yarn"}}, "rope_type 'yarn' needs a factor of at least 1, not None"),
        ({"rope_parameters": {"rope_type": "llama3", "factor": 2.0}}, "Missing required keys"),
        ({"rope_parameters": {"nsa": {"rope_type": "default"}}}, "all layers share one set, give it flat"),
        ({"rope_parameters": {"rope_type": "default", "partial_rotary_factor": 0.5}}, "partial_rotary_factor"),
    ],
)
def test_numbers_that_do_not_fit_are_named(changes, message):
    with pytest.raises(ValueError, match=message):
        tiny_config(**changes)


def test_a_config_that_was_broken_later_is_not_saved(tmp_path):
    config = tiny_config()
    config.layer_types = ["nsa", "dense"]
    with pytest.raises(ValueError, match=r"layer_types\[1\] is 'dense'"):
        config.save_pretrained(tmp_path)


def test_the_base_class_of_transformers_reads_what_is_saved(tmp_path):
    """As `Trainer` and the auto classes do, without knowing NSA."""
    config = tiny_config("nsa", "sliding_attention", rope_parameters={"rope_type": "ntk", "factor": 2.0})
    config.save_pretrained(tmp_path)
    assert PreTrainedConfig.from_json_file(tmp_path / "config.json").window_size == 20
    assert NSAConfig.from_pretrained(tmp_path).layer_types == ["nsa", "sliding_attention"]
    assert NSAConfig.from_dict(config.to_dict()).to_dict() == config.to_dict()


def test_configs_that_name_their_layers_as_in_memory_are_read(tmp_path):
    config = tiny_config("nsa", "full_attention")
    values = config.to_dict()
    values["layer_types"] = values.pop("nsa_layer_types")
    (tmp_path / "config.json").write_text(json.dumps(values, default=str))
    assert NSAConfig.from_pretrained(tmp_path).layer_types == ["nsa", "full_attention"]
