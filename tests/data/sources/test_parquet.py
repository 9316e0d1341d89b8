"""Parquet files: names and texts of any kind of column, and errors that name file, row group and row."""

from __future__ import annotations

import os
from pathlib import Path

import pyarrow
import pyarrow.parquet
import pytest

from corpus_files import NAMES, TEXTS, change, write_parquet, write_plain_parquet
from nsa.data import DataConfig, DataError, Source, open_source
from nsa.data.sources import parquet


def opened(path: Path, *, in_memory: bool = False, **options: str) -> Source:
    mib = 256 if in_memory else 0
    return open_source(DataConfig(source="parquet", paths=(str(path),), in_memory_mib=mib, **options))


def documents(source) -> dict[str, str]:
    return {document.name: document.text for document in source}


def test_the_fingerprint_of_parquet_files_of_one_size_is_of_their_row_groups(tmp_path: Path) -> None:
    path = tmp_path / "a.parquet"
    fingerprints, sizes_bytes = set(), set()
    for first, last in [("one", "seven"), ("seven", "one"), ("seven", "two")]:
        pyarrow.parquet.write_table(
            pyarrow.table({"text": [first, last]}), path, row_group_size=1, compression="NONE", use_dictionary=False
        )
        fingerprints.add(opened(path).fingerprint)
        sizes_bytes.add(path.stat().st_size)
    assert len(fingerprints) == 3
    assert len(sizes_bytes) == 1


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
        documents(opened(path, in_memory=in_memory))


def test_a_changed_letter_in_a_parquet_file_is_an_error_where_its_pages_have_checksums(tmp_path: Path) -> None:
    path = write_parquet(tmp_path / "a.parquet", TEXTS, NAMES)
    content = path.read_bytes()
    assert b"text 0" in content
    path.write_bytes(content.replace(b"text 0", b"next 0", 1))
    with pytest.raises(DataError, match=r"a\.parquet, row group 0 \(rows from 1\) is damaged"):
        opened(path)[0]


def test_a_row_without_text_is_named(tmp_path: Path) -> None:
    source = opened(write_parquet(tmp_path / "a.parquet", [*TEXTS[:23], None, *TEXTS[24:]], NAMES))
    assert source[19].text == TEXTS[19]
    with pytest.raises(DataError, match=r"a\.parquet, row 24 \(row group 2\) has no text"):
        source[20]


def test_a_parquet_file_without_text_or_rows_is_refused(tmp_path: Path) -> None:
    path = tmp_path / "a.parquet"
    pyarrow.parquet.write_table(pyarrow.table({"content": ["a"], "id": ["b"]}), path)
    with pytest.raises(DataError, match=r"must have a column \"text\" of strings, but has \['content', 'id'\]"):
        opened(path)
    pyarrow.parquet.write_table(pyarrow.table({"text": [1, 2]}), path)
    with pytest.raises(DataError, match=r"has \['text'\] with text of int64; set data\.text_column"):
        opened(path)
    with pytest.raises(DataError, match=r"a\.parquet has no rows"):
        opened(write_parquet(path, [], None))


def test_a_column_that_is_there_twice_is_named(tmp_path: Path) -> None:
    path = tmp_path / "a.parquet"
    for names in (["text", "text", "id"], ["text", "id", "id"]):
        columns = [pyarrow.array(["a"]) for _ in names]
        pyarrow.parquet.write_table(pyarrow.Table.from_arrays(columns, names=names), path)
        with pytest.raises(DataError, match=rf'a\.parquet has several columns "{names[1]}"; rename all but one'):
            opened(path)


def test_a_parquet_file_that_may_not_be_read_is_not_called_damaged(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def closed(place: object) -> None:
        raise PermissionError(f"Failed to open {place}")

    monkeypatch.setattr(parquet, "_open", closed)  # root may read everything
    with pytest.raises(DataError, match=r"a\.parquet may not be read; give this user the right"):
        opened(write_parquet(tmp_path / "a.parquet", TEXTS, NAMES))


def test_a_parquet_file_that_vanishes_is_named(tmp_path: Path) -> None:
    source = opened(write_parquet(tmp_path / "a.parquet", TEXTS, NAMES))
    (tmp_path / "a.parquet").unlink()
    assert source[56].text == TEXTS[56], "an open file can be read on"
    source._opened.clear()
    with pytest.raises(DataError, match=r"a\.parquet is not there any more"):
        source[0]


def test_a_name_that_changes_is_seen_too(tmp_path: Path) -> None:
    path = write_plain_parquet(tmp_path / "a.parquet")
    source = opened(path)
    change(path, b"uuid:41>", b"uuid:99>", replace=False, keep_times=True)
    with pytest.raises(DataError, match="has changed since"):
        source.read_names(source.chunk_of(41))


def test_a_parquet_file_that_is_touched_or_copied_back_is_read_on(tmp_path: Path) -> None:
    path = write_plain_parquet(tmp_path / "a.parquet")
    source = opened(path)
    content = path.read_bytes()
    path.unlink()
    path.write_bytes(content)
    os.utime(path)
    assert [document.text for document in source] == TEXTS


def test_other_types_of_strings_are_read(tmp_path: Path) -> None:
    path = tmp_path / "a.parquet"
    plain = pyarrow.array(TEXTS)
    for kind in (
        pyarrow.large_string(),
        pyarrow.string_view(),
        pyarrow.binary(),
        pyarrow.large_binary(),
        pyarrow.dictionary(pyarrow.int32(), pyarrow.string()),
    ):
        column = plain.dictionary_encode() if pyarrow.types.is_dictionary(kind) else plain.cast(kind)
        pyarrow.parquet.write_table(pyarrow.table({"body": column, "id": column}), path, row_group_size=10)
        source = opened(path, text_column="body")
        assert [document.text for document in source] == TEXTS, kind
        assert source[3].name == TEXTS[3]
    with pytest.raises(DataError, match=r"column \"text\" of strings, but has \['body', 'id'\]; set data\.text_column"):
        opened(path)


def test_a_nested_column_of_the_same_name_is_another(tmp_path: Path) -> None:
    path = tmp_path / "a.parquet"
    table = pyarrow.table({"meta": [{"text": 1}] * 57, "text": TEXTS})
    pyarrow.parquet.write_table(table, path, row_group_size=10, compression="NONE", use_dictionary=False)
    source = opened(path)
    assert source[5].text == TEXTS[5]
    change(path, b"text 41 ", b"test 41 ", replace=False, keep_times=True)
    with pytest.raises(DataError, match="has changed"):
        source[41]


def test_a_file_in_memory_names_its_documents_as_by_chunks(tmp_path: Path) -> None:
    path = write_parquet(tmp_path / "a.parquet", TEXTS, None)
    chunks, memory = opened(path), opened(path, in_memory=True)
    assert [document.name for document in chunks] == [document.name for document in memory]
    assert chunks.files == memory.files
