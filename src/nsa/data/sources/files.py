"""Finding local files by paths, folders and patterns, with errors that name what is in the way."""

from __future__ import annotations

import errno
import glob
import os
import stat
from collections import Counter
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import NamedTuple

from nsa.data.errors import DataError, shortened
from nsa.data.progress import say

PACKED = (".gz", ".bz2", ".xz", ".zst")  # suffixes of compressed files
TEXT, JSON_LINES, PARQUET = (".txt", ".md"), (".jsonl", ".ndjson"), (".parquet",)
JSON = (".json",)  # taken from a folder that has no other JSON Lines, where it is rather a description of the data
NOT_DATA = ("__MACOSX", "@eaDir", "lost+found")  # folders that systems put beside data
OTHER_KINDS = {stat.S_ISFIFO: "a pipe", stat.S_ISSOCK: "a socket", stat.S_ISCHR: "a device", stat.S_ISBLK: "a device"}


class NamedFile(NamedTuple):
    """A file to read.

    Attributes:
        name: its path inside the folder that was given, else its own name; readable whatever its bytes are.
        path: where it lies.
    """

    name: str
    path: Path

    @property
    def plain_name(self) -> str:
        """The name without the suffix of a compressed file, by which its documents are named."""
        return without_packing(self.name)


def without_packing(name: str) -> str:
    """`name` without the suffix of a compressed file: "a.jsonl" for "a.jsonl.gz"."""
    return name[: -len(Path(name).suffix)] if name.endswith(PACKED) else name


def find_files(paths: Sequence[str], *kinds: tuple[str, ...]) -> list[NamedFile]:
    """Files of `paths` in order.

    Args:
        paths: files, folders or patterns.
        kinds: suffixes of the files to take from a folder; further ones count where a folder has none of the first.

    Raises:
        DataError: an entry leads to no file, or a file cannot be read as one.
    """
    found: list[NamedFile] = []
    for entry in paths:
        path = Path(os.path.expanduser(entry))
        status = _status(path)
        if status is None:
            files = [_named(Path(file).name, Path(file)) for file in sorted(glob.glob(str(path), recursive=True))]
            if not files:
                raise DataError(_absent(entry, path))
        elif stat.S_ISDIR(status.st_mode):
            files = _of_folder(path, kinds)
        else:
            files = [_named(path.name, path)]
        for file in files:
            check_regular(file.path)
        found += files
    real = [path.resolve() for _, path in found]
    for file, count in Counter(real).items():
        if count > 1:
            raise DataError(f"{file} is given {count} times in data.paths; each file may be read once")
    for file, count in Counter(without_packing(str(path)) for path in real).items():
        if count > 1:
            raise DataError(f"{file} is given {count} times in data.paths, compressed and not; keep one of them")
    return found


def check_present(paths: Sequence[str]) -> None:
    """Look that every entry of `data.paths` leads to something, before anything that takes long is done.

    Raises:
        DataError: an entry leads to nothing.
    """
    for entry in paths:
        path = Path(os.path.expanduser(entry))
        if _status(path) is None and not glob.glob(str(path), recursive=True):
            raise DataError(_absent(entry, path))


def check_regular(path: Path) -> os.stat_result:
    """What the system says of a file.

    Raises:
        DataError: it is not there, or no file that can be read from beginning to end.
    """
    status = _status(path)
    if status is None:
        raise unreadable(path, FileNotFoundError(errno.ENOENT, os.strerror(errno.ENOENT)))
    if stat.S_ISDIR(status.st_mode):
        raise DataError(f"{path} cannot be read: it is a folder; give the folder itself, or a pattern of files only")
    for is_kind, kind in OTHER_KINDS.items():
        if is_kind(status.st_mode):
            raise DataError(f"{path} is {kind}, not a file; write what comes from it into a file")
    return status


def unreadable(path: Path | str, error: OSError) -> DataError:
    """The error for a file that the system does not give."""
    return DataError(f"{path} cannot be read: {error.strerror or error}; check that it is there and may be read")


def _status(path: Path) -> os.stat_result | None:
    """What the system says of a path, links followed; None if there is nothing."""
    try:
        return path.stat()
    except (FileNotFoundError, NotADirectoryError) as error:
        if path.is_symlink():
            place = os.readlink(path)
            raise DataError(f"{path} is a link to {place}, which is not there; mend or remove the link") from error
        return None
    except ValueError as error:  # a NUL in the path
        raise DataError(f"{path} is no path: {error}; correct data.paths") from error
    except OSError as error:
        if error.errno == errno.ELOOP:
            raise DataError(f"{path} is a link that leads back to itself; mend or remove the link") from error
        if error.errno == errno.ENAMETOOLONG:
            start = str(path)[:60]
            raise DataError(
                f"a path of {len(str(path))} characters is too long: {start}...; correct data.paths"
            ) from error
        raise unreadable(path, error) from error


def _absent(entry: str, path: Path) -> str:
    if "://" in entry:
        return f"{entry} is an address, not a file; download it first (data.paths)"
    return f"there is no file, folder or match for {path}; check data.paths (now in {Path.cwd()})"


def _named(name: str, path: Path) -> NamedFile:
    return NamedFile(os.fsencode(name).decode("utf-8", "backslashreplace"), path)


def _of_folder(folder: Path, kinds: Sequence[tuple[str, ...]]) -> list[NamedFile]:
    """The files of the first of `kinds` that the folder has."""
    hidden: list[str] = []
    inside = sorted(_inside(folder, hidden))
    for suffixes in kinds:
        if paths := [path for path in inside if without_packing(path.name).endswith(suffixes)]:
            break
    else:
        raise DataError(_nothing_in(folder, kinds, [path.name for path in inside], hidden))
    if skipped := [name for name in hidden if without_packing(name).endswith(suffixes)]:
        say(f"{folder}: hidden files are not read: {shortened(skipped, most=3)}")
    return [_named(path.relative_to(folder).as_posix(), path) for path in paths]


def _nothing_in(folder: Path, kinds: Sequence[tuple[str, ...]], names: list[str], hidden: list[str]) -> str:
    wanted = ", ".join(f"*{suffix}" for suffixes in kinds for suffix in suffixes)
    packed = "" if kinds[0] == PARQUET else f" (or compressed: {', '.join(PACKED)})"
    there = Counter("".join(Path(name).suffixes[-2:]) or name for name in names)
    held = ", ".join(f"{count} {suffix}" for suffix, count in there.most_common(5)) or "nothing"
    held += f", and hidden {shortened(hidden, most=3)}, which is not read" if hidden else ""
    return f"the folder {folder} has no {wanted} file{packed}; it holds {held}: check data.source and data.paths"


def _inside(folder: Path, hidden: list[str]) -> Iterator[Path]:
    """Files of a folder and of all below it, linked ones too; `Path.rglob` passes over those and over closed ones.

    Names that begin with a dot, as of editors' copies and what systems add, are put into `hidden`.
    """

    def stop(error: OSError) -> None:
        raise unreadable(error.filename, error) from error

    seen: set[str] = set()
    for place, folders, names in os.walk(folder, onerror=stop, followlinks=True):
        real = os.path.realpath(place)
        if real in seen:
            raise DataError(f"{place} is a link to {real}, which {folder} holds already; remove the link")
        seen.add(real)
        folders[:] = [name for name in folders if not name.startswith(".") and name not in NOT_DATA]
        hidden += [name for name in names if name.startswith(".")]
        yield from (Path(place, name) for name in names if not name.startswith("."))
