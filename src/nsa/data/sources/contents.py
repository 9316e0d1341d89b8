"""What is in a file: compressed or not, UTF-8 or not, and what else it may be, so that the remedy in an error works.

for part in read_parts(Path("a.jsonl.xz")): ...      # unpacked
text = text_of(read_up_to(path, 2**20), path)
"""

from __future__ import annotations

import bz2
import codecs
import gzip
import lzma
import zlib
from collections.abc import Iterator
from pathlib import Path
from typing import IO, Any

from nsa.data.errors import DataError
from nsa.data.sources.files import PACKED, check_regular, unreadable

READ_BYTES = 2**20
HEAD_BYTES = 512
# The bytes that a file begins with -> how it is compressed. None of them begins a UTF-8 text.
COMPRESSIONS = {
    b"\x1f\x8b": "gzip",
    b"\xfd7zXZ\x00": "xz",
    b"\x28\xb5\x2f\xfd": "zstd",
}
BZIP2 = b"BZh"  # then the size of its blocks, a digit, and one of these two: blocks, or the end of an empty file
BZIP2_THEN = (b"1AY&SY", b"\x17rE8P\x90")
OTHERS = {
    b"PAR1": ("a Parquet file", 'set data.source to "parquet"'),
    b"PK\x03\x04": ("a zip archive", "unpack it with: unzip"),
    b"%PDF": ("a PDF", "take the text out of it, for example with: pdftotext"),
    b"ARROW1": ("an Arrow file", "write it as Parquet"),
    b"SQLite format 3": ("an SQLite database", "write its texts as JSON Lines"),
    b"\x89HDF": ("an HDF5 file", "write its texts as JSON Lines"),
    b"\x93NUMPY": ("a NumPy array", "give texts, not tokens"),
    b"7z\xbc\xaf": ("a 7z archive", "unpack it with: 7z x"),
    b"Rar!": ("a RAR archive", "unpack it with: unrar x"),
    b"\x04\x22\x4d\x18": ("compressed with lz4", "unpack it with: unlz4"),
    b"\x1f\x9d": ("compressed with compress", "unpack it with: gunzip"),
    b"\x89PNG": ("a picture", "leave it out of data.paths"),
    b"\xff\xd8\xff": ("a picture", "leave it out of data.paths"),
    b"\x7fELF": ("a program", "leave it out of data.paths"),
    b"\xd0\xcf\x11\xe0": ("an Office document", "save its text as UTF-8"),
    b"{\\rtf": ("an RTF document", "save its text as UTF-8"),
    b"version https://git-lfs": ("a pointer of Git LFS in place of the file", "fetch the file with: git lfs pull"),
    codecs.BOM_UTF32_LE: ("UTF-32", "convert it with: iconv -f utf-32 -t utf-8"),
    codecs.BOM_UTF32_BE: ("UTF-32", "convert it with: iconv -f utf-32 -t utf-8"),
    codecs.BOM_UTF16_LE: ("UTF-16", "convert it with: iconv -f utf-16 -t utf-8"),
    codecs.BOM_UTF16_BE: ("UTF-16", "convert it with: iconv -f utf-16 -t utf-8"),
}
TAR_AT, TAR = 257, b"ustar"
CONTROLS_IN = 4096  # bytes of a file that are looked at for control codes


def read_parts(path: Path) -> Iterator[bytes]:
    """The contents of a file, unpacked where it is compressed.

    Raises:
        DataError: it cannot be read, is damaged, or is of another kind than text.
    """
    check_regular(path)
    try:
        with path.open("rb") as file:
            compression = compression_of(path, file.read(HEAD_BYTES))
            file.seek(0)
            with _unpacked(file, compression) as plain:
                part = plain.read(READ_BYTES)
                refuse_other_kinds(path, part[:HEAD_BYTES])
                while part:
                    yield part
                    part = plain.read(READ_BYTES)
    except (EOFError, zlib.error, lzma.LZMAError) as error:
        raise _damaged(path, error) from error
    except OSError as error:  # those of the system have a number, those of the formats have none
        raise (_damaged(path, error) if error.errno is None else unreadable(path, error)) from error


def read_up_to(path: Path, limit_bytes: int) -> bytes | None:
    """The contents of a file, unpacked; None if they are more than `limit_bytes`."""
    parts, num_bytes = [], 0
    for part in read_parts(path):
        parts.append(part)
        num_bytes += len(part)
        if num_bytes > limit_bytes:
            return None
    return b"".join(parts)


def compression_of(path: Path, head: bytes) -> str | None:
    """How a file that begins with `head` is compressed; None if it is not.

    Raises:
        DataError: its name says that it is, and it is not.
    """
    if head.startswith(BZIP2) and head[4:10] in BZIP2_THEN:
        return "bzip2"
    for signature, compression in COMPRESSIONS.items():
        if head.startswith(signature):
            return compression
    if head and path.name.endswith(PACKED):
        raise DataError(
            f"{path} is called {path.suffix} but is not compressed in that way; download it again, or rename it to "
            f"{path.with_suffix('').name}"
        )
    return None


def refuse_other_kinds(path: Path, head: bytes) -> None:
    """Raise a `DataError` that names the way to the text if a file that begins with `head` is no UTF-8."""
    for signature, (kind, remedy) in OTHERS.items():
        if head.startswith(signature):
            raise DataError(f"{path} is {kind}, not UTF-8 text; {remedy}")
    if head[TAR_AT:].startswith(TAR):
        raise DataError(f"{path} is a tar archive, not UTF-8 text; unpack it with: tar -xf")
    if compression := next((name for start, name in COMPRESSIONS.items() if head.startswith(start)), None):
        raise DataError(f"{path} is compressed twice, inside with {compression}; unpack it once")
    num_zeros = head.count(0)
    if num_zeros > len(head) // 8:
        # UTF-16 without a mark at its start: of Latin letters, every other byte is zero.
        if head[1::2].count(0) > 0.9 * num_zeros and num_zeros < len(head):
            raise DataError(f"{path} looks like UTF-16; convert it with: iconv -f utf-16le -t utf-8")
        if head[::2].count(0) > 0.9 * num_zeros and num_zeros < len(head):
            raise DataError(f"{path} looks like UTF-16; convert it with: iconv -f utf-16be -t utf-8")
        raise DataError(f"{path} is no text: {num_zeros} of its first {len(head)} bytes are zero; leave it out")


def decode_utf8(content: bytes, path: Path, *, first_line: int = 1) -> str:
    """Text of bytes that begin at line `first_line` of a file; a byte-order mark at its start is no part of it.

    Raises:
        DataError: they are not UTF-8.
    """
    if first_line == 1:
        content = content.removeprefix(codecs.BOM_UTF8)
    try:
        return content.decode()
    except UnicodeDecodeError as error:
        line = first_line + content.count(b"\n", 0, error.start)
        raise DataError(
            f"{path}:{line} is not UTF-8 (byte {content[error.start]:#04x} at offset {error.start}); "
            f"{_way_to_utf8(content, error)}"
        ) from error


def text_of(content: bytes, path: Path) -> str:
    """The text of a whole file, line ends as they are.

    Raises:
        DataError: it is not UTF-8, or holds nothing.
    """
    text = decode_utf8(content, path)
    if not text.strip():
        raise DataError(f"{path} is empty; remove it from data.paths or fill it")
    return text


def _way_to_utf8(content: bytes, error: UnicodeDecodeError) -> str:
    """A remedy that makes the text which was meant."""
    if error.reason == "unexpected end of data":
        return "it ends inside a character: the file is cut off; get it whole"
    controls = sum(byte < 32 and byte not in b"\t\n\r\f" for byte in content[:CONTROLS_IN])
    if controls > min(len(content), CONTROLS_IN) // 20:
        return f"it is no text: {controls} of its first {min(len(content), CONTROLS_IN)} bytes are control codes"
    if not content[: error.start].isascii():
        return "the text before it is UTF-8: repair the place, or drop such bytes with: iconv -f utf-8 -t utf-8 -c"
    # Windows writes quotes and dashes where Latin-1 has control codes.
    encoding = "cp1252" if any(0x80 <= byte < 0xA0 for byte in content) else "latin1"
    return f"convert it, for example with: iconv -f {encoding} -t utf-8"


def _unpacked(file: IO[bytes], compression: str | None) -> Any:
    match compression:
        case "gzip":
            return gzip.open(file)
        case "bzip2":
            return bz2.open(file)
        case "xz":
            return lzma.open(file)
        case "zstd":
            return _unpacked_zstd(file)
        case _:
            return file


def _unpacked_zstd(file: IO[bytes]) -> Any:
    try:
        from pyarrow import input_stream
    except ModuleNotFoundError as error:
        raise DataError('files compressed with zstd are read with pyarrow: pip install "nsa[train]"') from error
    return input_stream(file, compression="zstd")


def _damaged(path: Path, error: Exception) -> DataError:
    if "too much memory" in str(error):
        return DataError(f"{path} was compressed with a long window; unpack it yourself with: zstd -d --long=31")
    return DataError(f"{path} is damaged or cut off: {error}; download or compress it again")
