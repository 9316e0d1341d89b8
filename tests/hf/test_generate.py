"""`generate()`: greedy, beams and sampling, with the cache that it builds by itself."""

import pytest
import torch
from transformers import DynamicCache

from nsa.hf import NSACacheLayer
from nsa.hf.cache_nsa import CACHE_NAME
from tiny_models import left_padded, tiny_model

LAYERS = [("nsa", "nsa"), ("full_attention", "nsa", "sliding_attention")]
PROMPTS = [torch.arange(40) % 61, torch.arange(9) + 3, torch.arange(23) * 5 % 61]


@pytest.fixture(params=LAYERS, ids="-".join)
def model(request):
    return tiny_model(*request.param)


def argmax_loop(model, prompt, steps):
    """Greedy decoding from first principles: the whole text through the model for each token."""
    ids = prompt[None]
    with torch.no_grad():
        for _ in range(steps):
            ids = torch.cat([ids, model(ids, use_cache=False).logits[:, -1:].argmax(-1)], dim=1)
    return ids[0]


@pytest.mark.parametrize("chunk_size", [None, 7])
def test_greedy_generation_of_a_padded_batch_equals_an_argmax_loop(model, chunk_size):
    ids, mask = left_padded(PROMPTS)
    out = model.generate(
        ids, attention_mask=mask, max_new_tokens=25, do_sample=False, pad_token_id=0, prefill_chunk_size=chunk_size
    )
    for row, prompt in zip(out, PROMPTS, strict=True):
        assert torch.equal(row[40 - len(prompt) :], argmax_loop(model, prompt, 25))


@pytest.mark.parametrize(
    ("mask", "message"),
    [
        ([[1, 1, 1, 1], [1, 1, 0, 0]], "row 1 is padded on the right, .*; pad on the left"),
        ([[0, 0, 0, 0], [1, 1, 1, 1]], "row 0 has no token: an empty prompt"),
    ],
)
def test_prompts_without_a_last_token_are_refused(mask, message):
    mask = torch.tensor(mask, dtype=torch.long)
    with pytest.raises(ValueError, match=message):
        tiny_model().generate(torch.ones_like(mask), attention_mask=mask, max_new_tokens=1, pad_token_id=0)


def test_beams_are_the_same_with_and_without_a_cache(model):
    ids, mask = left_padded(PROMPTS)
    options = {"max_new_tokens": 12, "num_beams": 4, "num_return_sequences": 2, "do_sample": False, "pad_token_id": 0}
    cached, plain = (
        model.generate(
            ids,
            attention_mask=mask,
            use_cache=use_cache,
            return_dict_in_generate=True,
            output_scores=True,
            **options,
        )
        for use_cache in (True, False)
    )
    assert torch.equal(cached.sequences, plain.sequences)
    assert torch.allclose(cached.sequences_scores, plain.sequences_scores, atol=1e-5)


def test_a_seed_repeats_a_sample_and_another_seed_changes_it(model):
    def sample(seed, **options):
        torch.manual_seed(seed)
        return model.generate(PROMPTS[0][None], max_new_tokens=20, do_sample=True, temperature=2.0, **options)

    for options in ({"top_k": 20}, {"top_k": 0, "top_p": 0.9}):
        assert torch.equal(sample(3, **options), sample(3, **options))
        assert not torch.equal(sample(3, **options), sample(4, **options))
    assert torch.equal(sample(3, top_k=1)[0], argmax_loop(model, PROMPTS[0], 20))


def test_generation_goes_on_from_the_cache_of_an_earlier_call(model):
    first = model.generate(PROMPTS[0][None], max_new_tokens=10, do_sample=False, return_dict_in_generate=True)
    more = model.generate(first.sequences, past_key_values=first.past_key_values, max_new_tokens=10, do_sample=False)
    assert torch.equal(more[0], argmax_loop(model, PROMPTS[0], 20))


def test_generation_from_embeddings_equals_generation_from_tokens(model):
    embeddings = model.get_input_embeddings()(PROMPTS[0][None])
    new = model.generate(inputs_embeds=embeddings, max_new_tokens=10, do_sample=False)
    assert torch.equal(new[0], argmax_loop(model, PROMPTS[0], 10)[40:])


@pytest.mark.parametrize("lazy", [True, False])
def test_a_cache_made_by_transformers_is_taken_over(model, lazy):
    cache = DynamicCache() if lazy else DynamicCache(config=model.config)
    with torch.no_grad():
        model(PROMPTS[0][None], past_key_values=cache)
    assert all(isinstance(layer, NSACacheLayer) for layer in cache.layers)
    assert cache.get_seq_length() == 40


def test_rows_of_a_cache_can_be_chosen_repeated_and_forgotten(model):
    ids, mask = left_padded(PROMPTS)
    following = torch.tensor([[5], [6]])
    with torch.no_grad():
        cache = model(ids, attention_mask=mask, use_cache=True).past_key_values
        cache.batch_repeat_interleave(2)
        cache.batch_select_indices(torch.tensor([4, 1]))  # copies of rows 2 and 0
        chosen = torch.cat([mask[[2, 0]], torch.ones(2, 1, dtype=torch.long)], dim=1)
        logits = model(following, attention_mask=chosen, past_key_values=cache).logits[:, -1]
        for row, prompt, token in zip(logits, (PROMPTS[2], PROMPTS[0]), following, strict=True):
            assert torch.allclose(row, model(torch.cat([prompt, token])[None]).logits[0, -1], atol=1e-10)
        cache.reset()
        assert cache.get_seq_length() == 0
        again = model(PROMPTS[1][None], past_key_values=cache).logits
        assert torch.allclose(again, model(PROMPTS[1][None]).logits, atol=1e-10)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"cache_implementation": "static"}, "no static cache"),
        ({"cache_implementation": "offloaded"}, "DynamicCache with offloading"),
        # transformers refuses this itself since 5.24.
        ({"prompt_lookup_num_tokens": 2}, "cannot give tokens back|requires a cache that can be cropped"),
    ],
)
def test_caches_that_cannot_be_are_refused_with_the_remedy(options, message, monkeypatch):
    # transformers makes one for offloading, which torch built for CUDA cannot where there is no driver.
    monkeypatch.setattr(torch, "Stream", object)
    with pytest.raises(ValueError, match=message):
        tiny_model().generate(PROMPTS[0][None], max_new_tokens=4, do_sample=False, **options)


def test_a_cache_of_other_rows_or_another_model_is_refused(model):
    with torch.no_grad():
        cache = model(PROMPTS[0][None]).past_key_values
        with pytest.raises(ValueError, match="the cache holds 1 rows but the input has 2"):
            model(torch.zeros(2, 1, dtype=torch.long), past_key_values=cache)
        with pytest.raises(ValueError, match=r"the cache has \d layers but the model 1"):
            tiny_model("nsa")(torch.zeros(1, 1, dtype=torch.long), past_key_values=cache)
        foreign = DynamicCache(config=model.config)
        foreign.layers[0] = DynamicCache().layer_class_to_replicate()
        foreign.layers[0].update(torch.zeros(1, 2, 4, 8), torch.zeros(1, 2, 4, 8))
        with pytest.raises(ValueError, match="layer 0 of the cache was filled by another model"):
            model(torch.zeros(1, 1, dtype=torch.long), past_key_values=foreign)


def test_decoding_in_bf16_is_as_exact_as_a_whole_pass_in_bf16(model):
    ids = PROMPTS[0][None]
    with torch.no_grad():
        exact = model(ids, use_cache=False).logits[:, 20:]
        model = model.bfloat16()
        whole = model(ids, use_cache=False).logits[:, 20:]
        cache = model(ids[:, :20], use_cache=True).past_key_values
        steps = [model(ids[:, i : i + 1], past_key_values=cache).logits for i in range(20, 40)]
    decoded = torch.cat(steps, dim=1)
    assert decoded.dtype == torch.bfloat16
    assert (decoded - exact).norm() < 2 * (whole - exact).norm()


@torch.no_grad()
def test_the_cache_goes_by_the_name_that_transformers_gave_it_later_too(model):
    whole = model(PROMPTS[0][None], use_cache=False).logits
    cache = model(PROMPTS[0][None, :20], use_cache=True)[CACHE_NAME]
    assert torch.allclose(model(PROMPTS[0][None, 20:], cache=cache).logits, whole[:, 20:], atol=1e-10)
