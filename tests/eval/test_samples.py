"""Samples: repeatable, from the prompt on, and without a trace in the random state."""

from __future__ import annotations

import pytest
import torch

from nsa.data import ByteTokenizer
from nsa.eval.samples import Sample, SampleOptions, draw_samples, format_samples
from nsa.hf import NSAConfig, NSAForCausalLM
from tiny_models import SIZES

OPTIONS = SampleOptions(max_new_tokens=12, temperature=0.9, top_k=20, top_p=0.9)


@pytest.fixture(scope="module")
def model() -> NSAForCausalLM:
    torch.manual_seed(0)
    return NSAForCausalLM(NSAConfig(**{**SIZES, "vocab_size": ByteTokenizer.vocab_size, "num_hidden_layers": 1}))


def test_one_seed_gives_one_text_and_leaves_the_random_state_alone(model: NSAForCausalLM) -> None:
    model.train()
    before = torch.get_rng_state()
    first = draw_samples(model, ByteTokenizer(), ["the ", "we"], OPTIONS, seed=3)
    assert torch.equal(torch.get_rng_state(), before)
    assert model.training
    assert draw_samples(model, ByteTokenizer(), ["the ", "we"], OPTIONS, seed=3) == first
    assert draw_samples(model, ByteTokenizer(), ["the ", "we"], OPTIONS, seed=4) != first
    assert [sample.prompt for sample in first] == ["the ", "we"]


def test_a_prompt_without_tokens_is_refused(model: NSAForCausalLM) -> None:
    with pytest.raises(ValueError, match="the prompt '' has no tokens"):
        draw_samples(model, ByteTokenizer(), [""], OPTIONS, seed=0)


def test_the_options_reach_the_model(model: NSAForCausalLM) -> None:
    """With one candidate token a sample is the greedy text, whatever the seed."""
    options = SampleOptions(max_new_tokens=5, top_k=1)
    first, second = (draw_samples(model, ByteTokenizer(), ["the "], options, seed=seed) for seed in (0, 1))
    ids = torch.tensor([ByteTokenizer().encode("the ")])
    greedy = model.eval().generate(ids, do_sample=False, max_new_tokens=5, eos_token_id=257, pad_token_id=257)
    assert first == second
    assert first[0].continuation == ByteTokenizer().decode(greedy[0, 4:].tolist())


def test_the_text_shows_title_prompt_and_continuation_and_nothing_that_a_terminal_obeys() -> None:
    text = format_samples([Sample("the ", "end\x1b[2J\r\n")], "before training")
    assert text == "before training\n\n[prompt] the \n[model]  end\\x1b[2J\\r\n\n"
