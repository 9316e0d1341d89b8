"""A large compressed file is unpacked once, whole or not at all."""

from __future__ import annotations

import gzip
import lzma
from pathlib import Path

import pytest

from corpus_files import TEXTS, write_jsonl
from nsa.data import DataConfig, DataError, open_source
from nsa.data.sources import contents, unpack


def config(path: Path, **options) -> DataConfig:
    return DataConfig(
        **{"source": "jsonl", "paths": (str(path),), "cache_folder": str(path.parent / "cache"), **options}
    )


def test_a_large_file_is_unpacked_once(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys) -> None:
    path = tmp_path / "a.jsonl.xz"
    path.write_bytes(lzma.compress(write_jsonl(tmp_path / "a.jsonl", TEXTS).read_bytes()))
    first = open_source(config(path, in_memory_mib=0))
    assert str(tmp_path / "cache" / "unpacked") in capsys.readouterr().err
    monkeypatch.setattr(unpack, "_unpack", lambda *_: pytest.fail("unpacked again"))
    assert open_source(config(path, in_memory_mib=0)).fingerprint == first.fingerprint
    monkeypatch.undo()
    path.write_bytes(lzma.compress(write_jsonl(tmp_path / "a.jsonl", TEXTS[1:]).read_bytes()))
    assert open_source(config(path, in_memory_mib=0)).fingerprint != first.fingerprint
    kept = {file.suffix for file in (tmp_path / "cache" / "unpacked").iterdir()}
    assert kept == {"", ".lock"}, "no part of a copy is left"


def test_a_damaged_file_leaves_no_part_of_a_copy(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(contents, "READ_BYTES", 500)
    path = tmp_path / "a.jsonl.gz"
    path.write_bytes(gzip.compress(write_jsonl(tmp_path / "a.jsonl", TEXTS).read_bytes())[:-9])
    for _ in range(2):
        with pytest.raises(DataError, match=r"a\.jsonl\.gz is damaged or cut off.*download or compress it again"):
            open_source(config(path, in_memory_mib=0))
    assert [file.suffix for file in (tmp_path / "cache" / "unpacked").iterdir()] == [".lock"]
