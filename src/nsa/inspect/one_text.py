"""What the queries of one text select, and what they read against dense attention.

    selection = select_in_text(model, ids, tokenizer.decode, document="Lincoln 1863")
    selection.save(Path("selection.json"))
    print(selection.reads())

Shapes: T tokens, P positions of queries that are kept, Hkv groups, n chosen blocks.
"""

from __future__ import annotations

import json
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import torch
from transformers import PreTrainedModel

from nsa.geometry import BlockGeometry
from nsa.inspect.selection import nsa_layers, record_selection, selection_record

MAX_TOKENS = 8192  # of the text
MAX_QUERIES = 256  # that are kept, evenly spaced
NUM_READS = 4  # positions at which reads are counted: the end, its half, a quarter, an eighth


@dataclass(frozen=True)
class TextSelection:
    """The blocks that queries of one text chose.

    Attributes:
        document: what the text is called.
        texts: the text of each selection block.
        length: T, tokens of the text.
        geometry: of the blocks.
        positions: of the queries that are kept, ascending; the last token's is among them.
        blocks: chosen blocks by layer, `[P][Hkv][n]`, -1 for none.
    """

    document: str
    texts: list[str]
    length: int
    geometry: BlockGeometry
    positions: list[int]
    blocks: dict[int, list[list[list[int]]]]

    def save(self, path: Path) -> None:
        """Write it as JSON."""
        path.write_text(json.dumps(asdict(self), ensure_ascii=False), encoding="utf-8")

    def records(self, layer: int, position: int) -> list[dict[str, Any]]:
        """`selection_record` of each group of a query."""
        chosen = self.blocks[layer][self.positions.index(position)]
        return [selection_record(blocks, position, self.geometry) for blocks in chosen]

    def reads(self) -> list[dict[str, float]]:
        """Tokens that one query reads for a group, at a few positions: by branch, in all, and with dense attention.

        Means over layers and groups; a key counts once, whether its value is read, too.
        """
        rows: list[dict[str, float]] = []
        for position in _read_at(self.length):
            done = [record["reads"]["done"] for layer in self.blocks for record in self.records(layer, position)]
            means = {name: sum(reads[name] for reads in done) / len(done) for name in ("cmp", "slc", "win", "total")}
            rows.append({"position": position, **means, "dense": position + 1})
        return rows


def load_text_selection(path: Path) -> TextSelection:
    """What `save` wrote.

    Raises:
        ValueError: it is damaged.
    """
    try:
        values = json.loads(path.read_text(encoding="utf-8"))
        geometry = BlockGeometry(**values.pop("geometry"))
        blocks = {int(layer): rows for layer, rows in values.pop("blocks").items()}
        return TextSelection(geometry=geometry, blocks=blocks, **values)
    except (ValueError, KeyError, TypeError, AttributeError) as error:
        raise ValueError(f"{path} is damaged ({error}); remove it to do without it") from None


@torch.no_grad()
def select_in_text(
    model: PreTrainedModel, ids: Sequence[int], decode: Callable[[list[int]], str], document: str
) -> TextSelection:
    """Run one text through a model and note what every NSA layer selects.

    Args:
        model: with NSA layers, such as an `NSAForCausalLM`.
        ids: of the text's tokens; what comes after `MAX_TOKENS` is left out.
        decode: gives the text of tokens.
        document: what the text is called.

    Raises:
        ValueError: the model has no NSA layer.
    """
    ids = list(ids[:MAX_TOKENS])
    was_training = model.training
    model.eval()
    with record_selection(model) as recorded:
        model.base_model(torch.tensor([ids], device=model.device), use_cache=False)
    model.train(was_training)
    geometry = next(iter(nsa_layers(model).values())).geometry
    size, length = geometry.select_block_size, len(ids)
    texts = [decode(ids[start : start + size]) for start in range(0, length, size)]
    positions = sorted({*range(0, length, -(-length // MAX_QUERIES)), *_read_at(length)})
    blocks = {layer: chosen[0, positions].tolist() for layer, chosen in recorded.items()}
    return TextSelection(document, texts, length, geometry, positions, blocks)


def _read_at(length: int) -> list[int]:
    """The last position, and those at a half, a quarter and an eighth of a text."""
    return sorted({length // 2**k - 1 for k in range(NUM_READS) if length >= 2**k})
