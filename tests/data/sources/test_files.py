"""Which files a path, a folder or a pattern stands for."""

from __future__ import annotations

import json
import os
from pathlib import Path

import pytest

from nsa.data import DataConfig, DataError, open_corpus, open_source
from nsa.data.errors import printable, shortened


def names(*paths: Path, source: str = "text") -> list[str]:
    found = open_source(DataConfig(source=source, paths=tuple(map(str, paths))))
    return [document.name for document in found]


def test_hidden_files_and_what_systems_and_editors_leave_are_no_data(tmp_path: Path, capsys) -> None:
    kept = ["a.txt", "b/c.md", "b/notes.txt.txt"]
    left = [".hidden.txt", "._a.txt", ".#a.txt", "a.txt~", "#a.txt#", ".a.txt.swp", ".ipynb_checkpoints/a.txt"]
    left += ["__MACOSX/a.txt", "@eaDir/a.txt", ".git/a.txt", "b/.~lock.c.txt"]
    for name in (*kept, *left):
        (tmp_path / name).parent.mkdir(exist_ok=True)
        (tmp_path / name).write_text(name, encoding="utf-8")
    assert names(tmp_path) == kept
    assert "hidden files are not read" in capsys.readouterr().err
    assert names(tmp_path / ".hidden.txt") == [".hidden.txt"], "a file that is named is read"
    assert names(tmp_path / ".git") == ["a.txt"]


def test_a_name_that_is_not_utf8_is_spelled_out(tmp_path: Path) -> None:
    Path(os.fsdecode(os.fsencode(tmp_path) + b"/caf\xe9.txt")).write_text("one", encoding="utf-8")
    assert names(tmp_path) == ["caf\\xe9.txt"]
    corpus = open_corpus(DataConfig(source="text", paths=(str(tmp_path),), heldout=0.5))
    assert corpus.index()["files"][0]["name"] == "caf\\xe9.txt"
    corpus.index()["fingerprint"].encode()
    json.dumps(corpus.index(), ensure_ascii=False).encode()
    named = os.fsdecode(os.fsencode(tmp_path) + b"/caf\xe9.txt")
    with pytest.raises(ValueError, match=r"caf\\udce9\.txt is not UTF-8; give its folder, or a pattern"):
        DataConfig(source="text", paths=(named,))
    assert names(tmp_path / "caf*.txt") == ["caf\\xe9.txt"]


def test_pipes_devices_and_broken_links_are_named_and_not_read(tmp_path: Path) -> None:
    places = {"pipe": "is a pipe", "zero": "is a device", "round": "leads back to itself", "gone": "a link to nowhere"}
    for place in places:
        (tmp_path / place).mkdir()
    os.mkfifo(tmp_path / "pipe/a.txt")
    (tmp_path / "zero/a.txt").symlink_to("/dev/zero")
    (tmp_path / "round/a.txt").symlink_to("a.txt")
    (tmp_path / "gone/a.txt").symlink_to("nowhere")
    for place, message in places.items():
        for path in (tmp_path / place / "a.txt", tmp_path / place, tmp_path / place / "*.txt"):
            with pytest.raises(DataError, match=message):
                names(path)


def test_a_file_and_its_compressed_copy_are_refused(tmp_path: Path) -> None:
    for name in ("a.txt", "a.txt.gz"):
        (tmp_path / name).write_bytes(b"")
    for paths in ([tmp_path], [tmp_path / "a.txt*"], [tmp_path / "a.txt", tmp_path / "a.txt.gz"]):
        with pytest.raises(DataError, match=r"a\.txt is given 2 times.*compressed and not; keep one"):
            names(*paths)


def test_what_a_folder_holds_instead_is_said(tmp_path: Path) -> None:
    for number in range(3):
        (tmp_path / f"{number}.csv.gz").touch()
    (tmp_path / "README").touch()
    with pytest.raises(DataError, match=r"no \*\.txt, \*\.md file .*it holds 3 \.csv\.gz, 1 README"):
        names(tmp_path)


def test_messages_have_no_control_characters_and_an_end() -> None:
    assert str(DataError("a\x1b[2J\udcff é\nb")) == "a\\x1b[2J\\udcff é\nb"
    assert printable("日本 é") == "日本 é"
    assert shortened([str(n) for n in range(100)], most=2) == "['0', '1'] and 98 more"
    assert len(shortened(["k" * 2**20])) < 60
    long = str(DataError("a" * 2**20 + "; the remedy"))
    assert len(long) < 2000
    assert long.endswith("a; the remedy")
