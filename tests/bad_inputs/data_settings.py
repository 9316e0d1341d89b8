"""Mistakes in how data are used: held-out documents, mixes, values."""

from __future__ import annotations

import json

from bad_data_files import CHECK, CHUNKS, LINES, TEXT, case, file, of, settings
from bad_inputs.case import BadInput

NOVEL = "".join(f"Sentence {n} of one long story that goes on and on.\n" for n in range(400))
TWICE = "".join(
    json.dumps({"text": f"Text {n % 60}. " + "It says the same as its copy. " * 9, "id": f"d{n}"}) + "\n"
    for n in range(120)
)
HELD_OUT = [
    case("a name that matches nothing", ('"zzz"', "nearest"), "jsonl", "a.jsonl", LINES, ", heldout: [zzz]"),
    case(
        "a name that matches nothing by chunks",
        ('"zzz"', "nearest"),
        "jsonl",
        "a.jsonl",
        LINES,
        ", heldout: [zzz]" + CHUNKS,
    ),
    case("a text as heldout", ("data.heldout", '["d1"]'), "jsonl", "a.jsonl", LINES, ", heldout: d1"),
    case("heldout of one", ("data.heldout", "below 1"), "jsonl", "a.jsonl", LINES, ", heldout: 1.0"),
    case("heldout below zero", ("data.heldout", "at least 0"), "jsonl", "a.jsonl", LINES, ", heldout: -0.1"),
    case("heldout of nan", ("data.heldout",), "jsonl", "a.jsonl", LINES, ", heldout: .nan"),
    case("heldout of infinity", ("data.heldout",), "jsonl", "a.jsonl", LINES, ", heldout: .inf"),
    case("heldout of ten percent", ("data.heldout", '["10%"]'), "jsonl", "a.jsonl", LINES, ", heldout: 10%"),
    case("heldout of 2e0", ("data.heldout", "below 1"), "jsonl", "a.jsonl", LINES, ", heldout: 2e0"),
    case("heldout of true", ("data.heldout",), "jsonl", "a.jsonl", LINES, ", heldout: true"),
    case("heldout of null", ("data.heldout",), "jsonl", "a.jsonl", LINES, ", heldout: null"),
    case("heldout of a mapping", ("data.heldout",), "jsonl", "a.jsonl", LINES, ", heldout: {a: 1}"),
    case("heldout that takes all", ("takes all 30",), "jsonl", "a.jsonl", LINES, ', heldout: ["*"]'),
    case(
        "heldout that takes all by chunks",
        ("0 training documents",),
        "jsonl",
        "a.jsonl",
        LINES,
        ', heldout: ["*"]' + CHUNKS,
    ),
    case("a fraction that takes none", ("chooses none of the 30",), "jsonl", "a.jsonl", LINES, ", heldout: 0.0001"),
    case(
        "a fraction that takes none by chunks",
        ("chooses none",),
        "jsonl",
        "a.jsonl",
        LINES,
        ", heldout: 0.0001" + CHUNKS,
    ),
    case("the only document held out", ("takes all 1", "such as 0.1"), "text", "a.txt", NOVEL, ", heldout: [a.txt]"),
    case(
        "a text too short to hold out its end",
        ("a.txt is too short",),
        "text",
        "a.txt",
        "word" + " " * 40,
        ", heldout: 0.1",
    ),
    case(
        "too little text",
        ("rows of 64 tokens", "more text"),
        "text",
        "a.txt",
        "Some words.\n\nSome more.",
        ", heldout: 0.4",
    ),
    BadInput(
        "names of drawn documents", CHECK, ("without end", "fraction"), settings("source: synthetic, heldout: [copy-1]")
    ),
    BadInput(
        "train without held-out documents",
        "train c.yaml",
        ("no document is held out", "data.heldout"),
        of("jsonl", "a.jsonl", LINES, ", heldout: 0"),
    ),
    BadInput(
        "train on held-out texts",
        "train c.yaml",
        ("heldout-overlap", "remove the duplicate"),
        of("jsonl", "a.jsonl", TWICE),
    ),
    BadInput(
        "train on held-out texts by chunks",
        "train c.yaml",
        ("heldout-overlap", "remove the duplicate"),
        of("jsonl", "a.jsonl", TWICE, CHUNKS),
    ),
]
MIXES = [
    BadInput("a mix of nothing", CHECK, ("data", "mix"), settings("source: mix")),
    BadInput("a mix without source mix", CHECK, ("sotu", "mix"), settings("mix: [{source: synthetic}]")),
    BadInput(
        "a weight of zero",
        CHECK,
        ("data.mix.0.weight", "greater than 0"),
        settings("source: mix, mix: [{source: synthetic, weight: 0}]"),
    ),
    BadInput(
        "a weight below zero",
        CHECK,
        ("data.mix.0.weight",),
        settings("source: mix, mix: [{source: synthetic, weight: -1}]"),
    ),
    BadInput(
        "a weight of nan",
        CHECK,
        ("data.mix.0.weight",),
        settings("source: mix, mix: [{source: synthetic, weight: .nan}]"),
    ),
    BadInput(
        "a weight of infinity",
        CHECK,
        ("data.mix.0.weight",),
        settings("source: mix, mix: [{source: synthetic, weight: .inf}]"),
    ),
    BadInput(
        "a weight of true",
        CHECK,
        ("data.mix.0.weight",),
        settings("source: mix, mix: [{source: synthetic, weight: true}]"),
    ),
    BadInput(
        "a weight in words",
        CHECK,
        ("data.mix.0.weight", "half"),
        settings("source: mix, mix: [{source: synthetic, weight: half}]"),
    ),
    BadInput(
        "an unknown key in a mix",
        CHECK,
        ("data.mix.0.weights", "weight"),
        settings("source: mix, mix: [{source: synthetic, weights: 1}]"),
    ),
    BadInput("a mix in a mix", CHECK, ("data.mix.0.source",), settings("source: mix, mix: [{source: mix}]")),
    BadInput("a mix that is no list", CHECK, ("data.mix",), settings("source: mix, mix: {source: synthetic}")),
    BadInput(
        "two of a name in a mix",
        CHECK,
        ("synthetic", "its own name"),
        settings("source: mix, mix: [{source: synthetic}, {source: synthetic}]"),
    ),
    BadInput(
        "paths above a mix",
        CHECK,
        ("a.txt", "move them"),
        settings("source: mix, paths: [a.txt], mix: [{source: synthetic}]"),
    ),
    BadInput(
        "a missing file of a mix",
        CHECK,
        ("data.mix, text", "absent.txt"),
        settings("source: mix, mix: [{source: synthetic}, {source: text, paths: [absent.txt]}]"),
    ),
    BadInput(
        "no paths in a mix", CHECK, ("data.mix.0", "needs paths"), settings("source: mix, mix: [{source: jsonl}]")
    ),
    BadInput(
        "a damaged file of a mix",
        CHECK,
        ("data.mix, jsonl", "a.jsonl:1"),
        settings("source: mix, mix: [{source: synthetic}, {source: jsonl, paths: [a.jsonl]}]", file("a.jsonl", "{")),
    ),
    BadInput(
        "a pattern of a mix that matches nothing",
        CHECK,
        ("zzz", "nearest"),
        settings(
            "source: mix, mix: [{source: synthetic}, {source: jsonl, paths: [a.jsonl], heldout: [zzz]}]",
            file("a.jsonl", LINES),
        ),
    ),
    BadInput(
        "a source of a mix without a row",
        CHECK,
        ("of text", "fill 0 rows"),
        settings(
            "source: mix, mix: [{source: synthetic}, {source: text, paths: [a.txt], heldout: 0}]",
            file("a.txt", "few words"),
        ),
    ),
    BadInput(
        "a text of two sources of a mix",
        "train c.yaml",
        ("heldout-overlap",),
        settings(
            "source: mix, max_eval_tokens: 50000, mix: [{name: one, source: jsonl, paths: [a.jsonl]}, "
            "{name: two, source: jsonl, paths: [b.jsonl], heldout: 0}]",
            file("a.jsonl", LINES),
            file("b.jsonl", LINES),
        ),
    ),
]
VALUES = [
    BadInput("no such source", CHECK, ("data.source", "web", "'jsonl'"), settings("source: web")),
    BadInput(
        "a wrong text_split", CHECK, ("data.text_split", "lines"), of("text", "a.txt", TEXT, ", text_split: lines")
    ),
    BadInput(
        "a branch as revision",
        CHECK,
        ("data.hub_revision", "main"),
        settings("source: fineweb_edu, hub_revision: main"),
    ),
    BadInput(
        "a window below a batch",
        CHECK,
        ("data.shuffle_window_tokens", "raise it"),
        settings("source: synthetic, shuffle_window_tokens: 100"),
    ),
    BadInput(
        "a million batches ahead",
        CHECK,
        ("data.prefetch_batches", "4096"),
        settings("source: synthetic, prefetch_batches: 1000000"),
    ),
    BadInput(
        "a timeout of infinity", CHECK, ("data.stall_timeout_s",), settings("source: synthetic, stall_timeout_s: .inf")
    ),
    BadInput(
        "a timeout of nan",
        CHECK,
        ("data.first_batch_timeout_s",),
        settings("source: synthetic, first_batch_timeout_s: .nan"),
    ),
    BadInput(
        "a copy of a billion letters",
        CHECK,
        ("data.synthetic_length",),
        settings("source: synthetic, synthetic_length: 1000000000"),
    ),
    BadInput(
        "more pairs than keys",
        CHECK,
        ("677", "676"),
        settings("source: synthetic, synthetic_task: recall, synthetic_length: 677"),
    ),
    BadInput(
        "no evaluated tokens", CHECK, ("data.max_eval_tokens",), settings("source: synthetic, max_eval_tokens: 0")
    ),
    BadInput(
        "true for a number", CHECK, ("data.max_eval_tokens",), settings("source: synthetic, max_eval_tokens: true")
    ),
    BadInput("memory below zero", CHECK, ("data.in_memory_mib",), settings("source: synthetic, in_memory_mib: -1")),
    BadInput("no batches to time", "data check c.yaml --batches 0", ("--batches", "0")),
    BadInput("no such action", "data inspect c.yaml", ("inspect", "nsa data check")),
]
CASES = [*HELD_OUT, *MIXES, *VALUES]
