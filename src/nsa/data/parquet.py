"""Parquet files with a "text" column and, where there is one, an "id" column of strings: local, or streamed by parts.

A row group is a block. Only the columns that are used are read; a file's documents are named by "id", else by the row
they stand in, counted from 1 ("000.parquet:12").
"""

from __future__ import annotations

import hashlib
import threading
from collections import OrderedDict
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any, NamedTuple

from nsa.data.blocks import Block, FileBlocks, SourceFile
from nsa.data.documents import Documents
from nsa.data.errors import DataError
from nsa.data.files import unreadable
from nsa.data.progress import Progress

if TYPE_CHECKING:
    from pyarrow.parquet import ParquetFile

OPEN_FILES = 32
STRING_TYPES = ("string", "large_string")


class ParquetInput(NamedTuple):
    """A file, by what opens it.

    Attributes:
        name: its name among the source's files.
        place: path or address, for errors.
        open: gives what pyarrow can read, a path or an open file.
        size_bytes: its size.
        sha256: of its contents, where it is known.
    """

    name: str
    place: str
    open: Callable[[], Any]
    size_bytes: int
    sha256: str | None = None


def local_inputs(files: Sequence[tuple[str, Path]]) -> list[ParquetInput]:
    """Local files as inputs.

    Raises:
        DataError: a file is not there.
    """
    inputs = []
    for name, path in files:
        try:
            inputs.append(ParquetInput(name, str(path), lambda path=path: path, path.stat().st_size))
        except OSError as error:
            raise unreadable(path, error) from error
    return inputs


class Group(NamedTuple):
    """Where a block lies: a row group, whose first row has the number `first_row` in its file."""

    file: int
    row_group: int
    first_row: int
    num_rows: int


class ParquetBlocks(FileBlocks):
    """The documents of Parquet files, by row groups.

    Args:
        inputs: the files, in order.
        identity: digest of the contents where the caller knows one; the files' footers are digested unless given.

    Raises:
        DataError: a file is missing, not Parquet, truncated, empty, or without a text column.
    """

    def __init__(self, inputs: Sequence[ParquetInput], identity: str | None = None) -> None:
        self._inputs = list(inputs)
        self._opened: OrderedDict[int, ParquetFile] = OrderedDict()
        self._read_lock = threading.Lock()
        self._groups: list[Group] = []
        index, digest = [], hashlib.blake2b(digest_size=16)
        progress = Progress(f"reading the footers of {len(inputs)} Parquet files", len(inputs))
        for number, source in enumerate(inputs):
            num_rows = self._index_file(number, digest)
            index.append(SourceFile(source.name, source.size_bytes, num_rows, source.sha256))
            progress.reached(number + 1)
        sizes = [group.num_rows for group in self._groups]
        super().__init__(identity or digest.hexdigest(), index, sizes)

    def read_block(self, block: int) -> Block:
        names, texts = self._read(block, ["text", "id"])
        return Block(int(self.bounds[block]), names, texts)

    def read_names(self, block: int) -> tuple[int, Sequence[str]]:
        return int(self.bounds[block]), self._read(block, ["id"])[0]

    def _index_file(self, number: int, digest: hashlib.blake2b) -> int:
        import pyarrow

        source, file = self._inputs[number], self._file(number)
        for column in ("text", "id"):
            if file.schema_arrow.names.count(column) > 1:
                raise DataError(f'{source.place} has several columns "{column}"; rename all but one')
        kind = file.schema_arrow.field("text").type if "text" in file.schema_arrow.names else None
        if kind is None or not (pyarrow.types.is_string(kind) or pyarrow.types.is_large_string(kind)):
            raise DataError(
                f'{source.place} must have a column "text" of strings, but has {file.schema_arrow.names}'
                f"{f' with text of {kind}' if kind else ''}; rename the column or leave the file out of data.paths"
            )
        metadata, first_row = file.metadata, 1
        digest.update(f"{source.name} {source.size_bytes} {metadata.serialized_size} {metadata.num_rows}".encode())
        text_column = metadata.schema.names.index("text")
        for row_group in range(metadata.num_row_groups):
            group = metadata.row_group(row_group)
            self._groups.append(Group(number, row_group, first_row, group.num_rows))
            first_row += group.num_rows
            text = group.column(text_column)
            sizes = (group.num_rows, text.total_compressed_size, text.total_uncompressed_size)
            digest.update(f"{sizes} {text.statistics and (text.statistics.min, text.statistics.max)}".encode())
        if not metadata.num_rows:
            raise DataError(f"{source.place} has no rows; remove it from data.paths")
        return metadata.num_rows

    def _read(self, block: int, columns: list[str]) -> tuple[list[str], list[str]]:
        """Names and texts of a row group; no texts if they are not among the columns."""
        group = self._groups[block]
        source = self._inputs[group.file]
        where = f"{source.place}, row group {group.row_group} (rows from {group.first_row})"
        with self._read_lock:
            file = self._file(group.file)
            named = "id" in file.schema_arrow.names and str(file.schema_arrow.field("id").type) in STRING_TYPES
            present = [column for column in columns if column == "text" or named]
            table = self._guarded(
                where, lambda: file.read_row_group(group.row_group, columns=present) if present else None
            )
        names: list[Any] = table.column("id").to_pylist() if named else [None] * group.num_rows
        names = [f"{source.name}:{group.first_row + row}" if name is None else name for row, name in enumerate(names)]
        if "text" not in columns:
            return names, []
        texts = self._guarded(where, lambda: table.column("text").to_pylist())
        for row, text in enumerate(texts):
            if text is None:
                raise DataError(
                    f"{source.place}, row {group.first_row + row} (row group {group.row_group}) has no text; remove "
                    f"the row, or the file from data.paths"
                )
        return names, texts

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


def _open(place: Any) -> ParquetFile:
    return parquet_module().ParquetFile(place, pre_buffer=True, page_checksum_verification=True)


def parquet_documents(blocks: ParquetBlocks) -> Documents:
    """All documents of small files, in memory.

    Raises:
        DataError: a row group cannot be read.
    """
    names: list[str] = []
    texts: list[str] = []
    for block in range(blocks.num_blocks):
        content = blocks.read_block(block)
        names += content.names
        texts += content.texts
    return Documents(names, texts, blocks.files)


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
