"""FineWeb-Edu from a Hub on this machine, and what happens when the Hub or a file is not what it should be."""

from __future__ import annotations

import hashlib
import random
import time
from collections.abc import Iterator
from pathlib import Path

import pytest
from huggingface_hub import constants

from corpus_files import NAMES, TEXTS, write_parquet
from fake_hub import REPO, REVISION, FakeHub, serve
from nsa.data import ByteTokenizer, DataConfig, DataError, build_train_loader, load_tokenizer, open_corpus, open_source
from nsa.data.sources.hub import SHAKESPEARE_BYTES, subset_folder

FILES = ("sample/10BT/000_00000.parquet", "sample/10BT/001_00000.parquet")


@pytest.fixture
def hub(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[FakeHub]:
    halves = (slice(0, 30), slice(30, 57))
    contents = {
        path: write_parquet(tmp_path / "part", TEXTS[half], NAMES[half]).read_bytes()
        for path, half in zip(FILES, halves, strict=True)
    }
    with serve(FakeHub({**contents, "sample/10BT/README.md": b"no data"})) as hub:
        point_to(hub.endpoint, monkeypatch)
        yield hub


def point_to(endpoint: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(constants, "ENDPOINT", endpoint)
    template = endpoint + "/{repo_id}/resolve/{revision}/{filename}"
    monkeypatch.setattr(constants, "HUGGINGFACE_CO_URL_TEMPLATE", template)


@pytest.fixture
def config(tmp_path: Path) -> DataConfig:
    folder = str(tmp_path / "cache")
    return DataConfig(source="fineweb_edu", hub_repo=REPO, hub_revision=REVISION, cache_folder=folder, heldout=0.2)


@pytest.mark.parametrize("access", ["cache", "stream"])
def test_documents_come_by_row_groups_and_the_index_has_every_file(
    hub: FakeHub, config: DataConfig, access: str
) -> None:
    corpus = open_corpus(config.model_copy(update={"hub_access": access}))
    assert [document.name for document in corpus.source] == NAMES
    assert [document.text for document in corpus.source] == TEXTS
    assert corpus.source.num_chunks == 6
    index = corpus.index()
    assert [(file["name"], file["size_bytes"], file["num_documents"]) for file in index["files"]] == [
        (FILES[0], len(hub.files[FILES[0]]), 30),
        (FILES[1], len(hub.files[FILES[1]]), 27),
    ]
    assert all(len(file["sha256"]) == 64 for file in index["files"])
    assert (index["hub_repo"], index["hub_revision"], index["hub_subset"]) == (REPO, REVISION, "sample-10BT")
    assert index["description"] == f"fineweb_edu ({REPO}, sample-10BT, {access})"


def test_a_file_is_downloaded_once_and_streaming_downloads_ranges(hub: FakeHub, config: DataConfig) -> None:
    open_source(config)
    downloads = [request for request in hub.requests if request.startswith("GET /datasets")]
    assert len(downloads) == 2
    hub.requests.clear()
    open_source(config)
    assert not [request for request in hub.requests if request.startswith("GET /datasets")]
    open_source(config.model_copy(update={"hub_access": "stream"}))
    assert all("bytes=" in request for request in hub.requests if request.startswith("GET /datasets"))


def test_a_run_can_be_resumed_with_the_other_access(hub: FakeHub, config: DataConfig) -> None:
    sizes = {"tokenizer": ByteTokenizer(), "sequence_length": 16, "rows_per_batch": 2, "seed": 0}
    cached = build_train_loader(config, **sizes)
    for _ in range(5):
        next(cached)
    stream = config.model_copy(update={"hub_access": "stream"})
    streamed = build_train_loader(stream, **sizes, start=cached.state_dict())
    assert next(streamed).input_ids.tolist() == next(cached).input_ids.tolist()


def test_only_the_first_files_are_read_if_asked(hub: FakeHub, config: DataConfig) -> None:
    one = open_source(config.model_copy(update={"hub_num_files": 1}))
    assert len(one) == 30
    assert one.fingerprint != open_source(config).fingerprint
    assert not [request for request in hub.requests if FILES[1] in request and request.startswith("GET")][1:]


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"hub_revision": "f" * 40}, f"gives no dataset {REPO} at revision ffff"),
        ({"hub_repo": "owner/other"}, "gives no dataset owner/other"),
        ({"hub_subset": "sample-1T"}, r"has no Parquet file in sample/1T; check data\.hub_subset"),
    ],
)
def test_what_the_hub_does_not_have_is_named(hub: FakeHub, config: DataConfig, change: dict, message: str) -> None:
    with pytest.raises(DataError, match=message):
        open_source(config.model_copy(update=change))


def test_a_cut_off_file_in_the_cache_is_named(hub: FakeHub, config: DataConfig) -> None:
    open_source(config)
    (path,) = Path(config.cache_folder).rglob("snapshots/*/sample/10BT/000_00000.parquet")
    path.resolve().write_bytes(path.read_bytes()[:-100])
    with pytest.raises(DataError, match=r"000_00000\.parquet has \d+ bytes, on the Hub \d+; remove it"):
        open_source(config)


def test_a_stream_that_breaks_off_during_the_run_is_an_error(
    hub: FakeHub, config: DataConfig, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("nsa.data.sources.hub.STREAM_BLOCK_BYTES", 1024)
    draw = random.Random(0)
    long = [draw.randbytes(10_000).hex() for _ in range(27)]
    hub.files[FILES[1]] = write_parquet(tmp_path / "part", long, NAMES[30:]).read_bytes()
    source = open_source(config.model_copy(update={"hub_access": "stream"}))
    assert source[56].text == long[26]
    del hub.files[FILES[1]]
    with pytest.raises(DataError, match=rf"{REPO}/{FILES[1]} at {REVISION[:8]}, row group 1 \(rows from 11\) "):
        source[40]


@pytest.mark.parametrize("endpoint", ["http://127.0.0.1:9", "http://no-such-host.invalid"])
def test_an_unreachable_hub_is_known_within_seconds(
    config: DataConfig, monkeypatch: pytest.MonkeyPatch, endpoint: str
) -> None:
    point_to(endpoint, monkeypatch)
    start_s = time.monotonic()
    with pytest.raises(DataError, match=f"the Hub at {endpoint} cannot be reached for dataset {REPO}.*mend the conn"):
        open_source(config)
    with pytest.raises(DataError, match=f"no folder some/model.*the Hub at {endpoint} cannot be reached"):
        load_tokenizer("some/model")
    assert time.monotonic() - start_s < 15


def test_subsets_are_folders_of_the_repository() -> None:
    assert subset_folder("sample-100BT") == "sample/100BT"
    assert subset_folder("CC-MAIN-2024-10") == "data/CC-MAIN-2024-10"
    assert subset_folder("sample/10BT/") == "sample/10BT"


def test_another_text_is_not_taken_for_shakespeare(tmp_path: Path) -> None:
    path = tmp_path / "shakespeare.txt"
    path.write_text("To be, or not to be", encoding="utf-8")
    message = rf"shakespeare\.txt is not Tiny Shakespeare: 19 bytes with SHA-256 .* not {SHAKESPEARE_BYTES} with 86c4e6"
    with pytest.raises(DataError, match=message):
        open_source(DataConfig(source="tinyshakespeare", paths=(str(path),)))
    with pytest.raises(DataError, match="cannot be read"):
        open_source(DataConfig(source="tinyshakespeare", paths=(str(tmp_path / "absent"),)))


def test_shakespeare_is_downloaded_checked_and_kept(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    text = "\n\n".join(f"Speaker {index}:\nA line." for index in range(250))
    there = tmp_path / "input.txt"
    there.write_text(text, encoding="utf-8")
    monkeypatch.setattr("nsa.data.sources.hub.SHAKESPEARE_URL", there.as_uri())
    config = DataConfig(source="tinyshakespeare", cache_folder=str(tmp_path / "cache"))
    with pytest.raises(DataError, match="is not Tiny Shakespeare"):
        open_source(config)
    assert not (tmp_path / "cache").exists()
    monkeypatch.setattr("nsa.data.sources.hub.SHAKESPEARE_SHA256", hashlib.sha256(text.encode()).hexdigest())
    first = open_source(config)
    there.unlink()
    second = open_source(config)
    assert [document.name for document in first] == [
        "tinyshakespeare:1",
        "tinyshakespeare:301",
        "tinyshakespeare:601",
    ]
    assert "\n\n".join(document.text for document in second) == text
    monkeypatch.setattr("nsa.data.sources.hub.SHAKESPEARE_SHA256", "0" * 64)
    with pytest.raises(DataError, match=r"tinyshakespeare\.txt is not Tiny Shakespeare.*remove the file"):
        open_source(config)
