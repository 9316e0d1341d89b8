"""Parquet files with a column of texts and, where there is one, an "id" column of strings: local, or streamed by parts.

A row group is a chunk. Only the columns that are used are read; a file's documents are named by "id", else by the row
they stand in, counted from 1 ("000.parquet:12"). The used columns of local files are read through once at the start for
a digest of each row group, so that a file that has changed is not taken for the one that the run began with.
"""

from __future__ import annotations

import hashlib
import threading
from collections import OrderedDict
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any, NamedTuple

from nsa.data.errors import DataError, shortened
from nsa.data.progress import Progress
from nsa.data.sources.base import Document, Documents, SourceFile, digest_of
from nsa.data.sources.chunked import FileChunks
from nsa.data.sources.contents import HEAD_BYTES, refuse_other_kinds
from nsa.data.sources.files import NamedFile, check_regular, unreadable

if TYPE_CHECKING:
    import pyarrow
    from pyarrow.parquet import ParquetFile

OPEN_FILES = 32
READ_BYTES = 2**20
PARQUET_START = b"PAR1"


class ParquetInput(NamedTuple):
    """A file, by what opens it.

    Attributes:
        name: its name among the source's files.
        place: path or address, for errors.
        open: gives what pyarrow can read, a path or an open file.
        size_bytes: its size.
        sha256: of its contents, where it is known.
        path: of a local file, whose contents are digested.
    """

    name: str
    place: str
    open: Callable[[], Any]
    size_bytes: int
    sha256: str | None = None
    path: Path | None = None


def local_inputs(files: Sequence[NamedFile]) -> list[ParquetInput]:
    """Local files as inputs.

    Raises:
        DataError: a file is not there, or is of another kind.
    """
    inputs = []
    for name, path in files:
        size_bytes = check_regular(path).st_size
        try:
            with path.open("rb") as file:
                head = file.read(HEAD_BYTES)
        except OSError as error:
            raise unreadable(path, error) from error
        if not head.startswith(PARQUET_START):
            refuse_other_kinds(path, head)
        inputs.append(ParquetInput(name, str(path), lambda path=path: path, size_bytes, path=path))
    return inputs


class Group(NamedTuple):
    """Where a chunk lies: a row group, whose first row has the number `first_row` in its file.

    Attributes:
        pieces: offset and length of its used columns in the file.
        digest: of those bytes, for local files.
    """

    file: int
    row_group: int
    first_row: int
    num_rows: int
    pieces: tuple[tuple[int, int], ...]
    digest: str | None


class ParquetChunks(FileChunks):
    """The documents of Parquet files, by row groups.

    Args:
        inputs: the files, in order.
        text_column: the column of the texts.
        identity: digest of the contents where the caller knows one; local files are read through for theirs.

    Raises:
        DataError: a file is missing, not Parquet, truncated, empty, or without a text column.
    """

    def __init__(self, inputs: Sequence[ParquetInput], text_column: str = "text", identity: str | None = None) -> None:
        self._inputs, self._text_column = list(inputs), text_column
        self._opened: OrderedDict[int, ParquetFile] = OrderedDict()
        self._read_lock = threading.Lock()
        self._groups: list[Group] = []
        self._states = [_state_of(source.path) for source in inputs]
        index, digests = [], [text_column]
        progress, num_bytes = Progress(f"reading {len(inputs)} Parquet files", sum(s.size_bytes for s in inputs)), 0
        for number, source in enumerate(inputs):
            groups = list(self._index_file(number, progress, num_bytes))
            num_bytes += source.size_bytes
            num_rows = sum(group.num_rows for group in groups)
            digest = digest_of(*(f"{group.num_rows} {group.digest}" for group in groups)) if source.path else None
            index.append(SourceFile(source.name, source.size_bytes, num_rows, source.sha256, digest))
            digests += [source.name, digest or ""]
            self._groups += groups
        super().__init__(identity or digest_of(*digests), index, [group.num_rows for group in self._groups])

    def read(self, chunk: int) -> list[Document]:
        return self.numbered(chunk, *self._read(chunk, [self._text_column, "id"]))

    def read_names(self, chunk: int) -> Sequence[str]:
        return self._read(chunk, ["id"])[0]

    def _index_file(self, number: int, progress: Progress, num_bytes_before: int) -> Iterator[Group]:
        source, file = self._inputs[number], self._file(number)
        schema, used = file.schema_arrow, [self._text_column]
        for column in (self._text_column, "id"):
            if schema.names.count(column) > 1:
                raise DataError(f'{source.place} has several columns "{column}"; rename all but one')
        kind = schema.field(self._text_column).type if self._text_column in schema.names else None
        if kind is None or not _is_text(kind):
            raise DataError(
                f'{source.place} must have a column "{self._text_column}" of strings, but has '
                f"{shortened(schema.names)}{f' with {self._text_column} of {kind}' if kind else ''}; set "
                f"data.text_column to the one that has the text, or leave the file out of data.paths"
            )
        if not file.metadata.num_rows:
            raise DataError(f"{source.place} has no rows; remove it from data.paths")
        used += ["id"] if self._has_ids(file) else []
        first_row = 1
        for row_group in range(file.metadata.num_row_groups):
            metadata = file.metadata.row_group(row_group)
            pieces = _pieces(metadata, used)
            digest = _digest(source.path, pieces) if source.path else None
            yield Group(number, row_group, first_row, metadata.num_rows, pieces, digest)
            first_row += metadata.num_rows
            progress.reached(num_bytes_before + sum(pieces[-1]))

    def _has_ids(self, file: ParquetFile) -> bool:
        schema = file.schema_arrow
        return "id" in schema.names and self._text_column != "id" and _is_text(schema.field("id").type)

    def _read(self, chunk: int, columns: list[str]) -> tuple[list[str], list[str]]:
        """Names and texts of a row group; no texts if they are not among the columns."""
        group = self._groups[chunk]
        source = self._inputs[group.file]
        where = f"{source.place}, row group {group.row_group} (rows from {group.first_row})"
        with self._read_lock:
            file = self._file(group.file)
            named = self._has_ids(file)
            present = [column for column in columns if column == self._text_column or named]
            table = self._guarded(
                where, lambda: file.read_row_group(group.row_group, columns=present) if present else None
            )
        self._check_unchanged(group, where)
        names: list[Any] = [None] * group.num_rows
        if named:
            names = self._guarded(where, lambda: _strings(table.column("id")))
        names = [f"{source.name}:{group.first_row + row}" if name is None else name for row, name in enumerate(names)]
        if self._text_column not in columns:
            return names, []
        texts = self._guarded(where, lambda: _strings(table.column(self._text_column)))
        for row, text in enumerate(texts):
            if text is None:
                raise DataError(
                    f"{source.place}, row {group.first_row + row} (row group {group.row_group}) has no text; remove "
                    f"the row, or the file from data.paths"
                )
        return names, texts

    def _check_unchanged(self, group: Group, where: str) -> None:
        """Raise if the file is not as it was at the start: its state tells at once, its contents if the state differs.

        An open file that was removed can still be read.
        """
        path = self._inputs[group.file].path
        if path is None or not path.exists() or _state_of(path) == self._states[group.file]:
            return
        if _digest(path, group.pieces) != group.digest:
            raise DataError(f"{where} has changed since the run began; put the file back as it was and resume")

    def _file(self, number: int) -> ParquetFile:
        """An open file; the last few stay open."""
        if number not in self._opened:
            source = self._inputs[number]
            self._opened[number] = self._guarded(source.place, lambda: _open(source.open()))
            if len(self._opened) > OPEN_FILES:
                _, oldest = self._opened.popitem(last=False)
                oldest.close()
        self._opened.move_to_end(number)
        return self._opened[number]

    def _guarded(self, where: str, read: Callable[[], Any]) -> Any:
        """What `read` gives; its failures as errors that say where."""
        from huggingface_hub.errors import HTTPError  # pyright: ignore[reportPrivateImportUsage]
        from pyarrow import ArrowException

        try:
            return read()
        except FileNotFoundError as error:
            raise DataError(f"{where} is not there any more; put the file back") from error
        except PermissionError as error:
            raise DataError(f"{where} may not be read; give this user the right to read it") from error
        except HTTPError as error:
            raise DataError(f"{where} does not come: {error}; mend the connection and resume") from error
        except (OSError, ArrowException, UnicodeDecodeError) as error:
            raise DataError(
                f"{where} is damaged, cut off or no Parquet: {error}; write or download it again"
            ) from error


def _is_text(kind: pyarrow.DataType) -> bool:
    """Whether a column holds strings, or bytes that can be UTF-8, each as itself or by a dictionary."""
    from pyarrow import types

    if types.is_dictionary(kind):
        return _is_text(kind.value_type)
    strings = (types.is_string, types.is_large_string, types.is_string_view)
    return any(is_kind(kind) for is_kind in (*strings, types.is_binary, types.is_large_binary, types.is_binary_view))


def _strings(column: pyarrow.ChunkedArray) -> list[str | None]:
    values = column.to_pylist()
    return [value.decode() if isinstance(value, bytes) else value for value in values]


def _pieces(row_group: Any, columns: Sequence[str]) -> tuple[tuple[int, int], ...]:
    """Offset and length of the columns of a row group in their file."""
    pieces = []
    for index in range(row_group.num_columns):
        column = row_group.column(index)
        if column.path_in_schema in columns:
            start = min(column.dictionary_page_offset or column.data_page_offset, column.data_page_offset)
            pieces.append((start, column.total_compressed_size))
    return tuple(pieces)


def _digest(path: Path, pieces: Sequence[tuple[int, int]]) -> str:
    """Digest of some pieces of a file."""
    digest = hashlib.blake2b(digest_size=16)
    try:
        with path.open("rb") as file:
            for start, length in pieces:
                file.seek(start)
                while length > 0 and (part := file.read(min(READ_BYTES, length))):
                    digest.update(part)
                    length -= len(part)
    except OSError as error:
        raise unreadable(path, error) from error
    return digest.hexdigest()


def _state_of(path: Path | None) -> tuple[int, ...] | None:
    """What changes whenever a file is written or another one is put in its place."""
    if path is None:
        return None
    try:
        status = path.stat()
    except OSError as error:
        raise unreadable(path, error) from error
    return status.st_size, status.st_mtime_ns, status.st_ctime_ns, status.st_ino


def _open(place: Any) -> ParquetFile:
    return parquet_module().ParquetFile(place, pre_buffer=True, page_checksum_verification=True)


def parquet_documents(chunks: ParquetChunks) -> Documents:
    """All documents of small files, in memory.

    Raises:
        DataError: a row group cannot be read.
    """
    documents = [document for chunk in range(chunks.num_chunks) for document in chunks.read(chunk)]
    return Documents([document.name for document in documents], [document.text for document in documents], chunks.files)


def parquet_module() -> Any:
    """pyarrow.parquet.

    Raises:
        DataError: pyarrow is not installed.
    """
    try:
        import pyarrow.parquet
    except ModuleNotFoundError as error:
        raise DataError('Parquet files are read with pyarrow: pip install "nsa[train]"') from error
    return pyarrow.parquet
