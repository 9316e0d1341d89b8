"""Every figure in the documents' tables of measurements is its results file's, rounded."""

from __future__ import annotations

import csv
import re
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[1]
RESULTS = ROOT / "benchmarks" / "results"
DOCUMENTS = [ROOT / "README.md", ROOT / "CONTRIBUTING.md", *sorted((ROOT / "docs").glob("*.md"))]
NUMBER = re.compile(r"[-+]?[\d,]*\.?\d+")
Row = dict[str, str]


@dataclass(frozen=True)
class Held:
    """A table that is held against results.

    `expected` gives the numbers of a line, in the order in which they stand in its cells behind the first `num_keys`;
    it is called with those cells, of which an empty one repeats the one above.
    """

    document: str
    header: str
    num_keys: int
    expected: Callable[..., list[float]]


def results(name: str) -> list[Row]:
    with (RESULTS / f"{name}.csv").open(encoding="utf-8") as file:
        return list(csv.DictReader(file))


def find(name: str, **keys: object) -> Row:
    """The row of a results file whose columns are these."""
    (row,) = (row for row in results(name) if all(row[key] == str(value) for key, value in keys.items()))
    return row


def count(text: str) -> int:
    """8k, 8,192 or 8192."""
    return int(text[:-1]) * 1024 if text.endswith("k") else int(text.replace(",", ""))


def columns(row: Row, *names: str) -> list[float]:
    return [float(row[name]) for name in names]


def prefill(row: Row) -> list[float]:
    """Milliseconds of NSA and of dense attention, forward and backward, and their quotients."""
    ours = columns(row, "nsa_forward_ms", "nsa_backward_ms")
    dense = columns(row, "dense_forward_ms", "dense_backward_ms")
    return [*ours, *dense, *(theirs / mine for mine, theirs in zip(ours, dense, strict=True))]


SHAPES = {
    "64 query heads, 4 groups, D 128": "g16",
    "32 query heads, 8 groups, D 128": "g4",
    "64 query heads, 4 groups, Dk 192, Dv 128": "paper",
    "G16": "g16",
    "G4": "g4",
    "paper": "paper",
}


def on_h200(shape: str, tokens: str) -> list[float]:
    return prefill(find(f"prefill_h200_{SHAPES[shape]}", length=count(tokens)))


def on_h200_by_flash(shape: str, tokens: str) -> list[float]:
    return prefill(find(f"prefill_h200_{SHAPES[shape]}_flash", length=count(tokens)))


def peak_on_h200(shape: str, tokens: str) -> list[float]:
    row = find(f"prefill_h200_{SHAPES[shape]}", length=count(tokens))
    return columns(row, "nsa_peak_gib", "dense_peak_gib")


def on_cpu(tokens: str) -> list[float]:
    row = find("prefill_cpu", length=count(tokens))
    return columns(row, "nsa_total_ms", "dense_total_ms", "speedup", "nsa_peak_gib")


def decode_row(heads: str, shape: str) -> Row:
    (num_heads, num_kv_heads), (rows, context) = heads.split(" / "), shape.split(" x ")
    keys = {"num_heads": num_heads, "num_kv_heads": num_kv_heads, "rows": rows, "context": count(context)}
    return find("decode_step_h200", **keys)


def decode_step(heads: str, shape: str) -> list[float]:
    return columns(decode_row(heads, shape), "nsa_ms", "cudnn_ms", "flash_ms", "over_cudnn", "over_flash")


def decode_kernels(heads: str, shape: str) -> list[float]:
    kernels = ("compressed", "importance", "choice_window", "selected", "merge")
    return columns(decode_row(heads, shape), *(f"{kernel}_us" for kernel in kernels))


def training(tokens: str) -> list[float]:
    name = "train_h200_2k" if count(tokens) == 2048 else "train_h200_long"
    ours, dense = (find(name, length=count(tokens), attention=x) for x in ("nsa", "full_attention"))
    percent = [(float(row["tokens_per_s"]), 100 * float(row["mfu"])) for row in (ours, dense)]
    return [*percent[0], *percent[1], float(ours["speedup"])]


MIXES = {
    "one a row": "rows",
    "of 64 tokens": "short",
    "half a row, then of 64 tokens": "long",
    "drawn from 32 to 8,192 tokens": "drawn",
    "three of four rows whole, else drawn": "books",
}


def packed(documents: str) -> list[float]:
    return [speed_of("dense_packed_h200", mix=MIXES[documents], attention=x) for x in ("nsa", "varlen", "buckets")]


def speed_of(name: str, **keys: object) -> float:
    """Tokens per second of a training run."""
    return float(find(name, **keys)["tokens_per_s"])


def learned(run: str, _parameters: str) -> list[float]:
    last = {row["run"]: row for row in results("nsa_vs_dense")}
    losses = {name: float(row["val_loss"]) for name, row in last.items()}
    over = 100 * (losses[run] / losses["showcase"] - 1)
    return [*columns(last[run], "tokens", "val_loss", "val_bits_per_byte"), over]


HELD = [
    Held("README.md", "| tokens | NSA ms | dense ms | dense / NSA | NSA peak GiB |", 1, on_cpu),
    Held("README.md", "| shape | tokens | NSA | dense | dense / NSA |", 2, on_h200),
    Held(
        "README.md",
        "| query / KV heads | rows x context | NSA ms | cuDNN | FlashAttention | times faster |",
        2,
        decode_step,
    ),
    Held("docs/kernels.md", "| shape | tokens | NSA | dense |", 2, peak_on_h200),
    Held("docs/kernels.md", "| shape | tokens | NSA | dense | dense / NSA |", 2, on_h200_by_flash),
    Held(
        "docs/kernels.md",
        "| query / KV heads | rows x context | compressed | importance | choice, window | selected | sum |",
        2,
        decode_kernels,
    ),
    Held(
        "docs/training.md",
        "| tokens a row | NSA tokens/s | MFU | dense tokens/s | MFU | NSA over dense |",
        1,
        training,
    ),
    Held("docs/training.md", "| documents | NSA | dense | dense by batches of similar length |", 1, packed),
    Held(
        "docs/nsa_vs_dense.md",
        "| run | parameters | tokens | held-out loss | bits per byte | against the first |",
        2,
        learned,
    ),
]  # fmt: skip

TWO_GPUS, ONE_GPU = speed_of("train_h200_2gpus"), speed_of("train_h200_1gpu")
# Sentences and the values of their numbers, in order; None where a number is no measurement.
SENTENCES: list[tuple[str, str, list[float | None]]] = [
    (
        "README.md",
        "377,000 tokens/s at 2,048 tokens a row (32% MFU; dense 502,000), 290,000 at 32,768 (1.94 times dense), "
        "211,000 at 131,072 (4.47 times).",
        [
            training("2048")[0], None, *training("2048")[1:3], training("32768")[0], None, training("32768")[4],
            training("131072")[0], None, training("131072")[4],
        ],
    ),
    (
        "README.md",
        "Against PyTorch's FlashAttention 64k is 7.0 / 10.1 and 6.6 / 9.8 times as fast.",
        [None, *on_h200_by_flash("G16", "64k")[4:], *on_h200_by_flash("G4", "64k")[4:]],
    ),
    (
        "README.md",
        "Decoding a token with a 4-layer model takes 4.7 ms at 2,048 and 4.7 ms at 32,768 tokens of context, dense 2.4 "
        "and 7.9",
        [
            None, *columns(find("decode_cpu", context=2048), "total_ms"), None,
            *columns(find("decode_cpu", context=32768), "total_ms"), None,
            *(float(find("decode_cpu", context=n)["dense_ms"]) for n in (2048, 32768)),
        ],
    ),
    (
        "README.md",
        "trains at 38,000 tokens/s in whole steps, dense at 67,000",
        [speed_of("train_cpu", attention="nsa"), speed_of("train_cpu", attention="full_attention")],
    ),
    (
        "docs/kernels.md",
        "32k and 64k take 10.7 / 21.2 and 28.0 / 55.0 ms (G16), 5.99 / 11.3 and 15.2 / 27.7 (G4)",
        [
            None, None,
            *(x for n in (32768, 65536) for x in prefill(find("prefill_h200_g16_alike", length=n))[:2]), None,
            *(x for n in (32768, 65536) for x in prefill(find("prefill_h200_g4_alike", length=n))[:2]), None,
        ],
    ),
    (
        "docs/training.md",
        "711,000 tokens/s on two, 373,000 on one: 1.91 times.",
        [TWO_GPUS, ONE_GPU, TWO_GPUS / ONE_GPU],
    ),
    ("docs/before_a_run.md", "It trains at 377,000 tokens/s", [training("2048")[0]]),
]  # fmt: skip

# Tables whose cells hold numbers that no results file has, by document and first heading.
OTHERS = {
    ("README.md", ""),  # other implementations, in runs of their own
    ("docs/before_a_run.md", "config"),
    ("docs/data.md", ""),  # the loader, on two cores
    ("docs/kernels.md", "kernel"),  # measured by hand, as it says
    ("docs/kernels_log.md", "change"),
    ("docs/kernels_log.md", "tried"),
}


def tables(document: Path) -> Iterator[tuple[str, list[list[str]]]]:
    """Header and cells of each table."""
    for lines in re.findall(r"(?:^\|.*\n)+", document.read_text(encoding="utf-8"), flags=re.MULTILINE):
        header, _, *rows = lines.splitlines()
        yield header, [[cell.strip() for cell in row.strip("|").split("|")] for row in rows]


def rounds_to(value: float, text: str) -> bool:
    """Whether `text` is `value`, rounded to the digits that it has; zeros at the end of 377,000 may stand for none."""
    digits = text.replace(",", "").lstrip("+-")
    if "." in digits:
        step = 10.0 ** -len(digits.split(".")[1])
    else:
        step = 10.0 ** (len(digits) - len(digits.rstrip("0"))) if "," in text else 1.0
    return abs(float(text.replace(",", "")) - value) <= step / 2 + 1e-9 * abs(value)


def numbers(text: str) -> list[str]:
    return NUMBER.findall(text)


@pytest.mark.parametrize("held", HELD, ids=lambda held: f"{held.document}-{held.expected.__name__}")
def test_a_tables_figures_are_those_of_its_results(held: Held) -> None:
    (rows,) = (rows for header, rows in tables(ROOT / held.document) if header == held.header)
    keys: list[str] = []
    for row in rows:
        keys = [cell or above for cell, above in zip(row[: held.num_keys], keys or row, strict=False)]
        found, expected = numbers(" ".join(row[held.num_keys :])), held.expected(*keys)
        assert len(found) == len(expected), row
        wrong = [pair for pair in zip(found, expected, strict=True) if not rounds_to(pair[1], pair[0])]
        assert not wrong, (keys, wrong)


@pytest.mark.parametrize(("document", "sentence", "values"), SENTENCES)
def test_a_sentences_figures_are_those_of_its_results(document: str, sentence: str, values: list[float | None]) -> None:
    text = (ROOT / document).read_text(encoding="utf-8")
    assert sentence in " ".join(text.split())
    for found, value in zip(numbers(re.sub(r"FSDP2|G16|G4", lambda m: m[0][-1], sentence)), values, strict=True):
        assert value is None or rounds_to(value, found), (found, value)


def test_no_table_of_measurements_goes_unheld() -> None:
    held = {(held.document, held.header) for held in HELD}
    unheld = []
    for document in DOCUMENTS:
        name = document.relative_to(ROOT).as_posix()
        for header, rows in tables(document):
            first = header.strip("|").split("|")[0].strip()
            measured = sum(bool(re.search(r"\d\.\d|\d,\d", " ".join(row[1:]))) for row in rows) > len(rows) / 2
            if measured and (name, header) not in held and (name, first) not in OTHERS:
                unheld.append((name, header))
    assert not unheld


def test_no_table_stands_in_two_documents() -> None:
    lines: dict[str, set[str]] = {}
    for document in DOCUMENTS:
        for _, rows in tables(document):
            for row in rows:
                if len(numbers(" ".join(row))) >= 4:
                    lines.setdefault(" | ".join(row[-3:]), set()).add(document.name)
    assert not {line: names for line, names in lines.items() if len(names) > 1}


@pytest.mark.parametrize(
    ("value", "text", "right"),
    [
        (1.737, "1.74", True), (1.737, "1.73", False), (376_600.0, "377,000", True), (376_600.0, "378,000", False),
        (1999.0, "1,999", True), (1999.0, "2,009", False), (0.7497, "0.75", True), (-1.449, "-1.45", True),
        (139.5, "140", True), (139.5, "141", False),
    ],
)  # fmt: skip
def test_rounding_is_told_from_a_wrong_figure(value: float, text: str, right: bool) -> None:
    assert rounds_to(value, text) is right
