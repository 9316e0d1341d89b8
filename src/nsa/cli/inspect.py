"""`nsa inspect MODEL --prompt TEXT`: which blocks of the prompt each query selects, as JSON lines."""

from __future__ import annotations

import json
import os
import sys
from collections.abc import Iterator, Sequence
from contextlib import nullcontext
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

import tyro

from nsa.cli import EXIT_DONE, fail
from nsa.cli.arguments import parse
from nsa.cli.model_inputs import choose_num_threads, read_prompt
from nsa.config.device_name import check_device_name

# torch and transformers are imported when the arguments are checked.
if TYPE_CHECKING:
    import torch


@dataclass(frozen=True)
class InspectArguments:
    """Run a prompt through a model and print, one JSON object a line, what its NSA layers select.

    The last lines are statistics over all queries of the prompt: one for each layer, and one for all together.
    """

    model: tyro.conf.Positional[Path]
    """A transformers model folder, or a run folder (its newest complete checkpoint)."""
    prompt: str | None = None
    """Text to run through the model."""
    prompt_file: str | None = None
    """UTF-8 file with the text, in place of --prompt; "-" is standard input."""
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
    num_threads: int | None = None
    """Threads of CPU work; the run's own number, or 1, unless given. More are slower on a busy machine."""
    trust_remote_code: bool = False
    """Run Python code that the folder brings for a model that transformers does not know."""


def main(arguments: Sequence[str]) -> int:
    """Run the command and return its exit code."""
    given = parse(InspectArguments, "inspect", arguments)
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
    _check(given)
    prompt, num_threads = (
        read_prompt(given.prompt, given.prompt_file),
        choose_num_threads(given.num_threads, given.model),
    )

    import torch

    from nsa.eval.open_model import encode_prompt, load_model
    from nsa.inspect.selection import record_selection

    torch.set_num_threads(num_threads)
    model, tokenizer = load_model(given.model, given.device, trust_remote_code=given.trust_remote_code)
    ids = encode_prompt(prompt, tokenizer, model.config.vocab_size)
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
    import torch

    from nsa.inspect.selection import selection_statistics
    from nsa.inspect.statistics import selection_record

    for layer, blocks in selections.items():
        for position in positions:
            for group, chosen in enumerate(blocks[0, position].tolist()):
                place = {"layer": layer, "group": group, "position": position}
                yield place | selection_record(chosen, position, geometry)
    for layer, blocks in selections.items():
        yield {"summary": f"layer {layer}"} | selection_statistics(blocks, geometry).as_dict()
    together = torch.cat(list(selections.values()))
    yield {"summary": "all"} | selection_statistics(together, geometry).as_dict()


def _check(given: InspectArguments) -> None:
    check_device_name(given.device)
    if not os.path.isdir(given.model):
        raise ValueError(f"there is no folder {given.model}; give a transformers model folder or a run folder")
    if given.layer is not None and given.layer < 0:
        raise ValueError(f"--layer must be at least 0, not {given.layer}")
    if given.position not in ("all", "last") and not given.position.isdecimal():
        raise ValueError(f'--position must be "last", "all" or a number from 0, not {given.position[:60]!r}')
    if given.out is not None and (given.out.is_dir() or not given.out.parent.is_dir()):
        what = "is a folder" if given.out.is_dir() else f"is in no folder: there is no {given.out.parent}"
        raise ValueError(f"--out {given.out} {what}; give the path of a file")


def _positions(wanted: str, length: int) -> Sequence[int]:
    if wanted == "all":
        return range(length)
    if wanted == "last":
        return [length - 1]
    if not wanted.isdecimal() or int(wanted) >= length:
        raise ValueError(f'--position must be "last", "all" or 0..{length - 1}, not {wanted!r}')
    return [int(wanted)]
