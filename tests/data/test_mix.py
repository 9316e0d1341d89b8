"""A mix gives rows by weight, each source as if it were alone, and resumes anywhere."""

from __future__ import annotations

import doctest
import json
from collections import Counter
from pathlib import Path

import pytest
import torch

from corpus_files import write_jsonl
from nsa.data import DataConfig, DataError, build_eval_batches, build_train_loader, mix, open_corpus
from nsa.data.heldout import name_hash
from nsa.data.tokenizers import ByteTokenizer

SIZES = {"tokenizer": ByteTokenizer(), "sequence_length": 32, "rows_per_batch": 4}


@pytest.fixture
def files(tmp_path: Path) -> tuple[Path, Path]:
    few = write_jsonl(tmp_path / "few.jsonl", [f"few {n} " + "a" * (37 * n % 90) for n in range(20)])
    return few, write_jsonl(tmp_path / "many.jsonl", [f"many {n} " + "b" * (53 * n % 90) for n in range(200)])


def mixed(files: tuple[Path, Path], *, weights=(3, 1), **options) -> DataConfig:
    entries = [
        {"source": "jsonl", "name": path.stem, "paths": [str(path)], "weight": weight}
        for path, weight in zip(files, weights, strict=True)
    ]
    return DataConfig(source="mix", mix=entries, **{"heldout": 0.2, "shuffle_window_tokens": 1000, **options})


def rows_of(loader, count: int) -> list[list[int]]:
    return [row for _ in range(count // 4) for row in next(loader).input_ids.tolist()]


@pytest.mark.parametrize("in_memory_mib", [0, 256])
def test_each_source_gives_its_share_and_the_rows_that_it_gives_alone(files, in_memory_mib: int) -> None:
    config = mixed(files, in_memory_mib=in_memory_mib)
    rows = rows_of(build_train_loader(config, **SIZES, seed=2), 800)
    parts = [[row for row in rows if (ord("b") in row or ord("m") in row) == is_many] for is_many in (False, True)]
    assert [len(part) for part in parts] == [600, 200]
    for part, entry, share in zip(parts, config.mix, (0.75, 0.25), strict=True):
        alone = config.of(entry).model_copy(update={"shuffle_window_tokens": round(1000 * share)})
        assert rows_of(build_train_loader(alone, **SIZES, seed=2), len(part)) == part


def test_shares_hold_after_any_number_of_rows() -> None:
    weights = [5, 0.25, 3, 1.1]
    turns = mix.Turns(weights)
    for count in range(1, 2000):
        turns.next()
        for taken, weight in zip(turns.taken, weights, strict=True):
            assert abs(taken - count * weight / sum(weights)) < 1.5


@pytest.mark.parametrize("num_batches", [0, 1, 7, 30, 83])
def test_resume_continues_exactly_in_the_middle_of_every_epoch(files, num_batches: int) -> None:
    config = mixed(files, weights=(1, 2.5), in_memory_mib=0)
    loader = build_train_loader(config, **SIZES, seed=0, read_ahead=True)
    for _ in range(num_batches):
        next(loader)
    state = json.loads(json.dumps(loader.state_dict()))
    resumed = build_train_loader(config, **SIZES, seed=0, start=state)
    for _ in range(60):
        one, other = next(loader), next(resumed)
        assert torch.equal(one.input_ids, other.input_ids)
        assert torch.equal(one.document_ids, other.document_ids)
    assert resumed.state_dict() == loader.state_dict()
    loader.close()


def test_ranks_share_the_stream_of_one_process(files) -> None:
    config = mixed(files)
    whole = build_train_loader(config, **SIZES | {"rows_per_batch": 6}, seed=0)
    ranks = [
        build_train_loader(config, **SIZES | {"rows_per_batch": 2}, seed=0, rank=rank, world_size=3)
        for rank in range(3)
    ]
    for _ in range(50):
        parts = [next(rank).input_ids for rank in ranks]
        assert torch.equal(next(whole).input_ids, torch.cat(parts))


def test_an_epoch_ends_when_every_source_was_read_whole(files) -> None:
    loader = build_train_loader(mixed(files), **SIZES, seed=0)
    seen: Counter[int] = Counter()
    while loader.epoch == 0:
        seen.update(set(next(loader).document_ids.unique().tolist()))
    seen.update(piece[0] + 20 for piece in loader.state_dict()["mix"][1]["carry"])
    held = {n for n in range(200) if name_hash(f"many.jsonl:{n + 1}") < 0.2}
    assert {n for n in range(200) if seen[20 + n]} == set(range(200)) - held
    assert loader.state_dict()["mix"][0]["epoch"] > 5, "the small source of the large weight came around often"
    assert loader.num_documents == 200 - len(held) + sum(name_hash(f"few.jsonl:{n + 1}") >= 0.2 for n in range(20))


def test_documents_are_held_out_for_each_source(files) -> None:
    config = mixed(files, heldout=0.2)
    own = config.mix[0].model_copy(update={"heldout": ("few.jsonl:3",)})
    config = config.model_copy(update={"mix": (own, config.mix[1])})
    batches = build_eval_batches(config, **SIZES)
    many = [f"many/many.jsonl:{n + 1}" for n in range(200) if name_hash(f"many.jsonl:{n + 1}") < 0.2]
    assert batches.document_names == ("few/few.jsonl:3", *many)
    none = own.model_copy(update={"heldout": 0.0})
    without = build_eval_batches(config.model_copy(update={"mix": (none, config.mix[1])}), **SIZES)
    assert without.document_names == tuple(many)


def test_the_index_tells_what_each_source_is(files) -> None:
    corpus = open_corpus(mixed(files))
    index = corpus.index()
    assert json.loads(json.dumps(index)) == index
    assert [(part["name"], part["share"], part["num_documents"]) for part in index["mix"]] == [
        ("few", 0.75, 20),
        ("many", 0.25, 200),
    ]
    assert index["num_documents"] == 220
    assert corpus.description.startswith("mix of 75.0% few: jsonl (")


def test_a_state_of_other_weights_is_refused(files) -> None:
    state = build_train_loader(mixed(files), **SIZES, seed=0).state_dict()
    with pytest.raises(ValueError, match="must be the same to resume"):
        build_train_loader(mixed(files, weights=(3, 2)), **SIZES, seed=0, start=state)


def test_a_source_without_a_row_is_named(files, tmp_path: Path) -> None:
    short = write_jsonl(tmp_path / "short.jsonl", ["a"])
    config = mixed((files[0], short), heldout=0.0)
    with pytest.raises(DataError, match=r"of short fill 0 rows of 32 tokens"):
        build_train_loader(config, **SIZES, seed=0)


def test_the_example_in_the_docstring_is_true() -> None:
    assert doctest.testmod(mix).failed == 0
