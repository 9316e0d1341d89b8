"""Configs and files for cases of bad data."""

from __future__ import annotations

import json
import os
import socket
import zipfile
from collections.abc import Callable
from pathlib import Path

import pyarrow
import pyarrow.parquet

from bad_inputs.case import TINY, BadInput

TEXT = "Some words that a person wrote down, and then some more of them.\n" * 40
LINES = "".join(json.dumps({"text": f"{number} {TEXT}", "id": f"d{number}"}) + "\n" for number in range(30))
CHUNKS = ", in_memory_mib: 0"
PACKED = LINES.encode()
CHECK = "data check c.yaml --batches 1 "
Prepare = Callable[[Path], object]


def data(section: str) -> str:
    """The small config with another section `data`."""
    lines = TINY.splitlines()
    return "\n".join(f"data: {{{section}}}" if line.startswith("data:") else line for line in lines) + "\n"


def of(source: str, name: str, content: bytes | str, extra: str = "") -> Prepare:
    """A config of one file with these contents."""

    def prepare(here: Path) -> None:
        (here / name).write_bytes(content if isinstance(content, bytes) else content.encode())
        (here / "c.yaml").write_text(data(f"source: {source}, paths: [{name}]{extra}"), encoding="utf-8")

    return prepare


def case(name: str, says: tuple[str, ...], source: str, file: str, content: bytes | str, extra: str = "") -> BadInput:
    return BadInput(name, CHECK, says, of(source, file, content, extra))


def settings(section: str, *then: Prepare) -> Prepare:
    """A config with this section, and files beside it."""

    def prepare(here: Path) -> None:
        (here / "c.yaml").write_text(data(section), encoding="utf-8")
        for one in then:
            one(here)

    return prepare


def file(name: str, content: bytes | str = TEXT) -> Prepare:
    def prepare(here: Path) -> None:
        (here / name).parent.mkdir(parents=True, exist_ok=True)
        (here / name).write_bytes(content if isinstance(content, bytes) else content.encode())

    return prepare


def link(name: str, target: str) -> Prepare:
    def prepare(here: Path) -> None:
        (here / name).parent.mkdir(parents=True, exist_ok=True)
        (here / name).symlink_to(target)

    return prepare


def parquet(table: dict | pyarrow.Table, damage: Callable[[bytes], bytes] = bytes, extra: str = "") -> Prepare:
    """A config of one Parquet file, damaged after it was written."""

    def prepare(here: Path) -> None:
        path = here / "a.parquet"
        pyarrow.parquet.write_table(table if isinstance(table, pyarrow.Table) else pyarrow.table(table), path)
        path.write_bytes(damage(path.read_bytes()))
        (here / "c.yaml").write_text(data(f"source: parquet, paths: [a.parquet]{extra}"), encoding="utf-8")

    return prepare


def zipped(here: Path) -> None:
    with zipfile.ZipFile(here / "a.txt", "w") as archive:
        archive.writestr("inside.txt", TEXT)


def tar_gz() -> bytes:
    import io
    import tarfile

    buffer = io.BytesIO()
    with tarfile.open(fileobj=buffer, mode="w:gz") as archive:
        info = tarfile.TarInfo("inside.txt")
        info.size = len(TEXT)
        archive.addfile(info, io.BytesIO(TEXT.encode()))
    return buffer.getvalue()


def listening(here: Path) -> None:
    place = socket.socket(socket.AF_UNIX)
    old = Path.cwd()
    os.chdir(here)
    place.bind("a.txt")
    os.chdir(old)
    place.close()


def sparse(name: str, size_bytes: int) -> Prepare:
    return lambda here: os.truncate(os.open(here / name, os.O_CREAT | os.O_WRONLY), size_bytes)


def zstd(content: bytes) -> bytes:
    return bytes(pyarrow.compress(content, codec="zstd", asbytes=True))


def flipped(content: bytes) -> bytes:
    middle = len(content) // 2
    return content[:middle] + bytes([content[middle] ^ 0xFF]) * 9 + content[middle + 9 :]
