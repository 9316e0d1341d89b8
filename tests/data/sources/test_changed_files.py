"""Files that change under a run, in place or by another file, keep no batch from being what it was or an error."""

from __future__ import annotations

import os
from pathlib import Path

import pyarrow
import pyarrow.parquet
import pytest

from corpus_files import NAMES, TEXTS, write_jsonl, write_parquet
from nsa.data import DataConfig, DataError, build_train_loader, open_source
from nsa.data.sources import jsonl
from nsa.data.tokenizers import ByteTokenizer

SIZES = {"tokenizer": ByteTokenizer(), "sequence_length": 16, "rows_per_batch": 2, "seed": 0}


@pytest.fixture(autouse=True)
def small_chunks(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(jsonl, "CHUNK_BYTES", 200)


def config(path: Path, **options) -> DataConfig:
    return DataConfig(source=path.suffix[1:], paths=(str(path),), in_memory_mib=0, heldout=0, **options)


def plain_parquet(path: Path) -> Path:
    """Texts as they are in the file, without checksums, so that a letter can be changed and nothing else."""
    table = pyarrow.table({"text": TEXTS, "id": NAMES})
    pyarrow.parquet.write_table(table, path, row_group_size=10, compression="NONE", use_dictionary=False)
    return path


def change(path: Path, old: bytes, new: bytes, *, replace: bool, keep_times: bool) -> None:
    status, content = path.stat(), path.read_bytes()
    assert content.count(old) == 1
    assert len(old) == len(new)
    target = path.with_name("other") if replace else path
    target.write_bytes(content.replace(old, new))
    if keep_times:
        os.utime(target, ns=(status.st_atime_ns, status.st_mtime_ns))
    target.replace(path)


@pytest.mark.parametrize("replace", [False, True])
@pytest.mark.parametrize("keep_times", [False, True])
@pytest.mark.parametrize("suffix", ["jsonl", "parquet"])
def test_one_letter_of_a_file_of_the_same_size_is_seen_while_it_is_read(
    suffix: str, keep_times: bool, replace: bool, tmp_path: Path
) -> None:
    path = tmp_path / f"a.{suffix}"
    source = open_source(config(write_jsonl(path, TEXTS) if suffix == "jsonl" else plain_parquet(path)))
    assert source[0].text == TEXTS[0]
    change(path, b"text 41 ", b"test 41 ", replace=replace, keep_times=keep_times)
    assert source[10].text == TEXTS[10], "other chunks are as they were"
    with pytest.raises(DataError, match=rf"a\.{suffix}.* has changed since the run began; put the file back"):
        source[41]


def test_a_name_that_changes_is_seen_too(tmp_path: Path) -> None:
    path = plain_parquet(tmp_path / "a.parquet")
    source = open_source(config(path))
    change(path, b"uuid:41>", b"uuid:99>", replace=False, keep_times=True)
    with pytest.raises(DataError, match="has changed since"):
        source.read_names(source.chunk_of(41))


def test_a_parquet_file_that_is_touched_or_copied_back_is_read_on(tmp_path: Path) -> None:
    path = plain_parquet(tmp_path / "a.parquet")
    source = open_source(config(path))
    content = path.read_bytes()
    path.unlink()
    path.write_bytes(content)
    os.utime(path)
    assert [document.text for document in source] == TEXTS


@pytest.mark.parametrize("suffix", ["jsonl", "parquet"])
def test_a_resumed_stream_names_the_file_that_has_changed(suffix: str, tmp_path: Path) -> None:
    paths = [tmp_path / "one", tmp_path / "two"]
    for folder in paths:
        folder.mkdir()
        path = folder / f"{folder.name}.{suffix}"
        write_jsonl(path, TEXTS) if suffix == "jsonl" else plain_parquet(path)
    both = DataConfig(source=suffix, paths=tuple(map(str, paths)), in_memory_mib=0, heldout=0)
    loader = build_train_loader(both, **SIZES)
    next(loader)
    state = loader.state_dict()
    change(path, b"text 41 ", b"test 41 ", replace=True, keep_times=True)
    with pytest.raises(ValueError, match=rf"the file two\.{suffix} has other contents; .*put them back as they were"):
        build_train_loader(both, **SIZES, start=state)
    one = both.model_copy(update={"paths": (str(paths[0]),)})
    with pytest.raises(ValueError, match=rf"the file two\.{suffix} is missing"):
        build_train_loader(one, **SIZES, start=state)


def test_a_resumed_stream_in_memory_names_the_file_and_the_setting(tmp_path: Path) -> None:
    path = tmp_path / "a.txt"
    path.write_text("word " * 400, encoding="utf-8")
    text = DataConfig(source="text", paths=(str(path),), heldout=0.1)
    state = build_train_loader(text, **SIZES).state_dict()
    with pytest.raises(ValueError, match="seed was 0 and is 1; documents"):
        build_train_loader(text, **SIZES | {"seed": 1}, start=state)
    with pytest.raises(ValueError, match="which of them are held out"):
        build_train_loader(text.model_copy(update={"heldout": 0.3}), **SIZES, start=state)
    path.write_text("Word " * 400, encoding="utf-8")
    with pytest.raises(ValueError, match=r"the file a\.txt has other contents"):
        build_train_loader(text, **SIZES, start=state)
    del state["data"]
    with pytest.raises(ValueError, match="must be the same to resume"):
        build_train_loader(text, **SIZES, start=state)


def test_a_thousand_files_do_not_fill_the_state(tmp_path: Path) -> None:
    for number in range(1001):
        (tmp_path / f"{number}.txt").write_text(f"text {number}", encoding="utf-8")
    loader = build_train_loader(DataConfig(source="text", paths=(str(tmp_path),)), **SIZES)
    assert loader.state_dict()["data"]["files"] == {}


def test_parquet_s_other_types_of_strings_are_read(tmp_path: Path) -> None:
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
        source = open_source(config(path, text_column="body"))
        assert [document.text for document in source] == TEXTS, kind
        assert source[3].name == TEXTS[3]
    with pytest.raises(DataError, match=r"column \"text\" of strings, but has \['body', 'id'\]; set data\.text_column"):
        open_source(config(path))


def test_a_nested_column_of_the_same_name_is_another(tmp_path: Path) -> None:
    path = tmp_path / "a.parquet"
    table = pyarrow.table({"meta": [{"text": 1}] * 57, "text": TEXTS})
    pyarrow.parquet.write_table(table, path, row_group_size=10, compression="NONE", use_dictionary=False)
    source = open_source(config(path))
    assert source[5].text == TEXTS[5]
    change(path, b"text 41 ", b"test 41 ", replace=False, keep_times=True)
    with pytest.raises(DataError, match="has changed"):
        source[41]


def test_parquet_in_memory_names_its_documents_as_by_chunks(tmp_path: Path) -> None:
    path = write_parquet(tmp_path / "a.parquet", TEXTS, None)
    chunks, memory = (open_source(config(path).model_copy(update={"in_memory_mib": mib})) for mib in (0, 256))
    assert [document.name for document in chunks] == [document.name for document in memory]
    assert chunks.files == memory.files
