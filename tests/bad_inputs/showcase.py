"""Budgets of minutes that cannot be, and pages of what is no run."""

from __future__ import annotations

from pathlib import Path

from bad_inputs.case import BadInput, tiny
from nsa.config.load import dump_config, load_config


def minutes(value: str) -> object:
    return tiny("train: {steps: 2,", f"train: {{max_minutes: {value}, steps: 2,")


def run_folder(here: Path, **files: str) -> None:
    folder = here / "runs" / "tiny"
    folder.mkdir(parents=True)
    for name, text in {"config": dump_config(load_config(here / "c.yaml")), **files}.items():
        (folder / {"config": "config.yaml"}.get(name, f"{name}.json")).write_text(text, encoding="utf-8")


CASES = [
    BadInput("no minutes", "train c.yaml", ("train.max_minutes", "greater than 0"), minutes("0")),
    BadInput("minutes below zero", "train c.yaml", ("train.max_minutes", "greater than 0"), minutes("-5")),
    BadInput("minutes without end", "train c.yaml", ("train.max_minutes", "finite"), minutes(".inf")),
    BadInput("minutes that are no number", "train c.yaml", ("train.max_minutes", "finite"), minutes(".nan")),
    BadInput("minutes in words", "train c.yaml", ("train.max_minutes", "five"), minutes("five")),
    BadInput("minutes as a list", "train c.yaml", ("train.max_minutes", "[5]"), minutes("[5]")),
    BadInput("too few minutes", "train c.yaml --train.max_minutes 0.001", ("train.max_minutes 0.001", "or more")),
    BadInput(
        "minutes misspelt",
        "train c.yaml",
        ("train.max_minute", "train.max_minutes"),
        tiny("steps: 2,", "max_minute: 2,"),
    ),
    BadInput(
        "minutes for a run that goes on",
        "resume runs/tiny --train.max_minutes 3",
        ("train.max_minutes", "cannot be changed", "nsa train"),
        run_folder,
    ),
    BadInput("page of no run", "page runs/absent", ("runs/absent", "config.yaml")),
    BadInput("page of a run that has not ended", "page runs/tiny", ("metrics.json", "nsa resume"), run_folder),
    BadInput(
        "page of damaged results",
        "page runs/tiny",
        ("metrics.json", "damaged"),
        lambda here: run_folder(here, metrics="{"),
    ),
    BadInput(
        "page of results without a loss",
        "page runs/tiny",
        ("metrics.json", "val_loss"),
        lambda here: run_folder(here, metrics='{"step": 1}'),
    ),
    BadInput("page beside no run", "page runs/tiny --beside nowhere", ("metrics.json", "nsa resume"), run_folder),
    BadInput("page of nothing", "page", ("RUN must be given",)),
]
