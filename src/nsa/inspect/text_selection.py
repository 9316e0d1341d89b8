"""Which blocks the queries of one text chose, as it is stored in a run folder. Nothing here needs torch.

selection = load_text_selection(Path("selection.json"))
print(selection.reads())
"""

from __future__ import annotations

import json
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from nsa.geometry import BRANCHES, BlockGeometry
from nsa.inspect.statistics import selection_record

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
            means = {name: sum(reads[name] for reads in done) / len(done) for name in (*BRANCHES, "total")}
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


def _read_at(length: int) -> list[int]:
    """The last position, and those at a half, a quarter and an eighth of a text."""
    return sorted({length // 2**k - 1 for k in range(NUM_READS) if length >= 2**k})
