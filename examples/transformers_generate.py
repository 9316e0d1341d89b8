"""A model folder with transformers: make one, load it by the auto classes, generate for a padded batch.

python examples/transformers_generate.py
"""

import tempfile

import torch
from transformers import AutoModelForCausalLM, AutoTokenizer

from nsa.data import ByteTokenizer
from nsa.hf import NSAConfig, NSAForCausalLM


def make_model(folder: str) -> None:
    """A tiny untrained model and a byte tokenizer, saved as any transformers model is."""
    torch.manual_seed(0)
    config = NSAConfig(
        vocab_size=ByteTokenizer.vocab_size,
        hidden_size=64,
        intermediate_size=128,
        num_hidden_layers=3,
        num_attention_heads=4,
        num_key_value_heads=2,
        layer_types=["nsa", "full_attention", "nsa"],
        eos_token_id=ByteTokenizer.eos_id,
        pad_token_id=ByteTokenizer.pad_id,
        initializer_range=0.2,
    )
    NSAForCausalLM(config).save_pretrained(folder)
    ByteTokenizer().save(folder)


def main() -> list[str]:
    """Generate with sampling and with beams; return the sampled texts."""
    with tempfile.TemporaryDirectory() as folder:
        make_model(folder)
        model = AutoModelForCausalLM.from_pretrained(folder)
        tokenizer = AutoTokenizer.from_pretrained(folder, padding_side="left")
    prompts = ["It was the best of times, ", "Call me "]
    inputs = tokenizer(prompts, return_tensors="pt", padding=True)
    sampled = model.generate(**inputs, max_new_tokens=40, do_sample=True, top_k=20, top_p=0.9)
    beams = model.generate(**inputs, max_new_tokens=20, num_beams=4, do_sample=False)
    texts = tokenizer.batch_decode(sampled, skip_special_tokens=True)
    for prompt, text, beam in zip(prompts, texts, tokenizer.batch_decode(beams, skip_special_tokens=True), strict=True):
        print(f"{prompt!r}\n  sampled: {text[len(prompt) :]!r}\n  beams:   {beam[len(prompt) :]!r}")
    return texts


if __name__ == "__main__":
    main()
