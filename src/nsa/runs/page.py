"""`report.html` of a run: one page to look at, which needs nothing but itself.

    write_page(RunFolder(Path("runs/showcase")), beside=RunFolder(Path("runs/showcase_dense")))

It is made of the files of the run folder alone, so that it can be written again at any time. Texts are escaped,
pictures are inside the file, nothing is loaded from elsewhere.
"""

from __future__ import annotations

import base64
import io
import re
from collections.abc import Mapping, Sequence
from html import escape
from pathlib import Path
from typing import Any

from matplotlib.figure import Figure

from nsa.config.load import load_config
from nsa.config.run import RunConfig
from nsa.inspect.text_selection import TextSelection, load_text_selection
from nsa.runs.curves import held_out, running_mean
from nsa.runs.folder import RunFolder, read_json, write_text
from nsa.runs.tables import HEALTH_COLUMNS, TRAINING_COLUMNS, VALIDATION_COLUMNS, column, read_csv
from nsa.units import duration

STYLE = """
:root { color-scheme: light dark; --ink: #1d2430; --faint: #5d6878; --back: #fbfbf9; --card: #fff; --line: #dfe2e6;
  --chosen: #ffe0ad; --forced: #e3e7ec; --mark: #0b6e99 }
@media (prefers-color-scheme: dark) { :root { --ink: #e6e8eb; --faint: #9aa5b3; --back: #15181d; --card: #1d2128;
  --line: #343a44; --chosen: #6b4a12; --forced: #333a44; --mark: #6cc3e8 } }
body { font: 16px/1.55 system-ui, sans-serif; color: var(--ink); background: var(--back); margin: 0 auto;
  max-width: 60rem; padding: 2rem 1.2rem 4rem }
h1 { font-size: 1.7rem; margin: 0 } h2 { font-size: 1.2rem; margin: 2.6rem 0 .6rem }
p { margin: .5rem 0 } .faint { color: var(--faint) }
.tiles { display: grid; grid-template-columns: repeat(auto-fit, minmax(9rem, 1fr)); gap: .7rem; margin: 1.4rem 0 }
.tile { background: var(--card); border: 1px solid var(--line); border-radius: .5rem; padding: .6rem .8rem }
.tile b { display: block; font-size: 1.35rem } .tile span { color: var(--faint); font-size: .85rem }
table { border-collapse: collapse; font-size: .92rem; display: block; overflow-x: auto }
td, th { padding: .25rem .8rem .25rem 0; border-bottom: 1px solid var(--line); text-align: left; vertical-align: top }
td.n, th.n { text-align: right; font-variant-numeric: tabular-nums }
img { max-width: 100%; background: #fff; border-radius: .5rem; border: 1px solid var(--line) }
pre { background: var(--card); border: 1px solid var(--line); border-radius: .5rem; padding: .8rem; overflow-x: auto;
  white-space: pre-wrap; overflow-wrap: anywhere; font-size: .85rem }
.text { max-height: 26rem; overflow-y: auto } .c { background: var(--chosen) } .f { background: var(--forced) }
.bad { border-left: .25rem solid #d1495b; padding-left: .7rem }
"""
HEAD = (
    '<!doctype html>\n<html lang="en"><head><meta charset="utf-8">'
    '<meta http-equiv="Content-Security-Policy" content="default-src \'none\'; img-src data:; '
    "style-src 'unsafe-inline'\">"
    '<meta name="viewport" content="width=device-width, initial-scale=1">'
)
NUMBERS = ("step", "tokens", "num_parameters", "val_loss", "val_bits_per_byte", "wall_s")
"""What the page needs of `metrics.json`."""
SAME = ("run.seed", "data", "optim", "train.steps", "train.batch_tokens", "train.sequence_length")
"""What two runs must have in common for their losses to be compared."""


def write_page(folder: RunFolder, beside: RunFolder | None = None) -> None:
    """Write `report.html`.

    Args:
        folder: of a run that has ended.
        beside: of another one, whose losses are put beside this one's.

    Raises:
        ValueError: a run has not ended, or a file of a folder is damaged.
    """
    config, metrics = load_config(folder.config_yaml), _metrics(folder)
    parts = [
        _top(folder, config, metrics),
        _losses(folder),
        "" if beside is None else _beside(folder, config, metrics, beside),
        _selection(folder),
        _health(folder, metrics),
        _samples(folder),
        _next(folder, metrics),
        _details(folder),
    ]
    title = f"<title>{_text(config.run.name)}</title><style>{STYLE}</style></head>"
    write_text(folder.report_html, f"{HEAD}{title}\n<body>\n" + "\n".join(filter(None, parts)) + "\n</body></html>\n")


def _metrics(folder: RunFolder) -> dict[str, Any]:
    metrics = read_json(folder.metrics_json)
    if metrics is None:
        raise ValueError(
            f"{folder.metrics_json} is missing or damaged: a run writes it when it ends; "
            f"wait for that, or `nsa resume {folder.path}`"
        )
    if lacking := [name for name in NUMBERS if not isinstance(metrics.get(name), int | float)]:
        raise ValueError(
            f"{folder.metrics_json} is damaged: it has no number {', '.join(lacking)}; `nsa resume {folder.path}` "
            f"writes it anew when the run ends"
        )
    return metrics


def _top(folder: RunFolder, config: RunConfig, metrics: dict[str, Any]) -> str:
    index = read_json(folder.data_index_json) or {}
    stopped = metrics.get("stopped_by")
    ended = f"stopped by {stopped} after step {metrics['step']:,} of {config.train.steps:,}" if stopped else "finished"
    layers = ", ".join(config.model.layer_types)
    facts = (
        f"{ended} · {config.model.num_hidden_layers} layers of {layers} · rows of {config.train.sequence_length:,} "
        f"tokens · {index.get('description', config.data.source)}"
    )
    rate = metrics.get("tokens_per_s")
    tiles = {
        "held-out bits per byte": f"{metrics['val_bits_per_byte']:.4f}",
        "held-out loss, nats per token": f"{metrics['val_loss']:.4f}",
        "parameters": f"{metrics['num_parameters']:,}",
        "tokens": f"{metrics['tokens']:,}",
        "tokens per second": f"{rate:,.0f}" if rate else "none",
        "minutes, all in all": duration(metrics["wall_s"]),
    }
    shown = "".join(f'<div class="tile"><b>{_text(v)}</b><span>{_text(k)}</span></div>' for k, v in tiles.items())
    fitted = f'<p class="faint">{_text(config.train.fitted)}.</p>' if config.train.fitted else ""
    return (
        f'<h1>{_text(config.run.name)}</h1><p class="faint">{_text(facts)}</p><div class="tiles">{shown}</div>{fitted}'
    )


def _losses(folder: RunFolder) -> str:
    return f"<h2>Learning</h2>{_image(folder.curves_png, 'loss, learning rate and gates over the steps')}"


def _beside(folder: RunFolder, config: RunConfig, metrics: dict[str, Any], beside: RunFolder) -> str:
    """Both runs' results and held-out losses, with what else differs between them."""
    other_config, other = load_config(beside.config_yaml), _metrics(beside)
    rows = [
        [
            run.path.name,
            ", ".join(of.model.layer_types),
            *(f"{values[name]:,}" for name in ("num_parameters", "step", "tokens")),
            f"{values['val_loss']:.4f}",
            f"{values['val_bits_per_byte']:.4f}",
            f"{values['val_loss'] / metrics['val_loss'] - 1:+.2%}",
        ]
        for run, of, values in ((folder, config, metrics), (beside, other_config, other))
    ]
    names = ["run", "attention", "parameters", "steps", "tokens", "held-out loss", "bits per byte", "difference"]
    differs = [name for name in SAME if _value(config, name) != _value(other_config, name)]
    if metrics["step"] != other["step"]:
        differs.append("the steps done")
    same = (
        f'<p class="bad">Not a fair comparison: they differ in {_text(", ".join(differs))}.</p>'
        if differs
        else "<p>The same data in the same order, steps, schedule and seed.</p>"
    )
    picture = _png(_draw_beside([folder, beside]), "held-out losses of both runs")
    return f"<h2>Beside {_text(beside.path.name)}</h2>{same}{_table(names, rows, numbers=range(2, 8))}{picture}"


def _draw_beside(folders: Sequence[RunFolder]) -> Figure:
    figure = Figure(figsize=(9, 4), layout="constrained")
    axes = figure.subplots()
    for index, folder in enumerate(folders):
        training = read_csv(folder.training_csv, TRAINING_COLUMNS)
        smooth = running_mean(column(training, "loss"))
        axes.plot(column(training, "step"), smooth, color=f"C{index}", alpha=0.4, linewidth=1)
        points = held_out(read_csv(folder.val_csv, VALIDATION_COLUMNS))
        axes.plot(*points, color=f"C{index}", marker="o", label=f"{folder.path.name}, held-out")
    axes.set_xlabel("optimizer step")
    axes.set_ylabel("loss, nats per token (thin: training)")
    axes.grid(alpha=0.3)
    axes.legend()
    return figure


def _selection(folder: RunFolder) -> str:
    """What one held-out text selects: the picture, the text as its last query sees it, and the reads."""
    if not folder.selection_json.is_file():
        return ""
    selection = load_text_selection(folder.selection_json)
    geometry = selection.geometry
    branches = ("cmp", "slc", "win", "total", "dense")
    reads = [
        [f"{row['position'] + 1:,}", *(f"{row[k]:,.0f}" for k in branches), f"{row['dense'] / row['total']:.1f}"]
        for row in selection.reads()
    ]
    names = ["context, tokens", "compressed", "selected", "window", "NSA in all", "dense", "dense / NSA"]
    layer = max(selection.blocks)
    return (
        "<h2>What it selects</h2>"
        f"<p>A held-out text of {selection.length:,} tokens ({_text(selection.document)}). Each query reads "
        f"{geometry.num_selected_blocks} blocks of {geometry.select_block_size} tokens in full; "
        f"{geometry.num_init_blocks} at the start and {geometry.num_local_blocks} up to its own are forced, the others "
        "are chosen by their scores. Near the diagonal all is read; away from it only what was chosen.</p>"
        f"{_image(folder.selection_png, 'queries by blocks, for each layer')}"
        f"<p>The same text as the last token sees it in layer {layer}: "
        '<span class="c">chosen</span>, <span class="f">forced</span>, and the rest through compressed tokens only.</p>'
        f'<pre class="text">{_marked(selection, layer)}</pre>'
        "<h2>What a query reads</h2><p>Keys that one query of one group reads, means over layers and groups.</p>"
        + _table(names, reads, numbers=range(7))
    )


def _marked(selection: TextSelection, layer: int) -> str:
    """The text with the blocks of the last query marked."""
    records = selection.records(layer, selection.length - 1)
    forced = {block for record in records for block in record["forced"]}
    chosen = {block for record in records for block in record["blocks"]} - forced
    kinds = {**dict.fromkeys(forced, "f"), **dict.fromkeys(chosen, "c")}
    pieces = [(kinds.get(block), _text(text)) for block, text in enumerate(selection.texts)]
    return "".join(f'<span class="{kind}">{text}</span>' if kind else text for kind, text in pieces)


def _health(folder: RunFolder, metrics: dict[str, Any]) -> str:
    findings = "".join(f'<p class="bad">{_text(finding)}</p>' for finding in metrics.get("findings", ()))
    judged = findings or "<p>Nothing is outside the thresholds of a healthy run.</p>"
    rows = read_csv(folder.health_csv, HEALTH_COLUMNS) if folder.health_csv.is_file() else []
    last = [row for row in rows if row["step"] == rows[-1]["step"]]
    shares = {"compressed": "share_cmp", "selected": "share_slc", "window": "share_win", "entropy": "entropy_mean_nats"}
    shares["collapsed"] = "collapse_share"
    shown = [[f"{row['layer']:.0f}", *(f"{row[f'gate_{name}']:.3f}" for name in shares.values())] for row in last]
    gates = _table(["layer", *shares], shown, numbers=range(6)) if shown else ""
    return f"<h2>Gates and health</h2>{judged}{gates}"


def _samples(folder: RunFolder) -> str:
    files = {name: folder.samples / f"{name}.txt" for name in ("before", "after")}
    blocks = [
        f'<p class="faint">{name} training</p><pre>{_text(path.read_text(encoding="utf-8"))}</pre>'
        for name, path in files.items()
        if path.is_file()
    ]
    return "<h2>What it writes</h2>" + "".join(blocks) if blocks else ""


def _next(folder: RunFolder, metrics: dict[str, Any]) -> str:
    run = folder.path
    commands = [f"nsa resume {run}"] if metrics.get("stopped_by") else []
    commands += [
        f'nsa generate {run} --prompt "The state of the union is "',
        f'nsa inspect {run} --prompt "$(cat some.txt)" --ranges',
        f"nsa train {run / 'config.yaml'} --run.name {run.name}-again    # the same run again, bit for bit on the CPU",
        f"nsa page {run} --beside runs/OTHER    # this page with another run's losses in it",
        f"tensorboard --logdir {run.parent}",
    ]
    return f"<h2>Next</h2><pre>{_text(chr(10).join(commands))}</pre>"


def _details(folder: RunFolder) -> str:
    env = read_json(folder.env_json) or {}
    names = ("device_name", "num_cpus", "num_threads", "platform", "nsa", "python", "git_commit")
    machine = _table(["machine", ""], [[name, str(env.get(name))] for name in names])
    config = _text(folder.config_yaml.read_text(encoding="utf-8"))
    return f"<h2>Details</h2>{machine}<details><summary>config.yaml</summary><pre>{config}</pre></details>"


def _value(config: RunConfig, name: str) -> Any:
    section, _, key = name.partition(".")
    value = getattr(config, section)
    return getattr(value, key) if key else value


def _table(names: Sequence[str], rows: Sequence[Sequence[str]], numbers: Sequence[int] | Mapping[int, Any] = ()) -> str:
    """A table; columns in `numbers` are set to the right."""
    classes = [' class="n"' if index in numbers else "" for index in range(len(names))]
    head = "".join(f"<th{kind}>{_text(name)}</th>" for kind, name in zip(classes, names, strict=True))
    lines = ["".join(f"<td{kind}>{_text(cell)}</td>" for kind, cell in zip(classes, row, strict=True)) for row in rows]
    return f"<table><tr>{head}</tr>" + "".join(f"<tr>{line}</tr>" for line in lines) + "</table>"


def _image(path: Path, says: str) -> str:
    return _embedded(path.read_bytes(), says) if path.is_file() else ""


def _png(figure: Figure, says: str) -> str:
    file = io.BytesIO()
    figure.savefig(file, dpi=110, format="png")
    return _embedded(file.getvalue(), says)


def _embedded(png: bytes, says: str) -> str:
    return f'<img alt="{_text(says)}" src="data:image/png;base64,{base64.b64encode(png).decode()}">'


def _text(value: str) -> str:
    """Escaped for HTML, control characters but the line's end made visible."""
    return escape(re.sub(r"[\x00-\x08\x0b-\x1f\x7f-\x9f]", "�", value))
