"""Documents have stable names, their bytes are kept, and malformed files are errors with file and line."""

from __future__ import annotations

import doctest
import importlib
from pathlib import Path

import pytest

import nsa.data
from corpus_files import read
from nsa.data import DataConfig, DataError, open_source


def test_the_embedded_corpus_is_complete_and_named_by_year_and_president() -> None:
    source = open_source(DataConfig())
    names = [document.name for document in source]
    assert len(set(names)) == len(names) == 249
    assert names[:3] == ["1790 George Washington", "1790 George Washington (2)", "1791 George Washington"]
    assert "1973 Richard Nixon (11)" in names
    assert sum(len(document.text.encode()) for document in source) == 12_185_751
    assert source.fingerprint == open_source(DataConfig()).fingerprint


def test_a_file_is_a_document_with_its_bytes_as_they_are(tmp_path: Path) -> None:
    (tmp_path / "b").mkdir()
    (tmp_path / "a.txt").write_bytes("Zürich\r\n\r\nzwei\n".encode())
    (tmp_path / "b" / "c.txt").write_bytes(b"c")
    (tmp_path / "notes.md").write_bytes(b"*notes*")
    (tmp_path / "table.csv").write_bytes(b"1,2")
    assert read("text", tmp_path) == {"a.txt": "Zürich\r\n\r\nzwei\n", "b/c.txt": "c", "notes.md": "*notes*"}
    assert list(read("text", tmp_path / "b" / "c.txt", tmp_path / "a.txt")) == ["c.txt", "a.txt"]
    assert list(read("text", tmp_path / "**" / "*.txt")) == ["a.txt", "c.txt"]


def test_paragraphs_are_named_by_their_line(tmp_path: Path) -> None:
    (tmp_path / "a.txt").write_bytes(b"\none\r\ntwo\n\n\nthree\r\n \t\r\n\r\nfour\n")
    paragraphs = read("text", tmp_path / "a.txt", text_split="paragraphs")
    assert paragraphs == {"a.txt:2": "one\r\ntwo", "a.txt:6": "three", "a.txt:9": "four"}


def test_the_fingerprint_changes_with_any_name_or_text(tmp_path: Path) -> None:
    fingerprints = set()
    for name, content in [("a", "xy"), ("a", "xz"), ("b", "xy"), ("ax", "y")]:
        path = tmp_path / name
        path.write_text(content, encoding="utf-8")
        fingerprints.add(open_source(DataConfig(source="text", paths=(str(path),))).fingerprint)
    assert len(fingerprints) == 4


@pytest.mark.parametrize(
    ("source", "content", "message"),
    [
        ("text", b"", r"bad\.x is empty; remove it"),
        ("text", b" \n\n", r"bad\.x is empty"),
        ("text", b"fine\nfine\n caf\xe9\n", r"bad\.x:3 is not UTF-8 \(byte 0xe9 at offset 14\).*iconv"),
        ("jsonl", b"", r"bad\.x is empty"),
        ("jsonl", b'{"text": "a"}\n{"text": "caf\xe9"}\n', r"bad\.x:2 is not UTF-8"),
        ("jsonl", b'{"text": "a"}\n{"text": "b"\n', r"bad\.x:2 is not JSON .*repair or remove"),
        (
            "jsonl",
            b'{"text": "a"}\n\n{"body": "b", "id": 1}\n',
            r"bad\.x:3 has the keys \['body', 'id'\] but",
        ),
        ("jsonl", b'["text"]\n', r"bad\.x:1 has a list but"),
        ("jsonl", b'{"text": null}\n', r'bad\.x:1: "text" is a NoneType, not a string'),
        ("jsonl", b'{"text": "\\ud800"}\n', r"bad\.x:1: \"text\" has half of a surrogate"),
        ("jsonl", b'{"text": "a", "id": "\\ud800"}\n', r"bad\.x:1: \"id\" has half of a surrogate"),
        (
            "jsonl",
            b'{"text": "a"}\n{"text": "b", "n": ' + b"9" * 5000 + b"}\n",
            r"bad\.x:2 is JSON that Python does not",
        ),
        ("jsonl", b"[" * 100_000, r"bad\.x:1 is JSON that Python does not read"),
    ],
)
def test_malformed_files_are_named_with_line_and_remedy(
    tmp_path: Path, source: str, content: bytes, message: str
) -> None:
    path = tmp_path / "bad.x"
    path.write_bytes(content)
    with pytest.raises(DataError, match=message):
        read(source, path)


@pytest.mark.parametrize("module", ["config", "heldout", "sources.base", "sources.open", "stream.loader", "tokenizers"])
def test_the_examples_in_the_docstrings_are_true(module: str) -> None:
    names = {name: getattr(nsa.data, name) for name in nsa.data.__all__}
    failed, attempted = doctest.testmod(importlib.import_module(f"nsa.data.{module}"), extraglobs=names)
    assert attempted
    assert not failed
