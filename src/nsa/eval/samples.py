"""Text that a model continues from given prompts, always with the same random numbers.

samples = draw_samples(model, tokenizer, ["The state of "], SampleOptions(max_new_tokens=100), seed=0)
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, Protocol

import torch

from nsa.terminal import printable


class TextTokenizer(Protocol):
    """What sampling needs of a tokenizer of `nsa.data`."""

    @property
    def eos_id(self) -> int: ...
    def encode(self, text: str) -> list[int]: ...
    def decode(self, ids: list[int]) -> str: ...


@dataclass(frozen=True)
class SampleOptions:
    """How to draw: new tokens for each prompt, temperature, and the limits top-k (0 for none) and top-p."""

    max_new_tokens: int
    temperature: float = 1.0
    top_k: int = 0
    top_p: float = 1.0


@dataclass(frozen=True)
class Sample:
    """A prompt and how the model went on."""

    prompt: str
    continuation: str


def draw_samples(
    model: Any, tokenizer: TextTokenizer, prompts: Sequence[str], options: SampleOptions, *, seed: int
) -> list[Sample]:
    """Continue each prompt by `model.generate`; the state of the random number generators is left as it was.

    Raises:
        ValueError: a prompt has no tokens.
    """
    was_training = model.training
    model.eval()
    samples = []
    with torch.random.fork_rng([model.device] if model.device.type == "cuda" else []):
        torch.manual_seed(seed)
        for prompt in prompts:
            ids = tokenizer.encode(prompt)
            if not ids:
                raise ValueError(f"the prompt {prompt!r} has no tokens; give at least one character")
            input_ids = torch.tensor([ids], device=model.device)
            output = model.generate(
                input_ids,
                attention_mask=torch.ones_like(input_ids),
                do_sample=True,
                max_new_tokens=options.max_new_tokens,
                temperature=options.temperature,
                top_k=options.top_k,
                top_p=options.top_p,
                eos_token_id=tokenizer.eos_id,
                pad_token_id=tokenizer.eos_id,
            )
            new = [token for token in output[0, len(ids) :].tolist() if token != tokenizer.eos_id]
            samples.append(Sample(prompt, tokenizer.decode(new)))
    model.train(was_training)
    return samples


def format_samples(samples: Sequence[Sample], title: str) -> str:
    """Samples as text: the title, then each prompt and its continuation; what a terminal would obey is shown."""
    blocks = [f"[prompt] {sample.prompt}\n[model]  {sample.continuation}" for sample in samples]
    return printable("\n\n".join([title, *blocks]) + "\n")
