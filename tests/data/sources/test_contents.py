"""Compressed files are read as the plain ones are, and each remedy in an error makes the text that was meant."""

from __future__ import annotations

import bz2
import gzip
import lzma
import re
import subprocess
from collections.abc import Callable
from pathlib import Path

import pytest

from corpus_files import TEXTS, write_jsonl, zstd
from nsa.data import DataConfig, DataError, build_train_loader, open_source
from nsa.data.sources import jsonl
from nsa.data.tokenizers import ByteTokenizer

PACKERS: dict[str, Callable[[bytes], bytes]] = {
    ".gz": gzip.compress,
    ".bz2": bz2.compress,
    ".xz": lzma.compress,
    ".zst": zstd,
}


@pytest.fixture(autouse=True)
def small_chunks(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(jsonl, "CHUNK_BYTES", 200)


def config(path: Path, **options) -> DataConfig:
    return DataConfig(
        **{"source": "jsonl", "paths": (str(path),), "cache_folder": str(path.parent / "cache"), **options}
    )


def documents(found) -> dict[str, str]:
    return {document.name: document.text for document in found}


@pytest.mark.parametrize("suffix", PACKERS)
@pytest.mark.parametrize("in_memory_mib", [0, 256])
def test_a_compressed_file_gives_the_stream_of_the_plain_one(suffix: str, in_memory_mib: int, tmp_path: Path) -> None:
    path = write_jsonl(tmp_path / "a.jsonl", TEXTS)
    packed = tmp_path / f"a.jsonl{suffix}"
    # Two streams, one behind the other, are one file.
    half = path.read_bytes().index(b"\n", 900) + 1
    packed.write_bytes(PACKERS[suffix](path.read_bytes()[:half]) + PACKERS[suffix](path.read_bytes()[half:]))
    found = [open_source(config(place, in_memory_mib=in_memory_mib)) for place in (path, packed)]
    assert found[1].in_memory == (in_memory_mib > 0)
    assert documents(found[0]) == documents(found[1])
    assert found[0].fingerprint == found[1].fingerprint
    assert [(file.name, file.size_bytes) for file in found[1].files] == [(packed.name, packed.stat().st_size)]
    loaders = [
        build_train_loader(
            config(place, in_memory_mib=in_memory_mib, heldout=0.2),
            tokenizer=ByteTokenizer(),
            sequence_length=16,
            rows_per_batch=4,
            seed=1,
        )
        for place in (path, packed)
    ]
    for _ in range(40):
        one, other = (next(loader) for loader in loaders)
        assert one.input_ids.tolist() == other.input_ids.tolist()


def test_the_size_that_counts_is_the_unpacked_one(tmp_path: Path) -> None:
    path = tmp_path / "a.jsonl.gz"
    path.write_bytes(gzip.compress(b'{"text": "' + b"a" * 2**20 + b'"}\n'))
    assert path.stat().st_size < 2**11
    assert not open_source(config(path, in_memory_mib=1)).in_memory
    assert open_source(config(path, in_memory_mib=2)).in_memory


def test_a_compressed_file_is_known_by_its_contents(tmp_path: Path) -> None:
    path = tmp_path / "a.jsonl"
    path.write_bytes(gzip.compress(b'{"text": "one"}\n'))
    assert documents(open_source(config(path))) == {"a.jsonl:1": "one"}
    (tmp_path / "b.txt").write_bytes(b"BZh is how bzip2 begins, and so does this text")
    assert len(open_source(config(tmp_path / "b.txt", source="text"))) == 1


@pytest.mark.parametrize("in_memory_mib", [0, 256])
def test_a_byte_order_mark_is_no_part_of_the_text(in_memory_mib: int, tmp_path: Path) -> None:
    path = tmp_path / "a.jsonl"
    path.write_bytes(b"\xef\xbb\xbf" + '{"text": "one"}\n{"text": "\ufefftwo"}\n'.encode())
    found = documents(open_source(config(path, in_memory_mib=in_memory_mib)))
    assert list(found.values()) == ["one", "\ufefftwo"]
    (tmp_path / "b.txt").write_bytes(b"\xef\xbb\xbfthree")
    assert documents(open_source(config(tmp_path / "b.txt", source="text"))) == {"b.txt": "three"}


@pytest.mark.parametrize("encoding", ["latin1", "cp1252", "utf-16", "utf-16-le", "utf-16-be", "utf-32"])
def test_the_remedy_makes_the_text_that_was_meant(encoding: str, tmp_path: Path) -> None:
    text = "A word on „Zürich“.\n" if encoding == "cp1252" else "A word on Zürich.\n"
    path = tmp_path / "a.txt"
    path.write_bytes((text * 20).encode(encoding))
    with pytest.raises(DataError, match="iconv") as caught:
        open_source(config(path, source="text"))
    command = re.search(r"iconv -f \S+ -t \S+", str(caught.value))
    assert command is not None
    path.write_bytes(subprocess.run([*command[0].split(), str(path)], capture_output=True, check=True).stdout)
    assert open_source(config(path, source="text"))[0].text == text * 20


def test_one_bad_byte_is_dropped_without_harm_to_the_rest(tmp_path: Path) -> None:
    path = tmp_path / "a.txt"
    path.write_bytes("日本 ".encode() + b"\xff" + "語\n".encode())
    with pytest.raises(DataError, match=r"a\.txt:1 .*iconv -f utf-8 -t utf-8 -c"):
        open_source(config(path, source="text"))


def test_text_that_does_not_fit_the_memory_is_refused_before_it_is_read(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("psutil.virtual_memory", lambda: type("Memory", (), {"total": 2000}))
    (tmp_path / "a.txt").write_text("a" * 900, encoding="utf-8")
    assert len(open_source(config(tmp_path / "a.txt", source="text"))) == 1
    (tmp_path / "b.txt.gz").write_bytes(gzip.compress(b"b" * 200))
    with pytest.raises(DataError, match=r"b\.txt\.gz: the text files hold more than .*JSON Lines"):
        open_source(config(tmp_path, source="text"))
