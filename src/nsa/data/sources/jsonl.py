"""JSON Lines: a document for each line `{"text": ...}`, named by its "id" if that is a string, else "a.jsonl:12".

`jsonl_documents` reads small files whole. `JsonlChunks` goes through large ones once, to note where the lines are and
what the contents' digest is, and reads and checks a megabyte at a time when the run comes to it. Compressed files are
read as the plain ones are; large ones are unpacked first (`unpack.py`).
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Iterable, Iterator, Sequence
from pathlib import Path
from typing import IO, NamedTuple

from nsa.data.errors import DataError, shortened
from nsa.data.progress import Progress
from nsa.data.sources.base import Document, Documents, SourceFile, digest_of
from nsa.data.sources.chunked import FileChunks
from nsa.data.sources.contents import HEAD_BYTES, decode_utf8, read_up_to, refuse_other_kinds, text_of
from nsa.data.sources.files import NamedFile, unreadable
from nsa.data.sources.unpack import is_packed, unpacked

CHUNK_BYTES = 2**20
MAX_LINE_BYTES = 2**30  # a longer "line" is no document, and would fill the memory


def jsonl_documents(files: Sequence[NamedFile], text_column: str, limit_bytes: int) -> Documents | None:
    """All documents of the files, in memory; None if the files are larger, unpacked, than `limit_bytes`.

    Raises:
        DataError: a file or a line of it cannot be used.
    """
    sizes = [file.path.stat().st_size for file in files]
    if sum(size for size, file in zip(sizes, files, strict=True) if not is_packed(file.path)) > limit_bytes:
        return None
    names, texts, index = [], [], []
    room = limit_bytes
    for file, size_bytes in zip(files, sizes, strict=True):
        content = read_up_to(file.path, room)
        if content is None:
            return None
        room -= len(content)
        before = len(names)
        for document, text in _parse(text_of(content, file.path), file, text_column, first_line=1):
            names.append(document)
            texts.append(text)
        digest = digest_of(*names[before:], *texts[before:])
        index.append(SourceFile(file.name, size_bytes, len(names) - before, digest=digest))
    return Documents(names, texts, index)


class Stretch(NamedTuple):
    """Where a chunk lies: whole lines of one file, and the digest of their bytes."""

    file: int
    offset: int
    size_bytes: int
    first_line: int
    num_documents: int
    digest: str


class JsonlChunks(FileChunks):
    """The documents of large files, by chunks of about a megabyte.

    Args:
        files: names and paths.
        text_column: the field of the text.
        cache_folder: where compressed files are unpacked; unset: ~/.cache/nsa.

    Raises:
        DataError: a file cannot be read or holds no line.
    """

    def __init__(self, files: Sequence[NamedFile], text_column: str = "text", cache_folder: str | None = None) -> None:
        self._files, self._text_column = list(files), text_column
        self._plain_paths = [unpacked(file.path, cache_folder) for file in files]
        digest = hashlib.blake2b(digest_size=16)
        self._stretches: list[Stretch] = []
        index = []
        for number, file in enumerate(files):
            try:
                stretches = list(_stretches(number, file.path, self._plain_paths[number], digest))
                size_bytes = file.path.stat().st_size
            except OSError as error:
                raise unreadable(file.path, error) from error
            of_file = digest_of(*(stretch.digest for stretch in stretches))
            num_documents = sum(stretch.num_documents for stretch in stretches)
            index.append(SourceFile(file.name, size_bytes, num_documents, digest=of_file))
            digest.update(f"\0{file.plain_name}".encode())
            self._stretches += stretches
        if text_column != "text":
            digest.update(f"\0{text_column}".encode())
        super().__init__(digest.hexdigest(), index, [stretch.num_documents for stretch in self._stretches])

    def read(self, chunk: int) -> list[Document]:
        stretch = self._stretches[chunk]
        file, plain_path = self._files[stretch.file], self._plain_paths[stretch.file]
        try:
            with plain_path.open("rb") as opened:
                opened.seek(stretch.offset)
                content = opened.read(stretch.size_bytes)
        except OSError as error:
            raise unreadable(plain_path, error) from error
        if digest_of(content) != stretch.digest:
            how = "has become shorter" if len(content) < stretch.size_bytes else "has changed"
            raise DataError(
                f"{plain_path}:{stretch.first_line} or soon after {how} since the run began; put the file back as it "
                f"was and resume"
            )
        text = decode_utf8(content, file.path, first_line=stretch.first_line)
        rows = list(_parse(text, file, self._text_column, first_line=stretch.first_line))
        return self.numbered(chunk, [row[0] for row in rows], [row[1] for row in rows])


def _stretches(number: int, path: Path, plain_path: Path, digest: hashlib.blake2b) -> Iterator[Stretch]:
    progress = Progress(f"indexing {path}", plain_path.stat().st_size)
    offset, first_line = 0, 1
    with plain_path.open("rb") as file:
        refuse_other_kinds(path, file.read(HEAD_BYTES))
        file.seek(0)
        while content := _whole_lines(file, path, first_line):
            digest.update(content)
            if num_documents := sum(1 for line in content.split(b"\n") if line.strip()):
                yield Stretch(number, offset, len(content), first_line, num_documents, digest_of(content))
            elif offset == 0:
                raise DataError(f"{path} is empty; remove it from data.paths or fill it")
            offset += len(content)
            first_line += content.count(b"\n")
            progress.reached(offset)
    if offset == 0:
        raise DataError(f"{path} is empty; remove it from data.paths or fill it")


def _whole_lines(file: IO[bytes], path: Path, first_line: int) -> bytes:
    """The next `CHUNK_BYTES` of a file and what is left of their last line; more where they are blank."""
    parts = [file.read(CHUNK_BYTES)]
    is_blank = not parts[0].strip()
    while parts[-1] and (is_blank or not parts[-1].endswith(b"\n")):
        parts.append(file.readline(MAX_LINE_BYTES))
        is_blank = is_blank and not parts[-1].strip()
        if len(parts[-1]) == MAX_LINE_BYTES:
            line = first_line + sum(part.count(b"\n") for part in parts[:-1])
            raise DataError(f"{path}:{line} is longer than {MAX_LINE_BYTES:,} bytes; is it JSON Lines?")
    return b"".join(parts)


def _parse(text: str, file: NamedFile, text_column: str, *, first_line: int) -> Iterator[tuple[str, str]]:
    for number, line in _numbered(text.split("\n"), first_line):
        row = _parse_line(line, f"{file.path}:{number}", text_column)
        document = row.get("id")
        yield document if isinstance(document, str) else f"{file.plain_name}:{number}", str(row[text_column])


def _numbered(lines: Iterable[str], first_line: int) -> Iterator[tuple[int, str]]:
    return ((number, line) for number, line in enumerate(lines, start=first_line) if line.strip())


def _parse_line(line: str, where: str, column: str) -> dict[str, object]:
    try:
        row = json.loads(line)
    except json.JSONDecodeError as error:
        remedy = _as_lines(line) or "repair or remove the line"
        raise DataError(f"{where} is not JSON ({error.msg} at column {error.colno}); {remedy}") from error
    except (ValueError, RecursionError) as error:  # a number of thousands of digits, lists in lists in lists
        raise DataError(f"{where} is JSON that Python does not read ({error}); repair or remove the line") from error
    if not isinstance(row, dict):
        remedy = _as_lines(line) or "repair or remove the line"
        raise DataError(f'{where} has a {type(row).__name__} but must be an object with "{column}"; {remedy}')
    if column not in row:
        keys = shortened(list(row))
        raise DataError(
            f'{where} has the keys {keys} but must be an object with "{column}"; set data.text_column to the one that '
            f"has the text, or remove the line"
        )
    if not isinstance(row[column], str):
        kind = type(row[column]).__name__
        raise DataError(f'{where}: "{column}" is a {kind}, not a string; repair or remove the line')
    for key in (column, "id"):
        if not _encodable(row.get(key)):
            raise DataError(
                f'{where}: "{key}" has half of a surrogate pair, which is no character; repair or remove the line'
            )
    return row


def _as_lines(line: str) -> str | None:
    """What makes JSON Lines of one JSON value over many lines; None for a line that is no beginning of such a one."""
    start = line.strip()
    if start.startswith("["):
        return "if the file is one JSON list, make a line of each document with: jq -c '.[]'"
    if start == "{":
        return "if an object lies over several lines, make one of them with: jq -c ."
    if start.startswith("<"):
        return "this is HTML or XML, as a failed download leaves it; download the file again"
    return None


def _encodable(value: object) -> bool:
    try:
        _ = isinstance(value, str) and value.encode()
    except UnicodeEncodeError:
        return False
    return True
