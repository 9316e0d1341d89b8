"""JSON Lines: names from ids or lines, whole or by chunks, and errors that name the line."""

from __future__ import annotations

import gzip
import json
from pathlib import Path

import pytest

from corpus_files import NAMES, TEXTS, read, write_jsonl
from nsa.data import DataConfig, DataError, Source, open_corpus, open_source
from nsa.data.sources import jsonl


@pytest.fixture(autouse=True)
def small_chunks(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(jsonl, "CHUNK_BYTES", 200)


def config(path: Path, **options) -> DataConfig:
    return DataConfig(
        **{"source": "jsonl", "paths": (str(path),), "cache_folder": str(path.parent / "cache"), **options}
    )


def opened(path: Path, *, in_memory: bool = False) -> Source:
    return open_source(config(path, in_memory_mib=256 if in_memory else 0))


def documents(source) -> dict[str, str]:
    return {document.name: document.text for document in source}


def test_json_lines_are_named_by_id_or_line(tmp_path: Path) -> None:
    lines = ['{"text": "one\u2028line"}', "", '{"text": "", "id": "empty", "x": 1}', '{"id": 7, "text": "seven"}']
    (tmp_path / "a.jsonl").write_text("\n".join(lines) + "\n", encoding="utf-8")
    assert read("jsonl", tmp_path) == {"a.jsonl:1": "one\u2028line", "empty": "", "a.jsonl:4": "seven"}


def test_json_lines_written_by_json_come_back(tmp_path: Path) -> None:
    texts = ["plain", 'tab\t and "quotes"', "日本 🙂", "\u0000\u001f\n"]
    lines = [json.dumps({"text": text}, ensure_ascii=index % 2 == 0) for index, text in enumerate(texts)]
    (tmp_path / "a.jsonl").write_text("\n".join(lines), encoding="utf-8")
    assert list(read("jsonl", tmp_path).values()) == texts


def test_blank_lines_are_counted_but_are_no_documents(tmp_path: Path) -> None:
    path = tmp_path / "a.jsonl"
    path.write_text('\n{"text": "one"}\n \r\n\n{"text": "two"}\n' + "\n" * 300 + '{"text": "three"}', encoding="utf-8")
    expected = {"a.jsonl:2": "one", "a.jsonl:5": "two", "a.jsonl:306": "three"}
    assert documents(opened(path)) == documents(opened(path, in_memory=True)) == expected


@pytest.mark.parametrize(
    ("line", "message"),
    [
        ('{"text": "b"', r"a\.jsonl:31 is not JSON .* repair or remove the line"),
        ('{"body": "b"}', r"a\.jsonl:31 has the keys \['body'\] but must be an object"),
        ('{"text": 3}', r'a\.jsonl:31: "text" is a int, not a string'),
    ],
)
def test_a_malformed_line_of_a_large_file_is_named_when_it_is_read(line: str, message: str, tmp_path: Path) -> None:
    path = write_jsonl(tmp_path / "a.jsonl", TEXTS)
    lines = path.read_text(encoding="utf-8").split("\n")
    path.write_text("\n".join([*lines[:30], line, *lines[31:]]), encoding="utf-8")
    source = opened(path)
    assert source[0].text == TEXTS[0]
    with pytest.raises(DataError, match=message):
        source[30]


def test_bytes_that_are_no_text_are_named_with_their_line(tmp_path: Path) -> None:
    path = write_jsonl(tmp_path / "a.jsonl", TEXTS)
    path.write_bytes(path.read_bytes() + b'{"text": "caf\xe9"}\n')
    with pytest.raises(DataError, match=r"a\.jsonl:58 is not UTF-8 \(byte 0xe9.*iconv"):
        opened(path)[57]


def test_a_file_that_changes_during_the_run_is_named(tmp_path: Path) -> None:
    path = write_jsonl(tmp_path / "a.jsonl", TEXTS)
    source = opened(path)
    whole = path.read_bytes()
    path.write_bytes(whole[: len(whole) // 2])
    with pytest.raises(DataError, match=r"a\.jsonl:\d+ or soon after has become shorter.*put the file back"):
        source[56]
    first_line = whole.index(b"\n")
    path.write_bytes(b" " * first_line + whole[first_line:])
    with pytest.raises(DataError, match=r"a\.jsonl:1 or soon after has changed since the run began.*put the file back"):
        source[0]
    path.unlink()
    with pytest.raises(DataError, match=r"a\.jsonl cannot be read: No such file.*check that it is there"):
        source[0]


def test_a_line_without_end_is_refused(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(jsonl, "MAX_LINE_BYTES", 1000)
    path = write_jsonl(tmp_path / "a.jsonl", ["short", "long " * 300])
    with pytest.raises(DataError, match=r"a\.jsonl:2 is longer than 1,000 bytes"):
        open_source(config(path, in_memory_mib=0))


@pytest.mark.parametrize("in_memory_mib", [0, 256])
def test_the_text_may_be_in_another_field(in_memory_mib: int, tmp_path: Path) -> None:
    path = tmp_path / "a.jsonl"
    path.write_text('{"content": "one", "text": 3, "id": "first"}\n{"content": "two"}\n', encoding="utf-8")
    options = {"in_memory_mib": in_memory_mib, "heldout": 0}
    found = documents(open_source(config(path, text_column="content", **options)))
    assert found == {"first": "one", "a.jsonl:2": "two"}
    with pytest.raises(DataError, match=r"a\.jsonl:1 has the keys \['content', 'id', 'text'\].*data\.text_column"):
        documents(open_source(config(path, text_column="body", **options)))


def test_the_field_is_part_of_the_fingerprint(tmp_path: Path) -> None:
    path = tmp_path / "a.jsonl"
    path.write_text('{"text": "one", "other": "two"}\n', encoding="utf-8")
    digests = {
        open_corpus(config(path, text_column=column, in_memory_mib=mib, heldout=0)).source.fingerprint
        for column in ("text", "other")
        for mib in (0, 256)
    }
    assert len(digests) == 4


def test_names_keep_the_ids(tmp_path: Path) -> None:
    path = tmp_path / "a.jsonl.gz"
    path.write_bytes(gzip.compress(write_jsonl(tmp_path / "a.jsonl", TEXTS, NAMES).read_bytes()))
    assert list(documents(open_source(config(path, in_memory_mib=0)))) == NAMES
