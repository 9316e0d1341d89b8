"""The picture of a text's selection: queries by blocks, a panel for each layer.

draw_selection(load_text_selection(Path("selection.json")), Path("selection.png"))
"""

from __future__ import annotations

from pathlib import Path

import torch
from matplotlib.axes import Axes
from matplotlib.colors import ListedColormap
from matplotlib.figure import Figure
from matplotlib.patches import Patch

from nsa.geometry import BlockGeometry
from nsa.inspect.statistics import is_forced
from nsa.inspect.text_selection import TextSelection

COLORS = {"not read": "#f3f3f3", "forced": "#9aa7b5", "chosen by one group": "#f2a541", "by several": "#d1495b"}
MAX_PANELS = 4  # layers drawn side by side, the first and the last among them


def draw_selection(selection: TextSelection, path: Path) -> None:
    """Write a PNG: a panel for each layer, a row for each query from top to bottom, a column for each block."""
    layers = _shown(list(selection.blocks))
    figure = Figure(figsize=(4.2 * len(layers) + 0.6, 5.0), layout="constrained")
    panels = figure.subplots(1, len(layers), sharey=True, squeeze=False)[0]
    for axes, layer in zip(panels, layers, strict=True):
        _draw_layer(axes, selection, layer)
    panels[0].set_ylabel("query, token of the text")
    num_groups = len(selection.blocks[layers[0]][0])
    names = list(COLORS) if num_groups > 1 else ["not read", "forced", "chosen"]
    handles = [Patch(color=color, label=name) for name, color in zip(names, COLORS.values(), strict=False)]
    figure.legend(handles=handles, loc="outside lower center", ncols=len(handles), fontsize="small", frameon=False)
    figure.savefig(path, dpi=110)


def _draw_layer(axes: Axes, selection: TextSelection, layer: int) -> None:
    length, size = selection.length, selection.geometry.select_block_size
    picture = torch.zeros(len(selection.positions), -(-length // size))
    for row, position in enumerate(selection.positions):
        for chosen in selection.blocks[layer][row]:
            for block in chosen:
                if block >= 0:
                    picture[row, block] = _color(block, position, selection.geometry, picture[row, block].item())
    axes.imshow(
        picture.numpy(),
        aspect="auto",
        interpolation="nearest",
        cmap=ListedColormap(list(COLORS.values())),
        vmin=-0.5,
        vmax=len(COLORS) - 0.5,
        extent=(0, picture.shape[1], length, 0),
    )
    axes.set_title(f"layer {layer}", fontsize="medium")
    axes.set_xlabel(f"block of {size} tokens")


def _color(block: int, position: int, geometry: BlockGeometry, before: float) -> int:
    """Index into `COLORS`: forced for all, or chosen by the first group or by a further one."""
    if is_forced(block, position, geometry):
        return 1
    return 3 if before else 2


def _shown(layers: list[int]) -> list[int]:
    """At most `MAX_PANELS` of the layers, evenly spaced."""
    if len(layers) <= MAX_PANELS:
        return layers
    return [layers[round(i * (len(layers) - 1) / (MAX_PANELS - 1))] for i in range(MAX_PANELS)]
