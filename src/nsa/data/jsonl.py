"""JSON Lines: a document for each line `{"text": ...}`, named by its "id" if that is a string, else "a.jsonl:12".

`jsonl_documents` reads small files whole. `JsonlBlocks` goes through large ones once, to note where the lines are and
what the contents' digest is, and reads and checks a megabyte at a time when the run comes to it.
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Iterable, Iterator, Sequence
from pathlib import Path
from typing import NamedTuple

from nsa.data.blocks import Block, FileBlocks, SourceFile
from nsa.data.documents import Documents
from nsa.data.errors import DataError
from nsa.data.files import decode_utf8, read_utf8, unreadable
from nsa.data.progress import Progress

BLOCK_BYTES = 2**20
NamedFile = tuple[str, Path]


def jsonl_documents(files: Sequence[NamedFile]) -> Documents:
    """All documents of the files, in memory.

    Raises:
        DataError: a file or a line of it cannot be used.
    """
    names, texts, index = [], [], []
    for name, path in files:
        before = len(names)
        for document, text in _parse(read_utf8(path), name, path, first_line=1):
            names.append(document)
            texts.append(text)
        index.append(SourceFile(name, path.stat().st_size, len(names) - before))
    return Documents(names, texts, index)


class Stretch(NamedTuple):
    """Where a block lies: whole lines of one file."""

    file: int
    offset: int
    size_bytes: int
    first_line: int
    num_documents: int


class JsonlBlocks(FileBlocks):
    """The documents of large files, by blocks of about a megabyte.

    Args:
        files: names and paths.

    Raises:
        DataError: a file cannot be read or holds no line.
    """

    def __init__(self, files: Sequence[NamedFile]) -> None:
        self._paths = list(files)
        digest = hashlib.blake2b(digest_size=16)
        self._stretches: list[Stretch] = []
        index = []
        for number, (name, path) in enumerate(files):
            try:
                stretches = list(_stretches(number, path, digest))
                index.append(SourceFile(name, path.stat().st_size, sum(s.num_documents for s in stretches)))
            except OSError as error:
                raise unreadable(path, error) from error
            digest.update(f"\0{name}".encode())
            self._stretches += stretches
        super().__init__(digest.hexdigest(), index, [stretch.num_documents for stretch in self._stretches])

    def read_block(self, block: int) -> Block:
        stretch = self._stretches[block]
        name, path = self._paths[stretch.file]
        try:
            with path.open("rb") as file:
                file.seek(stretch.offset)
                content = file.read(stretch.size_bytes)
        except OSError as error:
            raise unreadable(path, error) from error
        if len(content) < stretch.size_bytes:
            raise DataError(
                f"{path}:{stretch.first_line} is where the file now ends, or soon after: it has become shorter since "
                f"the run began; put the file back as it was and resume"
            )
        text = decode_utf8(content, path, first_line=stretch.first_line)
        rows = list(_parse(text, name, path, first_line=stretch.first_line))
        if len(rows) != stretch.num_documents:
            raise DataError(
                f"{path}:{stretch.first_line} and the lines behind it hold {len(rows)} documents, not the "
                f"{stretch.num_documents} of when the run began; put the file back as it was and resume"
            )
        return Block(int(self.bounds[block]), [row[0] for row in rows], [row[1] for row in rows])


def _stretches(number: int, path: Path, digest: hashlib.blake2b) -> Iterator[Stretch]:
    progress = Progress(f"indexing {path}", path.stat().st_size)
    offset = size_bytes = num_documents = line_number = 0
    first_line = 1
    with path.open("rb") as file:
        for line_number, line in enumerate(file, start=1):
            digest.update(line)
            size_bytes += len(line)
            num_documents += not line.isspace()
            if size_bytes >= BLOCK_BYTES and num_documents:
                yield Stretch(number, offset, size_bytes, first_line, num_documents)
                offset, size_bytes, num_documents, first_line = offset + size_bytes, 0, 0, line_number + 1
                progress.reached(offset)
    if num_documents:
        yield Stretch(number, offset, size_bytes, first_line, num_documents)
    elif offset == 0:
        raise DataError(f"{path} is empty; remove it from data.paths or fill it")


def _parse(text: str, name: str, path: Path, *, first_line: int) -> Iterator[tuple[str, str]]:
    for number, line in _numbered(text.split("\n"), first_line):
        row = _parse_line(line, f"{path}:{number}")
        document = row.get("id")
        yield document if isinstance(document, str) else f"{name}:{number}", str(row["text"])


def _numbered(lines: Iterable[str], first_line: int) -> Iterator[tuple[int, str]]:
    return ((number, line) for number, line in enumerate(lines, start=first_line) if line.strip())


def _parse_line(line: str, where: str) -> dict[str, object]:
    try:
        row = json.loads(line)
    except json.JSONDecodeError as error:
        raise DataError(
            f"{where} is not JSON ({error.msg} at column {error.colno}); repair or remove the line"
        ) from error
    except (ValueError, RecursionError) as error:  # a number of thousands of digits, lists in lists in lists
        raise DataError(f"{where} is JSON that Python does not read ({error}); repair or remove the line") from error
    if not isinstance(row, dict) or "text" not in row:
        keys = f"the keys {sorted(row)}" if isinstance(row, dict) else f"a {type(row).__name__}"
        raise DataError(f'{where} has {keys} but must be an object with "text"; rename the field or remove the line')
    if not isinstance(row["text"], str):
        raise DataError(f'{where}: "text" is a {type(row["text"]).__name__}, not a string; repair or remove the line')
    for key in ("text", "id"):
        if not _encodable(row.get(key)):
            raise DataError(
                f'{where}: "{key}" has half of a surrogate pair, which is no character; repair or remove the line'
            )
    return row


def _encodable(value: object) -> bool:
    try:
        _ = isinstance(value, str) and value.encode()
    except UnicodeEncodeError:
        return False
    return True
