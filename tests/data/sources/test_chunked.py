"""Files by chunks: the documents that they have in memory, and an error if one changes under a run."""

from __future__ import annotations

from pathlib import Path

import pytest

from corpus_files import NAMES, TEXTS, change, write_jsonl, write_parquet, write_plain_parquet
from nsa.data import DataConfig, DataError, build_train_loader, open_source
from nsa.data.sources import jsonl
from nsa.data.tokenizers import ByteTokenizer

SIZES = {"tokenizer": ByteTokenizer(), "sequence_length": 16, "rows_per_batch": 2, "seed": 0}


@pytest.fixture(autouse=True)
def small_chunks(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(jsonl, "CHUNK_BYTES", 200)


def config(path: Path, **options) -> DataConfig:
    return DataConfig(source=path.suffix[1:], paths=(str(path),), in_memory_mib=0, heldout=0, **options)


@pytest.mark.parametrize("replace", [False, True])
@pytest.mark.parametrize("keep_times", [False, True])
@pytest.mark.parametrize("suffix", ["jsonl", "parquet"])
def test_one_letter_of_a_file_of_the_same_size_is_seen_while_it_is_read(
    suffix: str, keep_times: bool, replace: bool, tmp_path: Path
) -> None:
    path = tmp_path / f"a.{suffix}"
    source = open_source(config(write_jsonl(path, TEXTS) if suffix == "jsonl" else write_plain_parquet(path)))
    assert source[0].text == TEXTS[0]
    change(path, b"text 41 ", b"test 41 ", replace=replace, keep_times=keep_times)
    assert source[10].text == TEXTS[10], "other chunks are as they were"
    with pytest.raises(DataError, match=rf"a\.{suffix}.* has changed since the run began; put the file back"):
        source[41]


@pytest.mark.parametrize("suffix", ["jsonl", "parquet"])
def test_a_resumed_stream_names_the_file_that_has_changed(suffix: str, tmp_path: Path) -> None:
    paths = [tmp_path / "one", tmp_path / "two"]
    for folder in paths:
        folder.mkdir()
        path = folder / f"{folder.name}.{suffix}"
        write_jsonl(path, TEXTS) if suffix == "jsonl" else write_plain_parquet(path)
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


WRITERS = {"parquet": write_parquet, "jsonl": write_jsonl}


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


@pytest.mark.parametrize("source", WRITERS)
def test_the_fingerprint_is_of_the_contents(source: str, tmp_path: Path) -> None:
    paths = [tmp_path / name for name in ("one", "two", "three")]
    for path in paths:
        path.mkdir()
    same = [opened(source, WRITERS[source](path / "a", TEXTS, NAMES)).fingerprint for path in paths[:2]]
    other = opened(source, WRITERS[source](paths[2] / "a", [*TEXTS[:-1], TEXTS[-1] + "."], NAMES)).fingerprint
    assert same[0] == same[1] != other


def test_only_a_few_chunks_stay_in_memory(tmp_path: Path) -> None:
    source = opened("parquet", write_parquet(tmp_path / "a.parquet", TEXTS, NAMES))
    assert [document.text for document in source] == TEXTS
    assert len(source._kept) == 4
