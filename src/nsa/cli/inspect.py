"""`nsa inspect MODEL --prompt TEXT`: which blocks of the prompt each query selects, as JSON lines."""

from __future__ import annotations

import json
import sys
from collections.abc import Iterator, Sequence
from contextlib import nullcontext
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
import tyro

from nsa.cli import EXIT_DONE, fail
from nsa.cli.models import encode_prompt, load_model
from nsa.inspect import record_selection, selection_record, selection_statistics


@dataclass(frozen=True)
class InspectArguments:
    """Run a prompt through a model and print, one JSON object a line, what its NSA layers select.

    The last lines are statistics over all queries of the prompt: one for each layer, and one for all together.
    """

    model: tyro.conf.Positional[Path]
    """A transformers model folder, or a run folder (its newest complete checkpoint)."""
    prompt: str
    """Text to run through the model."""
    ranges: bool = False
    """Print a line for each layer, group and query: its blocks, their token ranges [start, end), and its reads."""
    layer: int | None = None
    """Only this decoder layer, counted from 0; all NSA layers unless given."""
    position: str = "last"
    """Queries for --ranges: "last", "all", or a position counted from 0."""
    out: Path | None = None
    """File to write instead of standard output."""
    device: str = "auto"
    """"auto" (CUDA where there is one), "cpu", "cuda" or "cuda:N"."""
    trust_remote_code: bool = False
    """Run Python code that the folder brings for a model that transformers does not know."""


def main(arguments: Sequence[str]) -> int:
    """Run the command and return its exit code."""
    given = tyro.cli(InspectArguments, prog="nsa inspect", args=list(arguments), use_underscores=True)
    try:
        return run(given)
    except (ValueError, OSError) as error:
        return fail("inspect", error)


def run(given: InspectArguments) -> int:
    """Load the model, run the prompt and write the lines.

    Raises:
        ValueError: an option is out of range, or model or prompt cannot be used.
        OSError: the output file cannot be written.
    """
    model, tokenizer = load_model(given.model, given.device, trust_remote_code=given.trust_remote_code)
    ids = encode_prompt(given.prompt, tokenizer, model.config.vocab_size)
    positions = _positions(given.position, len(ids)) if given.ranges else []
    with torch.no_grad(), record_selection(model) as selections:
        model(torch.tensor([ids], device=model.device), use_cache=False)
    if given.layer is not None:
        if given.layer not in selections:
            held = ", ".join(map(str, selections))
            raise ValueError(f"--layer {given.layer} is no NSA layer of the model; choose one of {held}")
        selections = {given.layer: selections[given.layer]}
    with open(given.out, "w", encoding="utf-8") if given.out else nullcontext(sys.stdout) as out:
        for line in _lines(selections, positions, model.config.geometry):
            out.write(json.dumps(line) + "\n")
    return EXIT_DONE


def _lines(selections: dict[int, torch.Tensor], positions: Sequence[int], geometry: Any) -> Iterator[dict[str, Any]]:
    for layer, blocks in selections.items():
        for position in positions:
            for group, chosen in enumerate(blocks[0, position].tolist()):
                place = {"layer": layer, "group": group, "position": position}
                yield place | selection_record(chosen, position, geometry)
    for layer, blocks in selections.items():
        yield {"summary": f"layer {layer}"} | selection_statistics(blocks, geometry).as_dict()
    together = torch.cat(list(selections.values()))
    yield {"summary": "all"} | selection_statistics(together, geometry).as_dict()


def _positions(wanted: str, length: int) -> Sequence[int]:
    if wanted == "all":
        return range(length)
    if wanted == "last":
        return [length - 1]
    if not wanted.isdecimal() or int(wanted) >= length:
        raise ValueError(f'--position must be "last", "all" or 0..{length - 1}, not {wanted!r}')
    return [int(wanted)]
