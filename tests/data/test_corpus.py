"""A corpus is opened once, says what it is, and is replaced by drawn data only where that was asked for."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from corpus_files import NAMES, TEXTS, write_jsonl, write_parquet
from nsa.data import ByteTokenizer, DataConfig, DataError, build_eval_batches, build_train_loader, open_corpus
from nsa.data.heldout import name_hash

SIZES = {"tokenizer": ByteTokenizer(), "sequence_length": 32, "rows_per_batch": 2}


@pytest.fixture
def parquet(tmp_path: Path) -> DataConfig:
    path = write_parquet(tmp_path / "a.parquet", TEXTS, NAMES)
    return DataConfig(source="parquet", paths=(str(path),), in_memory_mib=0, heldout=0.2)


def test_the_index_of_a_local_file(parquet: DataConfig) -> None:
    index = open_corpus(parquet).index()
    assert json.loads(json.dumps(index)) == index
    path, (file,) = Path(parquet.paths[0]), index["files"]
    assert len(file.pop("digest")) == 32
    assert file == {"name": "a.parquet", "size_bytes": path.stat().st_size, "num_documents": 57, "sha256": None}
    assert (index["source"], index["num_documents"], index["replaced_because"]) == ("parquet", 57, None)
    assert index["held_out_rule"] == "a fraction of 0.2, by BLAKE2b of the name"
    assert index["fingerprint"] == open_corpus(parquet).index()["fingerprint"]
    assert str(path) in index["description"]


def test_evaluation_finds_the_documents_that_training_leaves_out(parquet: DataConfig) -> None:
    held = {index for index, name in enumerate(NAMES) if name_hash(name) < 0.2}
    corpus = open_corpus(parquet)
    batches = build_eval_batches(parquet, **SIZES, corpus=corpus)
    assert batches.document_names == tuple(NAMES[index] for index in sorted(held))
    assert batches.num_bytes == sum(len(TEXTS[index].encode()) - 1 for index in held)
    loader = build_train_loader(parquet, **SIZES, seed=0, corpus=corpus)
    seen: set[int] = set()
    while loader.epoch == 0:
        seen |= set(next(loader).document_ids.unique().tolist())
    seen |= {document for document, _, _ in loader.state_dict()["carry"]}
    assert seen == set(range(57)) - held


def test_evaluation_reads_no_more_chunks_than_it_needs(parquet: DataConfig, monkeypatch: pytest.MonkeyPatch) -> None:
    read: list[int] = []
    corpus = open_corpus(parquet.model_copy(update={"max_eval_tokens": 20}))
    whole = type(corpus.source).read
    monkeypatch.setattr(type(corpus.source), "read", lambda self, chunk: read.append(chunk) or whole(self, chunk))
    first = build_eval_batches(corpus.config, **SIZES, corpus=corpus)
    assert len(read) < 4 < corpus.source.num_chunks
    again = build_eval_batches(corpus.config, **SIZES, corpus=open_corpus(corpus.config))
    assert first.document_names == again.document_names
    assert first.num_labels == again.num_labels == 32


def test_names_and_patterns_are_looked_for_in_all_chunks(parquet: DataConfig) -> None:
    config = parquet.model_copy(update={"heldout": (NAMES[50], "<urn:uuid:1?>")})
    names = build_eval_batches(config, **SIZES).document_names
    assert names == tuple(NAMES[index] for index in [*range(10, 20), 50])
    wrong = parquet.model_copy(update={"heldout": ("<urn:uuid:57>",)})
    with pytest.raises(DataError, match=r'"<urn:uuid:57>" matches none of the 57 documents; nearest: .*<urn:uuid:5'):
        open_corpus(wrong).training_documents()


def test_nothing_held_out_of_chunks_is_an_error_of_evaluation_alone(parquet: DataConfig) -> None:
    config = parquet.model_copy(update={"heldout": 0.0})
    next(build_train_loader(config, **SIZES, seed=0))
    with pytest.raises(DataError, match="no document is held out"):
        build_eval_batches(config, **SIZES)


def test_a_source_that_cannot_be_opened_is_an_error(tmp_path: Path) -> None:
    with pytest.raises(DataError, match="no file, folder or match"):
        open_corpus(DataConfig(source="jsonl", paths=(str(tmp_path / "absent"),)))


def test_synthetic_data_takes_its_place_only_if_asked_and_says_so(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    config = DataConfig(
        source="jsonl", paths=(str(tmp_path / "absent"),), on_error="synthetic", heldout=("a",), max_eval_tokens=64
    )
    corpus = open_corpus(config)
    assert "SYNTHETIC DATA in place of jsonl" in capsys.readouterr().err
    index = corpus.index()
    assert (index["source"], index["asked_for"], index["num_documents"]) == ("synthetic", "jsonl", None)
    assert "no file, folder or match" in index["replaced_because"]
    assert index["description"].startswith("SYNTHETIC DATA (copy of 64) in place of jsonl: ")
    assert corpus.entropy_floor_nats(ByteTokenizer()) == index["entropy_floor_nats_per_byte"]
    assert all(name.startswith("copy-") for name in build_eval_batches(config, **SIZES, corpus=corpus).document_names)


def test_only_drawn_bytes_have_a_known_floor(counting_tokenizer) -> None:
    assert open_corpus(DataConfig()).entropy_floor_nats(ByteTokenizer()) is None
    drawn = open_corpus(DataConfig(source="synthetic"))
    assert not drawn.source.in_memory
    assert 1.5 < drawn.entropy_floor_nats(ByteTokenizer()) < 1.62
    assert drawn.entropy_floor_nats(counting_tokenizer) is None


def test_drawn_documents_have_no_end_and_no_names_to_search(tmp_path: Path) -> None:
    config = DataConfig(source="synthetic", synthetic_length=8, shuffle_window_tokens=4096, max_eval_tokens=512)
    loader = build_train_loader(config, **SIZES, seed=0)
    seen = {document for _ in range(300) for document in next(loader).document_ids.unique().tolist()}
    assert (loader.epoch, loader.num_documents) == (0, None)
    assert len(seen) > 900
    names = build_eval_batches(config, **SIZES).document_names
    assert not seen & {int(name.removeprefix("copy-")) for name in names}
    with pytest.raises(DataError, match="without end and cannot be searched for names"):
        open_corpus(config.model_copy(update={"heldout": ("copy-1",)})).training_documents()


def test_a_file_of_one_source_twice_is_one_index_entry_each(tmp_path: Path) -> None:
    write_jsonl(tmp_path / "a.jsonl", TEXTS)
    write_jsonl(tmp_path / "b.jsonl", TEXTS[:3])
    files = open_corpus(DataConfig(source="jsonl", paths=(str(tmp_path),))).index()["files"]
    assert [(file["name"], file["num_documents"]) for file in files] == [("a.jsonl", 57), ("b.jsonl", 3)]
