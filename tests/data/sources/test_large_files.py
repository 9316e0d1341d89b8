"""Parquet and JSON Lines files: the same documents in memory and by chunks, and errors that name where they are."""

from __future__ import annotations

from pathlib import Path

import pyarrow
import pyarrow.parquet
import pytest

from corpus_files import NAMES, TEXTS, write_jsonl, write_parquet
from nsa.data import DataConfig, DataError, open_source
from nsa.data.sources import jsonl, parquet

WRITERS = {"parquet": write_parquet, "jsonl": write_jsonl}


@pytest.fixture(autouse=True)
def small_chunks(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(jsonl, "CHUNK_BYTES", 200)


def opened(source: str, *paths: Path, in_memory: bool = False):
    mib = 256 if in_memory else 0
    return open_source(DataConfig(source=source, paths=tuple(map(str, paths)), in_memory_mib=mib))


def documents(source) -> dict[str, str]:
    return {document.name: document.text for document in source}


@pytest.mark.parametrize("source", WRITERS)
@pytest.mark.parametrize("in_memory", [False, True])
def test_documents_come_back_with_names_from_ids_or_places(source: str, in_memory: bool, tmp_path: Path) -> None:
    WRITERS[source](tmp_path / f"a.{source}", TEXTS, NAMES)
    WRITERS[source](tmp_path / f"b.{source}", TEXTS[:12], None)
    found = opened(source, tmp_path, in_memory=in_memory)
    assert found.in_memory == in_memory
    by_place = {f"b.{source}:{place}": text for place, text in enumerate(TEXTS[:12], start=1)}
    assert documents(found) == dict(zip(NAMES, TEXTS, strict=True)) | by_place
    assert [(file.name, file.num_documents, file.size_bytes) for file in found.files] == [
        (f"{name}.{source}", count, (tmp_path / f"{name}.{source}").stat().st_size)
        for name, count in (("a", 57), ("b", 12))
    ]


@pytest.mark.parametrize("source", WRITERS)
def test_chunks_hold_the_documents_in_order_without_gaps(source: str, tmp_path: Path) -> None:
    found = opened(source, WRITERS[source](tmp_path / "a", TEXTS, NAMES))
    assert found.num_chunks > 3
    names: list[str] = []
    for chunk in range(found.num_chunks):
        documents = found.read(chunk)
        assert [document.number for document in documents] == list(range(len(names), len(names) + len(documents)))
        assert [document.name for document in documents] == list(found.read_names(chunk))
        assert {found.chunk_of(document.number) for document in documents} == {chunk}
        names += [document.name for document in documents]
    assert names == NAMES
    with pytest.raises(IndexError, match="document 57 is not among the 57"):
        found[57]


def test_blank_lines_are_counted_but_are_no_documents(tmp_path: Path) -> None:
    path = tmp_path / "a.jsonl"
    path.write_text('\n{"text": "one"}\n \r\n\n{"text": "two"}\n' + "\n" * 300 + '{"text": "three"}', encoding="utf-8")
    expected = {"a.jsonl:2": "one", "a.jsonl:5": "two", "a.jsonl:306": "three"}
    assert documents(opened("jsonl", path)) == documents(opened("jsonl", path, in_memory=True)) == expected


@pytest.mark.parametrize("source", WRITERS)
def test_the_fingerprint_is_of_the_contents(source: str, tmp_path: Path) -> None:
    paths = [tmp_path / name for name in ("one", "two", "three")]
    for path in paths:
        path.mkdir()
    same = [opened(source, WRITERS[source](path / "a", TEXTS, NAMES)).fingerprint for path in paths[:2]]
    other = opened(source, WRITERS[source](paths[2] / "a", [*TEXTS[:-1], TEXTS[-1] + "."], NAMES)).fingerprint
    assert same[0] == same[1] != other


def test_the_fingerprint_of_parquet_files_of_one_size_is_of_their_row_groups(tmp_path: Path) -> None:
    path = tmp_path / "a.parquet"
    fingerprints, sizes_bytes = set(), set()
    for first, last in [("one", "seven"), ("seven", "one"), ("seven", "two")]:
        pyarrow.parquet.write_table(
            pyarrow.table({"text": [first, last]}), path, row_group_size=1, compression="NONE", use_dictionary=False
        )
        fingerprints.add(opened("parquet", path).fingerprint)
        sizes_bytes.add(path.stat().st_size)
    assert len(fingerprints) == 3
    assert len(sizes_bytes) == 1


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
    source = opened("jsonl", path)
    assert source[0].text == TEXTS[0]
    with pytest.raises(DataError, match=message):
        source[30]


def test_bytes_that_are_no_text_are_named_with_their_line(tmp_path: Path) -> None:
    path = write_jsonl(tmp_path / "a.jsonl", TEXTS)
    path.write_bytes(path.read_bytes() + b'{"text": "caf\xe9"}\n')
    with pytest.raises(DataError, match=r"a\.jsonl:58 is not UTF-8 \(byte 0xe9.*iconv"):
        opened("jsonl", path)[57]


def test_a_file_that_changes_during_the_run_is_named(tmp_path: Path) -> None:
    path = write_jsonl(tmp_path / "a.jsonl", TEXTS)
    source = opened("jsonl", path)
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


@pytest.mark.parametrize("in_memory", [False, True])
@pytest.mark.parametrize(
    ("damage", "message"),
    [
        (lambda content: content[: len(content) // 2], "is damaged, cut off or no Parquet.*download it again"),
        (lambda content: b"", "is damaged, cut off or no Parquet"),
        (lambda content: b"text" * 100, "is damaged, cut off or no Parquet"),
        (
            lambda content: content[:60] + bytes(40) + content[100:],
            r"a\.parquet, row group 0 \(rows from 1\) is damaged",
        ),
    ],
)
def test_a_damaged_parquet_file_is_named(damage, message: str, in_memory: bool, tmp_path: Path) -> None:
    path = write_parquet(tmp_path / "a.parquet", TEXTS, NAMES)
    path.write_bytes(damage(path.read_bytes()))
    with pytest.raises(DataError, match=message):
        documents(opened("parquet", path, in_memory=in_memory))


def test_a_changed_letter_in_a_parquet_file_is_an_error_where_its_pages_have_checksums(tmp_path: Path) -> None:
    path = write_parquet(tmp_path / "a.parquet", TEXTS, NAMES)
    content = path.read_bytes()
    assert b"text 0" in content
    path.write_bytes(content.replace(b"text 0", b"next 0", 1))
    with pytest.raises(DataError, match=r"a\.parquet, row group 0 \(rows from 1\) is damaged"):
        opened("parquet", path)[0]


def test_a_row_without_text_is_named(tmp_path: Path) -> None:
    source = opened("parquet", write_parquet(tmp_path / "a.parquet", [*TEXTS[:23], None, *TEXTS[24:]], NAMES))
    assert source[19].text == TEXTS[19]
    with pytest.raises(DataError, match=r"a\.parquet, row 24 \(row group 2\) has no text"):
        source[20]


def test_a_parquet_file_without_text_or_rows_is_refused(tmp_path: Path) -> None:
    path = tmp_path / "a.parquet"
    pyarrow.parquet.write_table(pyarrow.table({"content": ["a"], "id": ["b"]}), path)
    with pytest.raises(DataError, match=r"must have a column \"text\" of strings, but has \['content', 'id'\]"):
        opened("parquet", path)
    pyarrow.parquet.write_table(pyarrow.table({"text": [1, 2]}), path)
    with pytest.raises(DataError, match=r"has \['text'\] with text of int64; set data\.text_column"):
        opened("parquet", path)
    with pytest.raises(DataError, match=r"a\.parquet has no rows"):
        opened("parquet", write_parquet(path, [], None))


def test_a_column_that_is_there_twice_is_named(tmp_path: Path) -> None:
    path = tmp_path / "a.parquet"
    for names in (["text", "text", "id"], ["text", "id", "id"]):
        columns = [pyarrow.array(["a"]) for _ in names]
        pyarrow.parquet.write_table(pyarrow.Table.from_arrays(columns, names=names), path)
        with pytest.raises(DataError, match=rf'a\.parquet has several columns "{names[1]}"; rename all but one'):
            opened("parquet", path)


def test_a_parquet_file_that_may_not_be_read_is_not_called_damaged(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def closed(place: object) -> None:
        raise PermissionError(f"Failed to open {place}")

    monkeypatch.setattr(parquet, "_open", closed)  # root may read everything
    with pytest.raises(DataError, match=r"a\.parquet may not be read; give this user the right"):
        opened("parquet", write_parquet(tmp_path / "a.parquet", TEXTS, NAMES))


def test_a_parquet_file_that_vanishes_is_named(tmp_path: Path) -> None:
    source = opened("parquet", write_parquet(tmp_path / "a.parquet", TEXTS, NAMES))
    (tmp_path / "a.parquet").unlink()
    assert source[56].text == TEXTS[56], "an open file can be read on"
    source._opened.clear()
    with pytest.raises(DataError, match=r"a\.parquet is not there any more"):
        source[0]


def test_only_a_few_chunks_stay_in_memory(tmp_path: Path) -> None:
    source = opened("parquet", write_parquet(tmp_path / "a.parquet", TEXTS, NAMES))
    assert [document.text for document in source] == TEXTS
    assert len(source._kept) == 4
