"""FineWeb-Edu and other datasets of the Hugging Face Hub, and Tiny Shakespeare: downloads that are pinned and checked.

The Hub's list of files with their sizes and SHA-256 is the index and the identity of the data. With access "cache" the
files are downloaded once, by huggingface_hub, which checks and resumes; with "stream" their row groups are read by
HTTP ranges when they are due. An unreachable Hub is an error after a few seconds.
"""

from __future__ import annotations

import hashlib
import os
import urllib.request
from collections.abc import Callable
from pathlib import Path
from typing import TYPE_CHECKING, Any

from nsa.data.config import DataConfig
from nsa.data.errors import DataError
from nsa.data.progress import say
from nsa.data.sources.files import check_regular, unreadable
from nsa.data.sources.parquet import ParquetChunks, ParquetInput
from nsa.data.sources.unpack import DEFAULT_FOLDER
from nsa.terminal import redacted

if TYPE_CHECKING:
    from huggingface_hub.hf_api import RepoFile

PROBE_TIMEOUT_S = 5.0
DOWNLOAD_TIMEOUT_S = 20.0
STREAM_BLOCK_BYTES = 2**20

SHAKESPEARE_URL = "https://raw.githubusercontent.com/karpathy/char-rnn/master/data/tinyshakespeare/input.txt"
SHAKESPEARE_BYTES = 1_115_394
SHAKESPEARE_SHA256 = "86c4e6aa9db7c042ec79f339dcb96d42b0075e16b8fc2e86bf0ca57e2dc565ed"


def check_hub(kind: str, repo: str, revision: str | None = None) -> None:
    """One short request for a repository, without retries, so that a Hub that is away is known at once.

    Args:
        kind: "dataset" or "model".
        repo: its name, owner/name.
        revision: a commit or branch of it.

    Raises:
        DataError: the Hub does not answer, or has no such repository or revision.
    """
    from huggingface_hub import HfApi
    from huggingface_hub.errors import (
        HfHubHTTPError,
        HFValidationError,
        HTTPError,  # pyright: ignore[reportPrivateImportUsage]
    )

    api = HfApi()
    place = redacted(str(api.endpoint))
    what = f"{kind} {repo}{f' at revision {revision}' if revision else ''}"
    try:
        api.repo_info(repo, repo_type=kind, revision=revision, timeout=PROBE_TIMEOUT_S)
    except (HfHubHTTPError, HFValidationError) as error:
        raise DataError(f"the Hub at {place} gives no {what}: {redacted(str(error))}; check its name") from error
    except (OSError, HTTPError) as error:
        raise DataError(
            f"the Hub at {place} cannot be reached for {what}: {redacted(str(error)) or type(error).__name__}; mend "
            f"the connection, or give a local copy"
        ) from error


def fineweb_documents(config: DataConfig) -> ParquetChunks:
    """The Parquet files of `config.hub_subset`, downloaded or streamed.

    Raises:
        DataError: the Hub does not give them; nothing else is read in their place.
    """
    from huggingface_hub.errors import HTTPError  # pyright: ignore[reportPrivateImportUsage]

    check_hub("dataset", config.hub_repo, config.hub_revision)
    folder = subset_folder(config.hub_subset)
    try:
        files = _list_files(config, folder)
        inputs = [_input(config, file, number, len(files)) for number, file in enumerate(files, start=1)]
    except (OSError, HTTPError) as error:
        raise DataError(
            f"{config.hub_repo} at {config.hub_revision} cannot be fetched: {error}; start again, what is "
            f"complete is kept"
        ) from error
    identity = repr((config.hub_repo, config.hub_revision, [(i.name, i.size_bytes, i.sha256) for i in inputs]))
    identity += "" if config.text_column == "text" else config.text_column
    digest = hashlib.blake2b(identity.encode(), digest_size=16).hexdigest()
    return ParquetChunks(inputs, config.text_column, digest)


def subset_folder(subset: str) -> str:
    """The folder of a FineWeb-Edu subset in its repository."""
    if subset.startswith("sample-"):
        return subset.replace("-", "/", 1)
    return f"data/{subset}" if subset.startswith("CC-MAIN-") else subset.strip("/")


def shakespeare_file(config: DataConfig) -> Path:
    """The text of Tiny Shakespeare: the given file, or a download that is kept.

    Raises:
        DataError: it does not come, or is another text.
    """
    if config.paths:
        path = Path(os.path.expanduser(config.paths[0]))
        remedy = f"use source text for other texts, or drop data.paths to download {SHAKESPEARE_URL}"
        return _checked(path, _read(path), remedy)
    path = Path(os.path.expanduser(config.cache_folder or DEFAULT_FOLDER)) / "tinyshakespeare.txt"
    if path.is_file():
        return _checked(path, _read(path), "remove the file")
    say(f"downloading {SHAKESPEARE_URL} to {path}")
    try:
        with urllib.request.urlopen(SHAKESPEARE_URL, timeout=PROBE_TIMEOUT_S) as answer:
            content = answer.read()
    except OSError as error:
        raise DataError(f"{SHAKESPEARE_URL} cannot be fetched: {error}; put the file at {path}") from error
    _checked(SHAKESPEARE_URL, content, f"put the right file at {path}")
    part = path.with_name(f".{path.name}.part")
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        part.write_bytes(content)
        part.replace(path)
    except OSError as error:
        raise unreadable(path, error) from error
    return path


def _read(path: Path) -> bytes:
    check_regular(path)
    try:
        with path.open("rb") as file:
            return file.read(2 * SHAKESPEARE_BYTES)  # another file may be of any size
    except OSError as error:
        raise unreadable(path, error) from error


def _checked(place: Any, content: bytes, remedy: str) -> Any:
    digest = hashlib.sha256(content).hexdigest()
    if digest != SHAKESPEARE_SHA256:
        raise DataError(
            f"{place} is not Tiny Shakespeare: {len(content)} bytes with SHA-256 {digest[:12]}..., not "
            f"{SHAKESPEARE_BYTES} with {SHAKESPEARE_SHA256[:12]}...; {remedy}"
        )
    return place


def _list_files(config: DataConfig, folder: str) -> list[RepoFile]:
    from huggingface_hub import HfApi
    from huggingface_hub.hf_api import RepoFile

    tree = HfApi().list_repo_tree(
        config.hub_repo, folder, recursive=True, revision=config.hub_revision, repo_type="dataset"
    )
    found = [entry for entry in tree if isinstance(entry, RepoFile) and entry.path.endswith(".parquet")]
    if not found:
        raise DataError(f"{config.hub_repo} has no Parquet file in {folder}; check data.hub_subset")
    return sorted(found, key=lambda entry: entry.path)[: config.hub_num_files]


def _input(config: DataConfig, file: RepoFile, number: int, count: int) -> ParquetInput:
    place = f"{config.hub_repo}/{file.path} at {config.hub_revision[:8]}"
    sha256 = file.lfs.sha256 if file.lfs else None
    opener = _streamed(config, file) if config.hub_access == "stream" else _cached(config, file, number, count)
    return ParquetInput(file.path, place, opener, file.size, sha256)


def _streamed(config: DataConfig, file: RepoFile) -> Callable[[], Any]:
    from huggingface_hub import HfFileSystem

    path = f"datasets/{config.hub_repo}@{config.hub_revision}/{file.path}"
    return lambda: HfFileSystem().open(path, "rb", block_size=STREAM_BLOCK_BYTES, cache_type="readahead")


def _cached(config: DataConfig, file: RepoFile, number: int, count: int) -> Callable[[], Any]:
    from huggingface_hub import HfApi

    say(
        f"file {number}/{count} of {config.hub_repo}: {file.path}, {file.size / 1e9:.2f} GB, downloaded or in the cache"
    )
    path = HfApi().hf_hub_download(
        config.hub_repo,
        file.path,
        repo_type="dataset",
        revision=config.hub_revision,
        cache_dir=config.cache_folder,
        etag_timeout=DOWNLOAD_TIMEOUT_S,
    )
    size_bytes = Path(path).stat().st_size
    if size_bytes != file.size:
        raise DataError(f"{path} has {size_bytes} bytes, on the Hub {file.size}; remove it to download it again")
    return lambda: path
