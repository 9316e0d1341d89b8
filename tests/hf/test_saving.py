"""Saving, loading, auto classes and initial weights."""

import subprocess
import sys

import pytest
import torch

from nsa.hf import NSAConfig, NSAForCausalLM, NSAModel
from tiny_models import tiny_config, tiny_model

IDS = torch.arange(50)[None] % 61
LAYERS = ("nsa", "full_attention", "sliding_attention")


@pytest.mark.parametrize("tied", [True, False])
@pytest.mark.parametrize("compression", ["mean", "conv", "mlp"])
def test_a_saved_model_comes_back_bit_for_bit(tmp_path, tied, compression):
    model = tiny_model(*LAYERS, tie_word_embeddings=tied, compression=compression, gate="sigmoid", value_head_dim=12)
    model.save_pretrained(tmp_path)
    loaded = NSAForCausalLM.from_pretrained(tmp_path)
    assert loaded.config.to_diff_dict() | {"_name_or_path": ""} == model.config.to_diff_dict() | {"_name_or_path": ""}
    assert loaded.state_dict().keys() == model.state_dict().keys()
    assert all(torch.equal(x, loaded.state_dict()[name]) for name, x in model.state_dict().items())
    assert (loaded.lm_head.weight is loaded.model.embed_tokens.weight) == tied
    with torch.no_grad():
        # Where weights lie in memory may change how a matrix product is summed.
        assert torch.allclose(loaded(IDS).logits, model(IDS).logits, atol=1e-12)


def test_a_model_loads_in_another_dtype(tmp_path):
    model = tiny_model(*LAYERS, compression="conv")
    model.save_pretrained(tmp_path)
    loaded = NSAForCausalLM.from_pretrained(tmp_path, dtype=torch.bfloat16)
    assert {p.dtype for p in loaded.parameters()} == {torch.bfloat16}
    assert all(torch.equal(x.bfloat16(), loaded.state_dict()[name]) for name, x in model.state_dict().items())
    with torch.no_grad():
        cos, _ = loaded.model.rotary_emb(torch.arange(50)[None], torch.bfloat16)
        assert cos.dtype == torch.float32
        assert loaded(IDS).logits.dtype == torch.bfloat16
        assert loaded.double().model.rotary_emb.frequencies(torch.device("cpu"))[0].dtype == torch.float32


def test_weights_that_are_missing_get_their_initial_values(tmp_path):
    """Loading builds the model without storage; what the file lacks must still start as it should."""
    model = tiny_model(compression="conv")
    state = {name: x for name, x in model.state_dict().items() if "self_attn" not in name}
    model.save_pretrained(tmp_path, state_dict=state)
    attention = NSAForCausalLM.from_pretrained(tmp_path).model.layers[1].self_attn
    assert_starts_right(attention, std=model.config.initializer_range, num_layers=2)


def assert_starts_right(attention, std, num_layers):
    assert not attention.gate.down.weight.any()
    assert not attention.gate.down.bias.any()
    assert not attention.compress_k.down.weight.any()
    assert (attention.compress_v.weight == 1 / 8).all()
    assert attention.q_proj.weight.std().item() == pytest.approx(std, rel=0.15)
    assert attention.o_proj.weight.std().item() == pytest.approx(std / (2 * num_layers) ** 0.5, rel=0.15)


def test_a_new_model_starts_with_equal_branches_mean_compression_and_small_residuals():
    model = NSAForCausalLM(tiny_config(compression="conv", initializer_range=0.05))
    for layer in model.model.layers:
        assert_starts_right(layer.self_attn, std=0.05, num_layers=2)
        assert layer.mlp.down_proj.weight.std().item() == pytest.approx(0.05 / 2, rel=0.15)
        assert (layer.input_layernorm.weight == 1).all()
    assert model.model.embed_tokens.weight.std().item() == pytest.approx(0.05, rel=0.15)


def test_the_same_seed_gives_the_same_weights():
    models = []
    for _ in range(2):
        torch.manual_seed(5)
        models.append(NSAForCausalLM(tiny_config(compression="mlp")).state_dict())
    assert all(torch.equal(x, models[1][name]) for name, x in models[0].items())


def test_auto_classes_know_the_model_in_a_fresh_process(tmp_path):
    tiny_model(*LAYERS).save_pretrained(tmp_path)
    code = (
        f"import sys; sys.path[:0] = {sys.path}\n"
        "import nsa.hf\n"
        "from transformers import AutoConfig, AutoModel, AutoModelForCausalLM\n"
        "folder = sys.argv[1]\n"
        "for auto in (AutoConfig, AutoModel, AutoModelForCausalLM):\n"
        "    print(type(auto.from_pretrained(folder)).__name__)\n"
        "model = AutoModelForCausalLM.from_pretrained(folder)\n"
        "print(model.generate(model.dummy_inputs['input_ids'][:1], max_new_tokens=3, do_sample=False).shape[1])\n"
    )
    run = subprocess.run([sys.executable, "-c", code, tmp_path], capture_output=True, text=True, timeout=120)
    assert run.returncode == 0, run.stderr
    assert run.stdout.split() == [NSAConfig.__name__, NSAModel.__name__, NSAForCausalLM.__name__, "8"]
