"""Mistakes in data: files of the wrong kind, encodings, damage, malformed lines, columns."""

from __future__ import annotations

import bz2
import gzip
import json
import lzma

import pyarrow

from bad_data_files import (
    CHECK,
    CHUNKS,
    LINES,
    PACKED,
    TEXT,
    case,
    flipped,
    of,
    parquet,
    settings,
    tar_gz,
    zipped,
    zstd,
)
from bad_inputs.case import BadInput

KINDS = [
    case(
        "a Parquet file as JSON Lines", ("a.jsonl", "Parquet", "data.source"), "jsonl", "a.jsonl", b"PAR1" + b"\0" * 50
    ),
    case("a Parquet file as text", ("a.txt", "Parquet"), "text", "a.txt", b"PAR1" + bytes(range(200))),
    case("JSON Lines as text", ("a.jsonl", '"jsonl"'), "text", "a.jsonl", LINES),
    case("packed JSON Lines as text", ("a.jsonl.gz", '"jsonl"'), "text", "a.jsonl.gz", gzip.compress(LINES.encode())),
    case("JSON Lines as Parquet", ("a.jsonl", "no Parquet"), "parquet", "a.jsonl", LINES),
    case("text as JSON Lines", ("a.jsonl:1", "not JSON"), "jsonl", "a.jsonl", TEXT),
    case("a PDF", ("a.txt", "PDF", "pdftotext"), "text", "a.txt", b"%PDF-1.7\n%\xe2\xe3\xcf\xd3\n1 0 obj"),
    BadInput(
        "a zip archive", CHECK, ("a.txt", "zip archive", "unzip"), settings("source: text, paths: [a.txt]", zipped)
    ),
    case("a tar archive in gzip", ("a.txt.gz", "tar archive"), "text", "a.txt.gz", tar_gz()),
    case("a 7z archive", ("a.txt", "7z"), "text", "a.txt", b"7z\xbc\xaf\x27\x1c\0\4" + bytes(40)),
    case("lz4", ("a.txt", "unlz4"), "text", "a.txt", b"\x04\x22\x4d\x18" + bytes(range(99))),
    case("an SQLite database", ("a.txt", "SQLite", "JSON Lines"), "text", "a.txt", b"SQLite format 3\0" + bytes(99)),
    case("an Arrow file", ("a.txt", "Arrow", "Parquet"), "text", "a.txt", b"ARROW1\0\0" + bytes(99)),
    case("a NumPy array of tokens", ("a.txt", "NumPy", "texts"), "text", "a.txt", b"\x93NUMPY\1\0" + bytes(99)),
    case("a picture", ("a.txt", "picture"), "text", "a.txt", b"\x89PNG\r\n\x1a\n" + bytes(99)),
    case("a program", ("a.txt", "program"), "text", "a.txt", b"\x7fELF\2\1\1" + bytes(99)),
    case("an old Word document", ("a.txt", "Office"), "text", "a.txt", b"\xd0\xcf\x11\xe0\xa1\xb1\x1a\xe1" + bytes(99)),
    case("RTF", ("a.txt", "RTF"), "text", "a.txt", b"{\\rtf1\\ansi some words}"),
    case(
        "a pointer of Git LFS as JSON Lines",
        ("a.jsonl", "Git LFS", "git lfs pull"),
        "jsonl",
        "a.jsonl",
        "version https://git-lfs.github.com/spec/v1\noid sha256:00\nsize 3\n",
    ),
    case(
        "a pointer of Git LFS as Parquet",
        ("a.parquet", "Git LFS"),
        "parquet",
        "a.parquet",
        "version https://git-lfs.github.com/spec/v1\noid sha256:00\nsize 3\n",
    ),
    case("an HTML page as JSON Lines", ("a.jsonl:1", "HTML"), "jsonl", "a.jsonl", "<!DOCTYPE html><html></html>\n"),
    case("random bytes", ("a.txt", "no text"), "text", "a.txt", bytes(b"\xc0\x01\x8f\x02\x93\x05" * 99)),
    case("zeros", ("a.txt", "no text", "zero"), "text", "a.txt", bytes(5000)),
    case("a JSON list", ("a.json:1", "jq -c '.[]'"), "jsonl", "a.json", json.dumps([{"text": TEXT}])),
    case("a JSON list over lines", ("a.json:1", "jq"), "jsonl", "a.json", json.dumps([{"text": TEXT}], indent=1)),
    case("a JSON object over lines", ("a.json:1", "jq -c ."), "jsonl", "a.json", json.dumps({"text": TEXT}, indent=1)),
]
ENCODINGS = [
    case("Latin-1", ("a.txt:2", "0xe9", "iconv -f latin1"), "text", "a.txt", b"fine\ncaf\xe9 fine\n" * 9),
    case("Windows quotes", ("a.txt:1", "0x93", "iconv -f cp1252"), "text", "a.txt", b"\x93quoted\x94 words\n" * 9),
    case("UTF-16", ("a.txt", "UTF-16", "iconv -f utf-16 "), "text", "a.txt", TEXT.encode("utf-16")),
    case("UTF-16 without a mark", ("a.txt", "iconv -f utf-16le"), "text", "a.txt", TEXT.encode("utf-16-le")),
    case("UTF-16 of the other order", ("a.txt", "iconv -f utf-16be"), "text", "a.txt", TEXT.encode("utf-16-be")),
    case("UTF-32", ("a.txt", "iconv -f utf-32 "), "text", "a.txt", TEXT.encode("utf-32")),
    case("UTF-16 JSON Lines", ("a.jsonl", "iconv -f utf-16 "), "jsonl", "a.jsonl", LINES.encode("utf-16")),
    case("UTF-16 by chunks", ("a.jsonl", "iconv -f utf-16 "), "jsonl", "a.jsonl", LINES.encode("utf-16"), CHUNKS),
    case("cut inside a character", ("a.txt", "cut off"), "text", "a.txt", ("words " * 9 + "é").encode()[:-1]),
    case(
        "one bad byte in UTF-8",
        ("a.txt:1", "iconv -f utf-8 -t utf-8 -c"),
        "text",
        "a.txt",
        "日本".encode() + b" \xff ab",
    ),
    case("Latin-1 in JSON Lines", ("a.jsonl:2", "0xe9"), "jsonl", "a.jsonl", b'{"text": "a"}\n{"text": "caf\xe9"}\n'),
    case("Latin-1 in gzip", ("a.txt.gz:1", "iconv -f latin1"), "text", "a.txt.gz", gzip.compress(b"caf\xe9\n")),
    case("Latin-1 by chunks", ("a.jsonl:1", "0xe9"), "jsonl", "a.jsonl", b'{"text": "caf\xe9"}\n' * 50, CHUNKS),
]
DAMAGED = [
    case("gzip cut off", ("a.jsonl.gz", "damaged or cut off"), "jsonl", "a.jsonl.gz", gzip.compress(PACKED)[:-9]),
    case("gzip of a wrong sum", ("a.jsonl.gz", "damaged"), "jsonl", "a.jsonl.gz", flipped(gzip.compress(PACKED))),
    case("gzip with garbage behind", ("a.txt.gz", "damaged"), "text", "a.txt.gz", gzip.compress(PACKED) + b"garbage"),
    case("bzip2 cut off", ("a.jsonl.bz2", "damaged"), "jsonl", "a.jsonl.bz2", bz2.compress(PACKED)[:-9]),
    case("bzip2 damaged", ("a.jsonl.bz2", "damaged"), "jsonl", "a.jsonl.bz2", flipped(bz2.compress(PACKED))),
    case("xz cut off", ("a.jsonl.xz", "damaged"), "jsonl", "a.jsonl.xz", lzma.compress(PACKED)[:-9]),
    case("xz damaged", ("a.jsonl.xz", "damaged"), "jsonl", "a.jsonl.xz", flipped(lzma.compress(PACKED))),
    case("zstd cut off", ("a.jsonl.zst", "damaged"), "jsonl", "a.jsonl.zst", zstd(PACKED)[:-9]),
    case("zstd damaged", ("a.jsonl.zst", "damaged"), "jsonl", "a.jsonl.zst", flipped(zstd(PACKED))),
    case(
        "gzip cut off by chunks",
        ("a.jsonl.gz", "damaged"),
        "jsonl",
        "a.jsonl.gz",
        gzip.compress(PACKED)[:-9],
        CHUNKS + ", cache_folder: cache",
    ),
    case("no gzip", ("a.txt.gz", "not compressed", "rename it to a.txt"), "text", "a.txt.gz", TEXT),
    case("no zstd", ("a.jsonl.zst", "not compressed"), "jsonl", "a.jsonl.zst", LINES),
    case("packed twice", ("a.txt.gz", "twice"), "text", "a.txt.gz", gzip.compress(gzip.compress(TEXT.encode()))),
    case("an empty text", ("a.txt is empty",), "text", "a.txt", ""),
    case("a blank text", ("a.txt is empty",), "text", "a.txt", "\n \n\t\n"),
    case("an empty JSON Lines file", ("a.jsonl is empty",), "jsonl", "a.jsonl", ""),
    case("blank lines by chunks", ("a.jsonl is empty",), "jsonl", "a.jsonl", "\n\n\n", CHUNKS),
    case("an empty gzip", ("a.jsonl.gz is empty",), "jsonl", "a.jsonl.gz", gzip.compress(b"")),
    case("nothing called gzip", ("a.txt.gz is empty",), "text", "a.txt.gz", b""),
    case("only a byte-order mark", ("a.txt is empty",), "text", "a.txt", b"\xef\xbb\xbf"),
    BadInput(
        "Parquet cut off", CHECK, ("a.parquet", "damaged"), parquet({"text": [TEXT] * 9}, lambda c: c[: len(c) // 2])
    ),
    BadInput("an empty Parquet file", CHECK, ("a.parquet", "damaged"), parquet({"text": [TEXT]}, lambda c: b"")),
    BadInput(
        "a Parquet footer of zeros",
        CHECK,
        ("a.parquet", "damaged"),
        parquet({"text": [TEXT]}, lambda c: c[:-40] + bytes(40)),
    ),
    BadInput(
        "Parquet without its start",
        CHECK,
        ("a.parquet",),
        parquet({"text": [TEXT] * 9}, lambda c: bytes(300) + c[300:]),
    ),
    BadInput("gzip around Parquet", CHECK, ("a.parquet", "gzip"), parquet({"text": [TEXT]}, gzip.compress)),
]
JSON_LINES = [
    case(
        "a broken line",
        ("a.jsonl:2", "not JSON", "repair or remove"),
        "jsonl",
        "a.jsonl",
        '{"text": "a"}\n{"text": "b\n',
    ),
    case("a broken line by chunks", ("a.jsonl:31", "not JSON"), "jsonl", "a.jsonl", LINES + '{"text": "b\n', CHUNKS),
    case("a wrong key", ("a.jsonl:1", "['content']", "data.text_column"), "jsonl", "a.jsonl", '{"content": "a"}\n'),
    case("a key of other case", ("a.jsonl:1", "['Text']", "data.text_column"), "jsonl", "a.jsonl", '{"Text": "a"}\n'),
    case(
        "no such text_column", ("a.jsonl:1", "'id', 'text'", '"body"'), "jsonl", "a.jsonl", LINES, ", text_column: body"
    ),
    case("a text that is a number", ("a.jsonl:1", "int"), "jsonl", "a.jsonl", '{"text": 3}\n'),
    case("a text that is null", ("a.jsonl:1", "NoneType"), "jsonl", "a.jsonl", '{"text": null}\n'),
    case("a text that is a list", ("a.jsonl:1", "list"), "jsonl", "a.jsonl", '{"text": ["a", "b"]}\n'),
    case("chat messages", ("a.jsonl:1", "['messages']"), "jsonl", "a.jsonl", '{"messages": [{"role": "user"}]}\n'),
    case("lines of numbers", ("a.jsonl:1", "int"), "jsonl", "a.jsonl", "1\n2\n"),
    case("lines of strings", ("a.jsonl:1", "str"), "jsonl", "a.jsonl", '"a"\n"b"\n'),
    case("half of a surrogate", ("a.jsonl:1", "surrogate"), "jsonl", "a.jsonl", '{"text": "\\ud800"}\n'),
    case("half of a surrogate in an id", ("a.jsonl:1", '"id"'), "jsonl", "a.jsonl", '{"text": "a", "id": "\\udfff"}\n'),
    case("a deep line", ("a.jsonl:1", "repair or remove"), "jsonl", "a.jsonl", "[" * 100_000),
    case(
        "a number of 5,000 digits",
        ("a.jsonl:1", "repair or remove"),
        "jsonl",
        "a.jsonl",
        '{"text": ' + "9" * 5000 + "}",
    ),
    case(
        "ten thousand keys",
        ("a.jsonl:1", "9,988 more"),
        "jsonl",
        "a.jsonl",
        json.dumps(dict.fromkeys(map(str, range(10_000)))),
    ),
    case("a key of a megabyte", ("a.jsonl:1", "..."), "jsonl", "a.jsonl", json.dumps({"k" * 2**20: 1})),
    case("keys with escape sequences", ("a.jsonl:1", "x1b"), "jsonl", "a.jsonl", '{"\\u001b[2J": 1}\n'),
    case("single quotes", ("a.jsonl:1", "not JSON"), "jsonl", "a.jsonl", "{'text': 'a'}\n"),
    case("a comma behind each line", ("a.jsonl:1", "not JSON"), "jsonl", "a.jsonl", '{"text": "a"},\n{"text": "b"}\n'),
    case("texts that are empty", ("0 rows",), "jsonl", "a.jsonl", '{"text": ""}\n' * 40, ", heldout: 0"),
]
COLUMNS = [
    BadInput(
        "no text column",
        CHECK,
        ("a.parquet", "['content', 'n']", "data.text_column"),
        parquet({"content": ["a"], "n": [1]}),
    ),
    BadInput(
        "no such column of Parquet",
        CHECK,
        ('"body"', "['text']"),
        parquet({"text": ["a"]}, extra=", text_column: body"),
    ),
    BadInput("a column of numbers", CHECK, ("a.parquet", "int64", "data.text_column"), parquet({"text": [1, 2]})),
    BadInput("a column of lists", CHECK, ("a.parquet", "list<"), parquet({"text": [["a"], ["b"]]})),
    BadInput("a row without text", CHECK, ("a.parquet, row 2",), parquet({"text": ["a", None]})),
    BadInput("bytes that are no text", CHECK, ("a.parquet", "row group 0"), parquet({"text": [b"caf\xe9"]})),
    BadInput("no rows", CHECK, ("a.parquet has no rows",), parquet({"text": pyarrow.array([], pyarrow.string())})),
    BadInput(
        "a column given twice",
        CHECK,
        ('several columns "text"',),
        parquet(pyarrow.Table.from_arrays([pyarrow.array(["a"])] * 2, names=["text", "text"])),
    ),
    BadInput("a thousand columns", CHECK, ("988 more",), parquet({f"c{n}": [n] for n in range(1000)})),
    BadInput("an empty text_column", CHECK, ("data.text_column",), of("jsonl", "a.jsonl", LINES, ', text_column: ""')),
    BadInput(
        "a text_column of a number", CHECK, ("data.text_column",), of("jsonl", "a.jsonl", LINES, ", text_column: 3")
    ),
]
CASES = [*KINDS, *ENCODINGS, *DAMAGED, *JSON_LINES, *COLUMNS]
