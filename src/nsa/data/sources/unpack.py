"""Large compressed files, unpacked once into a folder, so that any part of them can be read when it is due.

A compressed stream can only be read from its beginning; the chunks of a large file are read in drawn order. So the file
is unpacked to `FOLDER/unpacked/DIGEST`, named by the digest of the compressed contents, and found there the next time.
"""

from __future__ import annotations

import hashlib
import os
from pathlib import Path

from filelock import FileLock

from nsa.data.errors import DataError
from nsa.data.progress import Progress, say
from nsa.data.sources.contents import HEAD_BYTES, READ_BYTES, compression_of, read_parts
from nsa.data.sources.files import check_regular, unreadable

DEFAULT_FOLDER = "~/.cache/nsa"


def is_packed(path: Path) -> bool:
    """Whether a file is compressed, by its contents."""
    check_regular(path)
    try:
        with path.open("rb") as file:
            return compression_of(path, file.read(HEAD_BYTES)) is not None
    except OSError as error:
        raise unreadable(path, error) from error


def unpacked(path: Path, folder: str | None) -> Path:
    """Where the contents of a file lie as they are: itself, or its unpacked copy, which is made unless it is there.

    Args:
        path: the file.
        folder: for the copy; unset: ~/.cache/nsa.

    Raises:
        DataError: the file is damaged, or the folder has no room.
    """
    if not is_packed(path):
        return path
    place = Path(os.path.expanduser(folder or DEFAULT_FOLDER)) / "unpacked" / _digest(path)
    try:
        place.parent.mkdir(parents=True, exist_ok=True)
        with FileLock(f"{place}.lock"):  # the processes of a run come here together
            if not place.is_file():
                _unpack(path, place)
    except OSError as error:
        raise DataError(
            f"{path} cannot be unpacked to {place.parent}: {error.strerror or error}; set data.cache_folder to a "
            f"folder with room, or unpack the file yourself"
        ) from error
    return place


def _unpack(path: Path, place: Path) -> None:
    say(f"unpacking {path} to {place}, once; remove that file when no run reads it any more")
    part = place.with_name(f".{place.name}.part")
    progress, num_bytes = Progress(f"unpacking {path}, bytes", 0), 0
    try:
        with part.open("wb") as file:
            for content in read_parts(path):
                file.write(content)
                num_bytes += len(content)
                progress.reached(num_bytes)
            file.flush()
            os.fsync(file.fileno())
        part.replace(place)
    finally:
        part.unlink(missing_ok=True)


def _digest(path: Path) -> str:
    digest = hashlib.blake2b(digest_size=16)
    progress, num_bytes = Progress(f"looking whether {path} is unpacked", path.stat().st_size), 0
    with path.open("rb") as file:
        while content := file.read(READ_BYTES):
            digest.update(content)
            num_bytes += len(content)
            progress.reached(num_bytes)
    return digest.hexdigest()
