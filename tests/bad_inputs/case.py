"""One bad input: what is typed, in which folder, and what the message must name.

    BadInput("steps below one", "train c.yaml --train.steps 0", says=("train.steps", "0"))

Each area has a file here with a list `CASES`; `test_bad_inputs.py` runs them all in this process, by `nsa.cli.main`.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

# A config that would train in a second, so that nothing but the mistake stands in the way.
TINY = """\
run: {name: tiny, num_threads: 1, device: cpu}
model: {hidden_size: 16, intermediate_size: 32, num_hidden_layers: 1, num_attention_heads: 2, num_key_value_heads: 1,
  compress_block_size: 8, compress_stride: 4, select_block_size: 16, num_selected_blocks: 3, window_size: 16}
data: {source: synthetic, max_eval_tokens: 512}
optim: {warmup_steps: 1}
train: {steps: 2, sequence_length: 64, batch_tokens: 128, micro_batch_rows: 2}
eval: {every_steps: 2, rows: 2}
sample: {max_new_tokens: 0}
"""


def nothing_more(here: Path) -> None:
    """The folder with `c.yaml` is enough."""


@dataclass(frozen=True)
class BadInput:
    """What a user gets wrong.

    Attributes:
        name: the mistake in a few words, unlike all others of its file.
        command: the arguments of `nsa`, split at blanks; `{here}` is the folder in which it runs.
        says: each of these stands in the message: what was wrong, and the remedy.
        prepare: puts files into the folder, which holds `c.yaml` (`TINY`) already.
        code: the exit code.
    """

    name: str
    command: str
    says: tuple[str, ...]
    prepare: Callable[[Path], object] = nothing_more
    code: int = 2


def yaml(text: str) -> Callable[[Path], object]:
    """A `prepare` that replaces `c.yaml`."""
    return lambda here: (here / "c.yaml").write_text(text, encoding="utf-8")


def tiny(old: str, new: str) -> Callable[[Path], object]:
    """A `prepare` that replaces a part of `TINY`."""
    assert old in TINY, old
    return yaml(TINY.replace(old, new))
