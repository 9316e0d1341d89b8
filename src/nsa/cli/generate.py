"""`nsa generate MODEL --prompt TEXT`: continue a text, printed as it is produced."""

from __future__ import annotations

import sys
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TextIO

import torch
import tyro
from transformers.generation.streamers import BaseStreamer

from nsa.cli import EXIT_DONE, fail
from nsa.cli.models import encode_prompt, load_model
from nsa.data.tokenizers import Tokenizer


@dataclass(frozen=True)
class GenerateArguments:
    """Continue a prompt; only the continuation is printed."""

    model: tyro.conf.Positional[Path]
    """A transformers model folder, or a run folder (its newest complete checkpoint)."""
    prompt: str
    """Text to continue."""
    max_new_tokens: int = 200
    """Tokens to produce at most."""
    temperature: float = 0.8
    """Divides the logits; above 0."""
    top_k: int = 50
    """Draw among this many likeliest tokens; 0 for all."""
    top_p: float = 0.95
    """Draw among the likeliest tokens that together have this probability; above 0, at most 1."""
    seed: int = 0
    """Seed of what is drawn."""
    greedy: bool = False
    """Always take the likeliest token."""
    device: str = "auto"
    """"auto" (CUDA where there is one), "cpu", "cuda" or "cuda:N"."""
    trust_remote_code: bool = False
    """Run Python code that the folder brings for a model that transformers does not know."""


def main(arguments: Sequence[str]) -> int:
    """Run the command and return its exit code."""
    given = tyro.cli(GenerateArguments, prog="nsa generate", args=list(arguments), use_underscores=True)
    try:
        return run(given)
    except ValueError as error:
        return fail("generate", error)


def run(given: GenerateArguments, out: TextIO | None = None) -> int:
    """Load the model and print the continuation to `out`, standard output unless given.

    Raises:
        ValueError: an option is out of range, or model or prompt cannot be used.
    """
    _check(given)
    model, tokenizer = load_model(given.model, given.device, trust_remote_code=given.trust_remote_code)
    ids = encode_prompt(given.prompt, tokenizer, model.config.vocab_size)
    options = {"do_sample": False}
    if not given.greedy:
        torch.manual_seed(given.seed)
        options = {
            "do_sample": True,
            "temperature": given.temperature,
            "top_k": given.top_k,
            "top_p": given.top_p,
        }
    input_ids = torch.tensor([ids], device=model.device)
    model.generate(  # pyright: ignore[reportCallIssue]
        input_ids,
        attention_mask=torch.ones_like(input_ids),
        max_new_tokens=given.max_new_tokens,
        eos_token_id=tokenizer.eos_id,
        pad_token_id=tokenizer.eos_id,
        streamer=TextStream(tokenizer, out or sys.stdout),
        **options,
    )
    return EXIT_DONE


class TextStream(BaseStreamer):
    """Writes text as its tokens arrive, whole characters only, without the prompt.

    A character may be spread over several tokens; until its last one it decodes to U+FFFD and is held back.

    Args:
        tokenizer: decodes tokens.
        out: where the text goes; flushed after each write.
    """

    def __init__(self, tokenizer: Tokenizer, out: TextIO) -> None:
        self.tokenizer, self.out = tokenizer, out
        self.prompt_seen = False
        self.ids: list[int] = []
        # ids[context:written] are written and decoded again only as the context of what follows.
        self.context = self.written = 0

    def put(self, value: torch.Tensor) -> None:
        """Take the prompt at the first call, new tokens at the others."""
        if not self.prompt_seen:
            self.prompt_seen = True
            return
        self.ids += value.flatten().tolist()
        text = self._pending()
        if text and not text.endswith("\N{REPLACEMENT CHARACTER}"):
            self._write(text)
            self.context, self.written = self.written, len(self.ids)

    def end(self) -> None:
        """Write what was held back, and end the line."""
        self._write(self._pending() + "\n")

    def _pending(self) -> str:
        done = self.tokenizer.decode(self.ids[self.context : self.written])
        return self.tokenizer.decode(self.ids[self.context :])[len(done) :]

    def _write(self, text: str) -> None:
        self.out.write(text)
        self.out.flush()


def _check(given: GenerateArguments) -> None:
    if given.max_new_tokens < 1:
        raise ValueError(f"--max_new_tokens must be at least 1, not {given.max_new_tokens}")
    if not given.temperature > 0:
        raise ValueError(f"--temperature must be above 0, not {given.temperature}; --greedy takes the likeliest token")
    if given.top_k < 0:
        raise ValueError(f"--top_k must be at least 0, not {given.top_k}")
    if not 0 < given.top_p <= 1:
        raise ValueError(f"--top_p must be above 0 and at most 1, not {given.top_p}")
    if given.seed < 0:
        raise ValueError(f"--seed must be at least 0, not {given.seed}")
