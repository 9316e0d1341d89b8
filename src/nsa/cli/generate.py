"""`nsa generate MODEL --prompt TEXT`: continue a text, printed as it is produced.

What a terminal would obey, such as escape sequences, is shown as `\\x1b` and never sent.
"""

from __future__ import annotations

import os
import sys
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, TextIO

import tyro

from nsa.cli import EXIT_DONE, fail
from nsa.cli.arguments import parse
from nsa.cli.model_inputs import choose_num_threads, read_prompt
from nsa.config.device_name import check_device_name
from nsa.terminal import printable

# torch and transformers are imported when the arguments are checked.
if TYPE_CHECKING:
    import torch

    from nsa.data.tokenizers import Tokenizer


@dataclass(frozen=True)
class GenerateArguments:
    """Continue a prompt; only the continuation is printed."""

    model: tyro.conf.Positional[Path]
    """A transformers model folder, or a run folder (its newest complete checkpoint)."""
    prompt: str | None = None
    """Text to continue."""
    prompt_file: str | None = None
    """UTF-8 file with the text to continue, in place of --prompt; "-" is standard input."""
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
    num_threads: int | None = None
    """Threads of CPU work; the run's own number, or 1, unless given. More are slower on a busy machine."""
    trust_remote_code: bool = False
    """Run Python code that the folder brings for a model that transformers does not know."""


def main(arguments: Sequence[str]) -> int:
    """Run the command and return its exit code."""
    given = parse(GenerateArguments, "generate", arguments)
    try:
        return run(given)
    except (ValueError, OSError) as error:
        return fail("generate", error)


def run(given: GenerateArguments, out: TextIO | None = None) -> int:
    """Load the model and print the continuation to `out`, standard output unless given.

    Raises:
        ValueError: an option is out of range, or model or prompt cannot be used.
    """
    _check(given)
    prompt, num_threads = (
        read_prompt(given.prompt, given.prompt_file),
        choose_num_threads(given.num_threads, given.model),
    )

    import torch

    from nsa.eval.open_model import encode_prompt, load_model

    torch.set_num_threads(num_threads)
    model, tokenizer = load_model(given.model, given.device, trust_remote_code=given.trust_remote_code)
    ids = encode_prompt(prompt, tokenizer, model.config.vocab_size)
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
        streamer=TextStream(tokenizer, out or sys.stdout),  # pyright: ignore[reportArgumentType]
        **options,
    )
    return EXIT_DONE


class TextStream:
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
        self.out.write(printable(text))
        self.out.flush()


def _check(given: GenerateArguments) -> None:
    check_device_name(given.device)
    if not os.path.isdir(given.model):
        raise ValueError(f"there is no folder {given.model}; give a transformers model folder or a run folder")
    if not 1 <= given.max_new_tokens <= 2**31:
        raise ValueError(f"--max_new_tokens must be from 1 to {2**31}, not {given.max_new_tokens}")
    if not given.temperature > 0:
        raise ValueError(f"--temperature must be above 0, not {given.temperature}; --greedy takes the likeliest token")
    if not 0 <= given.top_k <= 2**31:
        raise ValueError(f"--top_k must be from 0 to {2**31}, not {given.top_k}")
    if not 0 < given.top_p <= 1:
        raise ValueError(f"--top_p must be above 0 and at most 1, not {given.top_p}")
    if not 0 <= given.seed < 2**63:
        raise ValueError(f"--seed must be from 0 to 2**63 - 1, not {given.seed}")
