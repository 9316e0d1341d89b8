"""What the queries of one text select, and what they read against dense attention.

    selection = select_in_text(model, ids, tokenizer.decode, document="Lincoln 1863")
    selection.save(Path("selection.json"))
    print(selection.reads())

Shapes: T tokens, P positions of queries that are kept, Hkv groups, n chosen blocks.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence

import torch
from transformers import PreTrainedModel

from nsa.inspect.selection import nsa_layers, record_selection
from nsa.inspect.text_selection import TextSelection, _read_at

MAX_TOKENS = 8192  # of the text
MAX_QUERIES = 256  # that are kept, evenly spaced


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
