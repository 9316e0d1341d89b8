"""`report.md` of a run: its results, curves, samples, config and machine, for people."""

from __future__ import annotations

import json
from typing import Any

from nsa.config.run import RunConfig
from nsa.runs.folder import RunFolder, write_text
from nsa.runs.health import gate_of_row, last_health, outside_columns
from nsa.runs.markdown import cell, code_block, inline
from nsa.runs.tables import HEALTH_COLUMNS
from nsa.runs.thresholds import Thresholds

UNTRAINED_TOLERANCE_NATS = 0.5  # an untrained model further from ln(vocabulary) than this is worth a look
SHOWN_DOCUMENTS = 30  # held-out names that the report lists


def write_report(folder: RunFolder, config: RunConfig, metrics: dict[str, Any]) -> None:
    """Write `report.md` from the contents of `metrics.json`, `env.json` and the samples."""
    env = json.loads(folder.env_json.read_text(encoding="utf-8"))
    index = json.loads(folder.data_index_json.read_text(encoding="utf-8"))
    ended = f"was stopped by {inline(metrics['stopped_by'])}" if metrics["stopped_by"] else "finished"
    sections = [
        f"# Run {inline(config.run.name)}\n\nThis run {ended} after step {metrics['step']} of {config.train.steps}.",
        f"**{inline(index['description'])}.**" if index["replaced_because"] else "",
        _overridden(folder),
        "## Results\n\n" + table(results(metrics)),
        f"![Loss curves]({folder.curves_png.name})",
        "## Health\n\n" + _health(folder, metrics["findings"]),
        "## Samples\n\nSame prompts and random numbers before and after training.\n\n" + _samples(folder),
        "## Held-out documents\n\n" + _held_out(index["held_out_documents"]),
        "## Config\n\nAll of it is in `config.yaml`.\n\n" + table(_config(config, index["description"])),
        "## Machine\n\n" + table(_machine(env)),
        "## Files\n\n`training.csv` has every optimizer step, `val.csv` every evaluation, `health.csv` the gates and "
        "selection of every layer, `metrics.json` the results, `tb/` the same for TensorBoard. The model is in "
        "`checkpoints/latest`, a folder for `from_pretrained`.",
    ]
    write_text(folder.report_md, "\n\n".join(section for section in sections if section) + "\n")


def _overridden(folder: RunFolder) -> str:
    """The errors of preflight that the config lets pass."""
    codes = folder.overridden()
    return f"**Preflight was overridden: {inline(', '.join(codes))}** (`preflight.json`)." if codes else ""


def results(metrics: dict[str, Any]) -> dict[str, str]:
    """The results as names and texts with their units."""
    untrained = f"{metrics['untrained_val_loss']:.4f} nats per token; ln(vocabulary) is {metrics['log_vocab_size']:.4f}"
    replaced = {"data": metrics["data"]} if metrics["data_replaced_because"] else {}
    return replaced | {
        "steps, tokens": f"{metrics['step']:,}, {metrics['tokens']:,}",
        "parameters": f"{metrics['num_parameters']:,}",
        "held-out loss, untrained": untrained + untrained_warning(metrics),
        "training loss at the end": "none" if metrics["train_loss"] is None else f"{metrics['train_loss']:.4f}",
        "held-out loss": f"{metrics['val_loss']:.4f} nats per token, after step {metrics['val_step']}",
        "held-out perplexity": f"{metrics['val_ppl']:.3f}",
        "held-out bits per byte": f"{metrics['val_bits_per_byte']:.4f}",
        "skipped steps": f"{metrics['num_skipped_steps']}",
        "health": "; ".join(metrics["findings"]) or "healthy",
        "time": f"{metrics['wall_s']:.1f} s since the last start; {metrics['train_s']:.1f} s in all training steps",
        "training tokens per second": "none" if not metrics["tokens_per_s"] else f"{metrics['tokens_per_s']:,.0f}",
    }


def untrained_warning(metrics: dict[str, Any]) -> str:
    """A remark when the untrained loss is far from that of a uniform guess, else nothing."""
    if abs(metrics["untrained_val_loss"] - metrics["log_vocab_size"]) <= UNTRAINED_TOLERANCE_NATS:
        return ""
    return " - far apart: look at the initialisation and the labels"


def table(values: dict[str, str]) -> str:
    """Names and texts as a Markdown table."""
    lines = [f"| {cell(name)} | {cell(str(text))} |" for name, text in values.items()]
    return "\n".join(["| | |", "|---|---|", *lines])


def _health(folder: RunFolder, findings: list[str]) -> str:
    """What is outside the thresholds, and the last measurement of gates and selection."""
    judged = "\n".join(f"- {inline(finding)}" for finding in findings)
    judged = judged or "Nothing is outside the thresholds of a healthy run."
    last = last_health(folder.health_csv)
    if not last:
        return f"{judged}\n\nGates and selection were not measured."
    names = [name for name in HEALTH_COLUMNS if name != "step"]
    lines = [f"| {' | '.join(name.replace('_', ' ') for name in names)} |", "|---" * len(names) + "|"]
    for row in last:
        outside = outside_columns(gate_of_row(row), Thresholds())
        cells = [_shown(row[name], bold=name in outside) for name in names]
        lines.append(f"| {' | '.join(cells)} |")
    legend = "; bold: outside the thresholds of a healthy run" if any("**" in line for line in lines) else ""
    return f"{judged}\n\nGates and selection at step {last[0]['step']}{legend}:\n\n" + "\n".join(lines)


def _shown(value: float | None, *, bold: bool) -> str:
    text = "-" if value is None else f"{value:.4g}"
    return f"**{text}**" if bold and value is not None else text


def _samples(folder: RunFolder) -> str:
    files = [path for name in ("before", "after") if (path := folder.samples / f"{name}.txt").is_file()]
    blocks = [f"`samples/{path.name}`\n\n" + code_block(path.read_text(encoding="utf-8")) for path in files]
    return "\n\n".join(block.rstrip() for block in blocks) or "None were asked for."


def _held_out(names: list[str]) -> str:
    shown = "; ".join(map(inline, names[:SHOWN_DOCUMENTS]))
    rest = f"; and {len(names) - SHOWN_DOCUMENTS} more" if len(names) > SHOWN_DOCUMENTS else ""
    return f"Never trained on: {shown}{rest}. `data_index.json` has them all."


def _config(config: RunConfig, data: str) -> dict[str, str]:
    model, train, optim = config.model, config.train, config.optim
    return {
        "model": f"{model.num_hidden_layers} layers of {', '.join(model.layer_types)}, hidden {model.hidden_size}, "
        f"{model.num_attention_heads} heads in {model.num_key_value_heads} groups, SwiGLU {model.intermediate_size}",
        "block geometry": ", ".join(f"{name} {value}" for name, value in vars(model.geometry).items()),
        "compression, gate": f"{model.compression} (RoPE {model.compress_rope}), {model.gate}",
        "data": f"{data}, tokenizer {config.data.tokenizer}, held out {config.data.heldout}",
        "batch": f"{train.batch_tokens:,} tokens in rows of {train.sequence_length}, {train.precision}",
        "optimizer": f"AdamW, lr {optim.lr:g} after {optim.warmup_steps} warm-up steps, cosine to "
        f"{optim.lr * optim.min_lr_ratio:g}, weight decay {optim.weight_decay:g}, norm at most {optim.max_grad_norm:g}",
        "seed": f"{config.run.seed}",
    }


def _machine(env: dict[str, Any]) -> dict[str, str]:
    packages = ", ".join(f"{name} {number}" for name, number in env["packages"].items() if number)
    return {
        "device": f"{env['device']} ({env['device_name']}), {env['num_cpus']} CPUs, {env['num_threads']} threads",
        "system": env["platform"],
        "versions": f"nsa {env['nsa']}, Python {env['python']}, {packages}",
        "commit": env["git_commit"] or "none",
        "command": f"`{' '.join(env['command'])}`",
    }
