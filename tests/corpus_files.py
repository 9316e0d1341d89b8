"""Small local files in the formats of large corpora."""

from __future__ import annotations

import json
import os
from collections.abc import Sequence
from pathlib import Path

import pyarrow
import pyarrow.parquet

from nsa.data import DataConfig, open_source

TEXTS = [f"text {index} " + "é世" * (index % 7) for index in range(57)]
NAMES = [f"<urn:uuid:{index}>" for index in range(57)]


def write_parquet(path: Path, texts: Sequence[str | None], ids: Sequence[str] | None, rows_in_group: int = 10) -> Path:
    """A file with some of FineWeb-Edu's columns, "id" only if given."""
    columns: dict[str, list] = {"text": list(texts)} | ({"id": list(ids)} if ids is not None else {})
    columns |= {"dump": ["CC-MAIN-2024-10"] * len(texts), "score": [3.5] * len(texts), "int_score": [4] * len(texts)}
    schema = [pyarrow.field("text", pyarrow.string())]
    schema += [pyarrow.field("id", pyarrow.string())] if ids is not None else []
    table = pyarrow.table(columns).cast(
        pyarrow.schema([*schema, ("dump", pyarrow.string()), ("score", pyarrow.float64()), ("int_score", "int64")])
    )
    pyarrow.parquet.write_table(table, path, row_group_size=rows_in_group, write_page_checksum=True)
    return path


def write_jsonl(path: Path, texts: Sequence[str], ids: Sequence[str] | None = None) -> Path:
    """A line for each text."""
    rows = [{"text": text} | ({"id": ids[index]} if ids else {}) for index, text in enumerate(texts)]
    path.write_text("".join(json.dumps(row, ensure_ascii=False) + "\n" for row in rows), encoding="utf-8")
    return path


def write_plain_parquet(path: Path) -> Path:
    """Texts as they are in the file, without checksums, so that a letter can be changed and nothing else."""
    table = pyarrow.table({"text": TEXTS, "id": NAMES})
    pyarrow.parquet.write_table(table, path, row_group_size=10, compression="NONE", use_dictionary=False)
    return path


def change(path: Path, old: bytes, new: bytes, *, replace: bool, keep_times: bool) -> None:
    """Put `new` in the place of `old`, in the file itself or by another file."""
    status, content = path.stat(), path.read_bytes()
    assert content.count(old) == 1
    assert len(old) == len(new)
    target = path.with_name("other") if replace else path
    target.write_bytes(content.replace(old, new))
    if keep_times:
        os.utime(target, ns=(status.st_atime_ns, status.st_mtime_ns))
    target.replace(path)


def read(source: str, *paths: Path, **options: str) -> dict[str, str]:
    """Texts by names, which are all different."""
    documents = open_source(DataConfig(source=source, paths=tuple(map(str, paths)), **options))
    found = {document.name: document.text for document in documents}
    assert len(found) == len(documents)
    return found


def zstd(content: bytes) -> bytes:
    """Compressed."""
    return bytes(pyarrow.compress(content, codec="zstd", asbytes=True))
