"""Finding local files, and reading them with errors that name the file and the line."""

from __future__ import annotations

import glob
import os
from collections import Counter
from collections.abc import Iterator, Sequence
from pathlib import Path

from nsa.data.errors import DataError


def find_files(paths: Sequence[str], suffix: str) -> list[tuple[str, Path]]:
    """Files of `paths` in order, each with its name: the path inside a given folder, else the file's own name."""
    found: list[tuple[str, Path]] = []
    for entry in paths:
        path = Path(entry).expanduser()
        if path.is_dir():
            files = [(file.relative_to(path).as_posix(), file) for file in sorted(_inside(path, suffix))]
            missing = f"the folder {path} has no *{suffix} file"
        elif path.is_file():
            files, missing = [(path.name, path)], ""
        else:
            files = [(Path(file).name, Path(file)) for file in sorted(glob.glob(str(path), recursive=True))]
            missing = f"there is no file, folder or match for {path}; check data.paths (now in {Path.cwd()})"
        if not files:
            raise DataError(missing)
        found += files
    for file, count in Counter(path.resolve() for _, path in found).items():
        if count > 1:
            raise DataError(f"{file} is given {count} times in data.paths; each file may be read once")
    return found


def _inside(folder: Path, suffix: str) -> Iterator[Path]:
    """Files of a folder and of all below it, linked ones too; `Path.rglob` passes over those and over closed ones."""

    def stop(error: OSError) -> None:
        raise unreadable(error.filename, error) from error

    seen: set[str] = set()
    for place, _, names in os.walk(folder, onerror=stop, followlinks=True):
        real = os.path.realpath(place)
        if real in seen:
            raise DataError(f"{place} is a link to {real}, which {folder} holds already; remove the link")
        seen.add(real)
        yield from (Path(place, name) for name in names if name.endswith(suffix))


def read_bytes(path: Path) -> bytes:
    """The contents of a file."""
    try:
        return path.read_bytes()
    except OSError as error:
        raise unreadable(path, error) from error


def unreadable(path: Path | str, error: OSError) -> DataError:
    """The error for a file that the system does not give."""
    return DataError(f"{path} cannot be read: {error.strerror or error}; check that it is there and may be read")


def decode_utf8(content: bytes, path: Path | str, *, first_line: int = 1) -> str:
    """Text of bytes that begin at line `first_line` of a file."""
    try:
        return content.decode()
    except UnicodeDecodeError as error:
        line = first_line + content.count(b"\n", 0, error.start)
        raise DataError(
            f"{path}:{line} is not UTF-8 (byte {content[error.start]:#04x} at offset {error.start}); "
            f"convert it, for example with: iconv -f latin1 -t utf-8"
        ) from error


def read_utf8(path: Path) -> str:
    """The text of a file, line ends as they are."""
    text = decode_utf8(read_bytes(path), path)
    if not text.strip():
        raise DataError(f"{path} is empty; remove it from data.paths or fill it")
    return text
