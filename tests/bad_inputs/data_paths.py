"""Mistakes in where data lie: paths, folders, links, pipes, devices."""

from __future__ import annotations

import gzip
import lzma
import os
from pathlib import Path

from bad_data_files import CHECK, CHUNKS, LINES, PACKED, file, link, listening, of, settings, sparse
from bad_inputs.case import BadInput

PATHS = [
    BadInput("no such file", CHECK, ("absent.txt", "data.paths"), settings("source: text, paths: [absent.txt]")),
    BadInput("no such folder", CHECK, ("absent", "data.paths"), settings("source: jsonl, paths: [absent/]")),
    BadInput(
        "a pattern without match", CHECK, ("*.jsonl", "data.paths"), settings('source: jsonl, paths: ["*.jsonl"]')
    ),
    BadInput(
        "an empty folder",
        CHECK,
        ("*.jsonl", "holds nothing"),
        settings("source: jsonl, paths: [d]", lambda h: (h / "d").mkdir()),
    ),
    BadInput(
        "a folder of other files",
        CHECK,
        ("*.txt, *.md", "1 .csv"),
        settings("source: text, paths: [d]", file("d/a.csv")),
    ),
    BadInput(
        "a folder of JSON Lines as Parquet",
        CHECK,
        ("*.parquet", ".jsonl"),
        settings("source: parquet, paths: [d]", file("d/a.jsonl")),
    ),
    BadInput(
        "a folder of hidden files", CHECK, ("*.txt", ".a.txt"), settings("source: text, paths: [d]", file("d/.a.txt"))
    ),
    BadInput(
        "a folder of hidden folders",
        CHECK,
        ("*.md",),
        settings("source: text, paths: [d]", file("d/.ipynb_checkpoints/a.md")),
    ),
    BadInput(
        "a file and its packed copy",
        CHECK,
        ("a.jsonl is given 2 times", "keep one"),
        settings("source: jsonl, paths: [d]", file("d/a.jsonl", LINES), file("d/a.jsonl.gz", gzip.compress(PACKED))),
    ),
    BadInput(
        "a file given twice",
        CHECK,
        ("a.txt is given 2 times",),
        settings("source: text, paths: [a.txt, ./a.txt]", file("a.txt")),
    ),
    BadInput(
        "a file in its folder again",
        CHECK,
        ("given 2 times",),
        settings("source: text, paths: [d, d/a.txt]", file("d/a.txt")),
    ),
    BadInput(
        "a pattern that matches a folder",
        CHECK,
        ("cannot be read: it is a folder",),
        settings('source: text, paths: ["d*"]', file("d1/a.txt")),
    ),
    BadInput("an empty path", CHECK, ("data.paths",), settings('source: text, paths: [""]')),
    BadInput("a NUL in a path", CHECK, ("data.paths",), settings('source: text, paths: ["a\\0b"]')),
    BadInput("a path that is too long", CHECK, ("too long",), settings(f"source: text, paths: [{'a' * 5000}]")),
    BadInput(
        "an address",
        CHECK,
        ("https://example.org/a.jsonl", "download it"),
        settings("source: jsonl, paths: [https://example.org/a.jsonl]"),
    ),
    BadInput(
        "no such user", CHECK, ("~nosuchuser", "data.paths"), settings("source: text, paths: [~nosuchuser/a.txt]")
    ),
    BadInput(
        "a file as a folder", CHECK, ("a.txt/b.txt",), settings("source: text, paths: [a.txt/b.txt]", file("a.txt"))
    ),
    BadInput("paths of numbers", CHECK, ("data.paths", "string"), settings("source: text, paths: [1, 2]")),
    BadInput("paths that are null", CHECK, ("data.paths",), settings("source: text, paths: null")),
    BadInput("no paths", CHECK, ("needs paths",), settings("source: text")),
    BadInput("paths of another source", CHECK, ("reads no files", "a.txt"), settings("source: sotu, paths: [a.txt]")),
    BadInput(
        "two files of Tiny Shakespeare",
        CHECK,
        ("one file",),
        settings("source: tinyshakespeare, paths: [a.txt, b.txt]"),
    ),
    BadInput(
        "another text as Tiny Shakespeare",
        CHECK,
        ("a.txt is not Tiny Shakespeare",),
        settings("source: tinyshakespeare, paths: [a.txt]", file("a.txt")),
    ),
    BadInput(
        "a folder as Tiny Shakespeare",
        CHECK,
        ("d cannot be read",),
        settings("source: tinyshakespeare, paths: [d]", file("d/a.txt")),
    ),
    BadInput("an escape sequence in a name", CHECK, ("\\x1b[2J",), settings('source: text, paths: ["\\e[2J.txt"]')),
    BadInput(
        "a name that is not UTF-8 and broken",
        CHECK,
        ("\\udcff.jsonl:1",),
        settings(
            "source: jsonl, paths: [d]",
            lambda h: ((h / "d").mkdir(), Path(os.fsdecode(os.fsencode(h) + b"/d/\xff.jsonl")).write_text("{")),
        ),
    ),
]
PLACES = [
    BadInput(
        "a pipe",
        CHECK,
        ("a.txt is a pipe", "into a file"),
        settings("source: text, paths: [a.txt]", lambda h: os.mkfifo(h / "a.txt")),
    ),
    BadInput(
        "a pipe in a folder",
        CHECK,
        ("a.jsonl is a pipe",),
        settings("source: jsonl, paths: [d]", lambda h: ((h / "d").mkdir(), os.mkfifo(h / "d/a.jsonl"))),
    ),
    BadInput(
        "a pipe of a pattern",
        CHECK,
        ("is a pipe",),
        settings('source: parquet, paths: ["*.parquet"]', lambda h: os.mkfifo(h / "a.parquet")),
    ),
    BadInput(
        "a pipe as Tiny Shakespeare",
        CHECK,
        ("a.txt is a pipe",),
        settings("source: tinyshakespeare, paths: [a.txt]", lambda h: os.mkfifo(h / "a.txt")),
    ),
    BadInput("a socket", CHECK, ("a.txt is a socket",), settings("source: text, paths: [a.txt]", listening)),
    BadInput("a device", CHECK, ("/dev/zero is a device",), settings("source: text, paths: [/dev/zero]")),
    BadInput(
        "a device behind a link",
        CHECK,
        ("a.txt is a device",),
        settings("source: text, paths: [a.txt]", link("a.txt", "/dev/zero")),
    ),
    BadInput(
        "a device behind a link in a folder",
        CHECK,
        ("a.jsonl is a device",),
        settings("source: jsonl, paths: [d]", link("d/a.jsonl", "/dev/urandom")),
    ),
    BadInput("nothing of /dev/null", CHECK, ("/dev/null is a device",), settings("source: jsonl, paths: [/dev/null]")),
    BadInput(
        "a link to itself",
        CHECK,
        ("a.txt is a link", "itself"),
        settings("source: text, paths: [a.txt]", link("a.txt", "a.txt")),
    ),
    BadInput(
        "links in a circle in a folder",
        CHECK,
        ("is a link", "itself"),
        settings("source: text, paths: [d]", link("d/a.txt", "b.txt"), link("d/b.txt", "a.txt")),
    ),
    BadInput(
        "a dangling link",
        CHECK,
        ("a.txt is a link to gone", "mend or remove"),
        settings("source: text, paths: [a.txt]", link("a.txt", "gone")),
    ),
    BadInput(
        "a dangling link in a folder",
        CHECK,
        ("b.txt is a link to /gone", "mend or remove"),
        settings("source: text, paths: [d]", file("d/a.txt"), link("d/b.txt", "/gone")),
    ),
    BadInput(
        "a folder linked into itself",
        CHECK,
        ("round is a link to", "remove the link"),
        settings("source: text, paths: [d]", file("d/a.txt"), link("d/round", ".")),
    ),
    BadInput(
        "a text of a terabyte",
        CHECK,
        ("a.txt", "half of this machine's memory", "JSON Lines"),
        settings("source: text, paths: [a.txt]", sparse("a.txt", 2**40)),
    ),
    BadInput(
        "a cache folder that is a file",
        CHECK,
        ("a.jsonl.gz cannot be unpacked", "data.cache_folder"),
        settings(
            f"source: jsonl, paths: [a.jsonl.gz], cache_folder: c.yaml{CHUNKS}",
            file("a.jsonl.gz", gzip.compress(PACKED)),
        ),
    ),
    BadInput(
        "a cache folder in /proc",
        CHECK,
        ("cannot be unpacked", "data.cache_folder"),
        settings(
            f"source: jsonl, paths: [a.jsonl.xz], cache_folder: /proc/nsa{CHUNKS}",
            file("a.jsonl.xz", lzma.compress(PACKED)),
        ),
    ),
    BadInput("a file of /proc", CHECK, ("/proc/self/mem",), settings("source: text, paths: [/proc/self/mem]")),
    BadInput(
        "train on a pipe",
        "train c.yaml",
        ("a.txt is a pipe",),
        settings("source: text, paths: [a.txt]", lambda h: os.mkfifo(h / "a.txt")),
    ),
    BadInput(
        "train on damaged gzip",
        "train c.yaml",
        ("a.jsonl.gz", "damaged"),
        of("jsonl", "a.jsonl.gz", gzip.compress(PACKED)[:-9]),
    ),
    BadInput(
        "preflight of a pipe",
        "preflight c.yaml",
        (),
        settings("source: text, paths: [a.txt]", lambda h: os.mkfifo(h / "a.txt")),
    ),
]
CASES = [*PATHS, *PLACES]
