"""Which files a path, a folder or a pattern stands for."""

from __future__ import annotations

import errno
import gzip
import json
import os
from pathlib import Path

import pytest

from corpus_files import read, zstd
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


def test_missing_files_are_named(tmp_path: Path) -> None:
    with pytest.raises(DataError, match=r"no file, folder or match for .*nowhere\.txt; check data\.paths"):
        read("text", tmp_path / "nowhere.txt")
    with pytest.raises(DataError, match=r"has no \*\.jsonl, \*\.ndjson, \*\.json file.*it holds nothing"):
        read("jsonl", tmp_path)
    (tmp_path / "folder.txt").mkdir()
    with pytest.raises(DataError, match=r"folder\.txt cannot be read"):
        read("text", tmp_path / "*.txt")


def test_a_folder_holds_what_is_linked_into_it_and_what_lies_in_folders_called_like_files(tmp_path: Path) -> None:
    for folder in ("corpus/a.txt", "elsewhere"):
        (tmp_path / folder).mkdir(parents=True)
        (tmp_path / folder / "one.txt").write_text(folder, encoding="utf-8")
    (tmp_path / "corpus" / "linked").symlink_to(tmp_path / "elsewhere")
    assert read("text", tmp_path / "corpus") == {"a.txt/one.txt": "corpus/a.txt", "linked/one.txt": "elsewhere"}
    (tmp_path / "corpus" / "linked" / "round").symlink_to(tmp_path / "corpus")
    with pytest.raises(DataError, match=r"linked/round is a link to .*corpus, which .* holds already; remove the link"):
        read("text", tmp_path / "corpus")


def test_a_folder_that_may_not_be_read_is_an_error_and_not_passed_over(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    (tmp_path / "a.txt").write_text("a", encoding="utf-8")
    (tmp_path / "closed").mkdir()
    scandir = os.scandir

    def closed(path: str) -> object:
        if Path(path).name == "closed":
            raise PermissionError(errno.EACCES, os.strerror(errno.EACCES), path)
        return scandir(path)

    monkeypatch.setattr(os, "scandir", closed)  # root may read everything
    with pytest.raises(DataError, match=r"closed cannot be read: Permission denied"):
        read("text", tmp_path)


def test_a_file_given_twice_is_refused(tmp_path: Path) -> None:
    (tmp_path / "a.txt").write_text("a", encoding="utf-8")
    with pytest.raises(DataError, match=r"a\.txt is given 2 times"):
        read("text", tmp_path, tmp_path / "a.txt")


@pytest.mark.parametrize("name", ["a.json.gz", "a.ndjson", "a.ndjson.zst", "a.json"])
def test_json_lines_are_found_under_their_other_names(name: str, tmp_path: Path) -> None:
    content = b'{"text": "one"}\n'
    pack = {".gz": gzip.compress, ".zst": zstd}.get(Path(name).suffix, bytes)
    (tmp_path / name).write_bytes(pack(content))
    assert list(read("jsonl", tmp_path).values()) == ["one"]


def test_json_beside_json_lines_is_about_the_data(tmp_path: Path) -> None:
    (tmp_path / "a.jsonl").write_text('{"text": "one"}\n', encoding="utf-8")
    (tmp_path / "dataset_info.json").write_text('{\n"description": ""\n}\n', encoding="utf-8")
    assert list(read("jsonl", tmp_path)) == ["a.jsonl:1"]
