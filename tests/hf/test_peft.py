"""Adapters, soft prompts and prefixes: through the package peft, and by hand on a frozen model."""

import pytest
import torch
from transformers import DynamicCache

from nsa.hf import register_with_peft
from nsa.hf.cache_nsa import CACHE_NAME
from tiny_models import left_padded, tiny_model

peft = pytest.importorskip("peft")

LAYERS = ("nsa", "full_attention", "sliding_attention")
IDS = torch.arange(80).reshape(2, 40) * 7 % 61
GENERATE = {"max_new_tokens": 4, "do_sample": False, "pad_token_id": 0}
CONFIGS = {
    "prompt tuning": lambda: peft.PromptTuningConfig(num_virtual_tokens=5),
    "p-tuning": lambda: peft.PromptEncoderConfig(num_virtual_tokens=5, encoder_hidden_size=16),
    "prefix tuning": lambda: peft.PrefixTuningConfig(num_virtual_tokens=9),
    "lora": lambda: peft.LoraConfig(),
    "lora everywhere": lambda: peft.LoraConfig(target_modules="all-linear"),
    "ia3": lambda: peft.IA3Config(),
}
BEFORE_THE_ROWS = {"prompt tuning", "p-tuning", "prefix tuning"}


@pytest.mark.filterwarnings("ignore:Position ids are not supported")
@pytest.mark.parametrize("kind", CONFIGS)
def test_peft_trains_generates_saves_and_loads(kind, tmp_path):
    register_with_peft()
    config = CONFIGS[kind]()
    config.task_type = "CAUSAL_LM"
    torch.manual_seed(0)
    model = peft.get_peft_model(tiny_model(*LAYERS).float(), config)
    optimizer = torch.optim.Adam([p for p in model.parameters() if p.requires_grad], lr=0.03)
    losses = []
    for _ in range(6):
        loss = model(IDS, labels=IDS, attention_mask=torch.ones_like(IDS)).loss
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        losses.append(loss.item())
    assert losses[-1] < losses[0]
    if kind in BEFORE_THE_ROWS and CACHE_NAME == "cache":
        pytest.skip("PEFT 0.21 looks for the cache by the name that it had before transformers 5.24 when it generates")
    model.eval().save_pretrained(tmp_path)
    loaded = peft.PeftModel.from_pretrained(tiny_model(*LAYERS).float(), tmp_path).eval()
    texts = [x.generate(input_ids=IDS, attention_mask=torch.ones_like(IDS), **GENERATE) for x in (model, loaded)]
    assert torch.equal(*texts)
    with torch.no_grad():
        full = model(texts[0], use_cache=False).logits[:, -5:-1].argmax(-1)
    assert torch.equal(full, texts[0][:, -4:])


def prefix(length, rows, seed=0):
    torch.manual_seed(seed)
    shape = (rows, 2, length, 8)
    pairs = [tuple(torch.randn(2, *shape, dtype=torch.float64).requires_grad_()) for _ in LAYERS]
    return pairs, DynamicCache([(k, v) for k, v in pairs])


def test_rows_behind_a_prefix_are_those_of_each_row_alone():
    model = tiny_model(*LAYERS, compression="mlp", compress_rope="after")
    rows = [IDS[0], IDS[1, :13]]
    ids, mask = left_padded(rows)
    with torch.no_grad():
        pairs, cache = prefix(11, 2)
        both = model(ids, attention_mask=torch.cat([torch.ones(2, 11), mask], 1), past_key_values=cache)
        assert both.past_key_values is cache
        assert cache.get_seq_length() == 11 + 40
        for i, row in enumerate(rows):
            cut = DynamicCache([(k[i : i + 1], v[i : i + 1]) for k, v in pairs])
            alone = model(row[None], past_key_values=cut, use_cache=False)
            torch.testing.assert_close(both.logits[i, -len(row) :], alone.logits[0])


def test_every_part_of_a_prefix_gets_gradients_also_from_a_frozen_model():
    model = tiny_model(*LAYERS).requires_grad_(False)
    pairs, cache = prefix(9, 2)
    out = model(IDS, past_key_values=cache, labels=IDS)
    assert out.past_key_values is None
    grads = torch.autograd.grad(out.loss, [x for pair in pairs for x in pair])
    assert all(grad.flatten(2).abs().sum(-1).all() for grad in grads)


def test_a_prefix_of_another_model_is_refused():
    cache = DynamicCache([(torch.randn(1, 3, 5, 8), torch.randn(1, 3, 5, 8)) for _ in LAYERS])
    with pytest.raises(
        ValueError, match=r"keys of layer 0 of the cache are \[1, 3, 5, 8\]; a prefix .* \[B, 2, P, 8\]"
    ):
        tiny_model(*LAYERS)(IDS[:1], past_key_values=cache)


@pytest.mark.parametrize("layer_type", LAYERS)
def test_the_inputs_of_a_frozen_model_get_gradients(layer_type):
    model = tiny_model(layer_type).requires_grad_(False)
    soft = torch.randn(2, 5, 32, dtype=torch.float64, requires_grad=True)
    x = torch.cat([soft, model.get_input_embeddings()(IDS)], dim=1)
    out = model(inputs_embeds=x, labels=torch.cat([torch.full((2, 5), -100), IDS], dim=1))
    assert out.past_key_values is None
    out.loss.backward()
    assert soft.grad.abs().sum(-1).all()
