"""The folders of checkpoints: what a whole one is, how one is committed, found, checked and removed.

    checkpoints/step_000500/   config.json, model.safetensors, tokenizer files   <- `from_pretrained` reads these
                               state/          weights and optimizer, a part from each rank (PyTorch DCP)
                               tables/         training.csv, val.csv and health.csv up to this step
                               random_rank0.pt, ...  random number generators of each rank
                               trainer.json    step, data position, guards, evaluations
                               run_config.yaml the run's config
                               complete.json   size and checksum of every file; written last
    checkpoints/latest -> step_000500

A checkpoint is written into a temporary folder that is then renamed, so that a folder with its final name is whole. The
scan for whole folders is the truth; `latest` is for people and may be one behind after a crash. This file knows no
tensors: `nsa.train.checkpoint` writes checkpoints and reads them.
"""

from __future__ import annotations

import errno
import json
import os
import re
import shutil
import zlib
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any

from nsa.runs.files import LATEST
from nsa.runs.folder import sync, write_json

STEP_FOLDER = re.compile(r"step_(\d{6,})")
COMPLETE = "complete.json"
STATE = "state"
TRAINER = "trainer.json"
RUN_CONFIG = "run_config.yaml"
TABLES = "tables"
CRC32 = re.compile("[0-9a-f]{8}")
READ_BYTES = 2**22
MAX_LISTING_BYTES = 2**26  # of `complete.json`, some hundred bytes a file


@dataclass(frozen=True)
class FileSum:
    """What `complete.json` says about a file.

    Attributes:
        size: bytes.
        crc32: checksum of the contents, eight hexadecimal digits.

    Raises:
        ValueError: these are no such values.
    """

    size: int
    crc32: str

    def __post_init__(self) -> None:
        if type(self.size) is not int or not isinstance(self.crc32, str) or not CRC32.fullmatch(self.crc32):
            raise ValueError(f"{self.size!r} and {self.crc32!r} are no size and checksum")

    @classmethod
    def of(cls, path: Path) -> FileSum:
        """Read a file and sum it up."""
        size, crc = 0, 0
        with path.open("rb") as file:
            while chunk := file.read(READ_BYTES):
                size, crc = size + len(chunk), zlib.crc32(chunk, crc)
        return cls(size, f"{crc:08x}")


def step_folder(checkpoints: Path, step: int) -> Path:
    """Where the checkpoint of a step lies."""
    return checkpoints / f"step_{step:06d}"


def step_of(checkpoint: Path) -> int:
    """The step in a checkpoint's name."""
    match = STEP_FOLDER.fullmatch(checkpoint.name)
    assert match, checkpoint
    return int(match[1])


def temporary_folder(final: Path) -> Path:
    """Where a checkpoint is written before it is whole."""
    return final.with_name(f".{final.name}.part")


def commit(temporary: Path, final: Path, sums: dict[str, FileSum], *, about: dict[str, Any]) -> None:
    """Turn a written folder into a checkpoint: list its files, reach the disk, rename, and point `latest` at it.

    Args:
        temporary: the folder with all files.
        final: its name from now on; what lies there gives way.
        sums: size and checksum of every file.
        about: what else `complete.json` says.
    """
    files = {name: asdict(sums[name]) for name in sorted(sums)}
    write_json(temporary / COMPLETE, {**about, "files": files})
    sync(temporary / COMPLETE)
    for folder in {(temporary / name).parent for name in sums} | {temporary}:
        sync(folder)
    replaced = final.with_name(f".{final.name}.replaced.part")
    if final.exists():
        os.replace(final, replaced)
    os.replace(temporary, final)
    sync(final.parent)
    _point(final.parent / LATEST, final.name)
    if replaced.exists():
        shutil.rmtree(replaced)


def prune(checkpoints: Path, *, keep: int, keep_every_steps: int = 0) -> None:
    """Remove all but the newest `keep` checkpoints and those of every `keep_every_steps`-th step (0: no such)."""
    for old in complete_checkpoints(checkpoints)[:-keep]:
        if not keep_every_steps or step_of(old) % keep_every_steps:
            # Under another name first: what a crash leaves of it is then no checkpoint, and goes at the next start.
            removed = old.with_name(f".{old.name}.removed.part")
            os.replace(old, removed)
            shutil.rmtree(removed)


def remove_parts(checkpoints: Path) -> None:
    """Remove what interrupted writers left; nothing may be writing."""
    if checkpoints.is_dir():
        for path in checkpoints.glob(".step_*.part"):
            shutil.rmtree(path)


def step_folders(checkpoints: Path) -> list[Path]:
    """All folders that are named as checkpoints, whole or not, oldest first."""
    if not checkpoints.is_dir():
        return []
    found = (path for path in checkpoints.iterdir() if STEP_FOLDER.fullmatch(path.name) and not path.is_symlink())
    return sorted(found, key=step_of)


def complete_checkpoints(checkpoints: Path) -> list[Path]:
    """The whole checkpoints in a folder, oldest first."""
    return [path for path in step_folders(checkpoints) if is_complete(path)]


def is_complete(checkpoint: Path) -> bool:
    """Whether every file that the checkpoint lists is there in its full size; contents are not read."""
    return not damage(checkpoint, contents=False)


@dataclass(frozen=True)
class Listing:
    """The contents of `complete.json`.

    Attributes:
        step: optimizer steps done.
        world_size: ranks that wrote the checkpoint.
        files: what is in it, by path inside the folder.
    """

    step: int
    world_size: int
    files: dict[str, FileSum]

    @classmethod
    def read(cls, checkpoint: Path) -> Listing:
        """Read it and check that it can be one of this folder, and names nothing outside of it.

        Raises:
            ValueError: it is missing or damaged, or belongs to another step; it is named with the reason.
        """
        path = checkpoint / COMPLETE
        if not path.is_file():
            raise ValueError(f"{path} is missing")
        if path.stat().st_size > MAX_LISTING_BYTES:
            raise ValueError(f"{path} has {path.stat().st_size} bytes, which no list of files has")
        try:
            values = json.loads(path.read_text("utf-8"), object_pairs_hook=_once)
            listing = cls(values.pop("step"), values.pop("world_size"), values.pop("files"))
            files = {name: FileSum(**entry) for name, entry in dict[str, Any](listing.files).items()}
        except (ValueError, KeyError, TypeError, AttributeError, RecursionError) as error:
            raise ValueError(f"{path} cannot be read: {type(error).__name__}: {error}") from None
        if values or {type(listing.step), type(listing.world_size)} != {int} or listing.world_size < 1:
            raise ValueError(f"{path} cannot be read: it needs step, world_size and files, and nothing else")
        found = STEP_FOLDER.fullmatch(checkpoint.name)
        if found and int(found[1]) != listing.step:
            named = step_folder(checkpoint.parent, listing.step).name
            raise ValueError(f"{checkpoint} holds step {listing.step}; give it back its name {named}")
        for name in files:
            inside(checkpoint, name)
        ranks = {name for name in files if name.startswith("random_rank")}
        if ranks != {random_file(rank) for rank in range(min(listing.world_size, len(files) + 1))}:
            raise ValueError(f"{path} has {len(ranks)} files of random generators for {listing.world_size} ranks")
        return replace(listing, files=files)


def inside(folder: Path, name: str) -> Path:
    """The path of a file that another file names, which must lie in `folder`, without links on the way.

    Raises:
        ValueError: it lies elsewhere.
    """
    parts = name.split("/")
    ways = ["/".join(parts[:count]) for count in range(1, len(parts) + 1)]
    if {"", ".", ".."} & set(parts) or "\0" in name or any(os.path.islink(f"{folder}/{way}") for way in ways):
        raise ValueError(f"{folder} names the file {name!r}, which lies outside of it")
    return folder / name


def random_file(rank: int) -> str:
    """Name of the file with a rank's random generators."""
    return f"random_rank{rank}.pt"


def damage(checkpoint: Path, *, contents: bool = True) -> str | None:
    """What is wrong with a checkpoint, or None: the first file that is missing or not as it was written.

    Args:
        checkpoint: the folder.
        contents: also read every file and compare checksums.
    """
    try:
        files = Listing.read(checkpoint).files
    except ValueError as error:
        return str(error)
    for name, expected in files.items():
        path = checkpoint / name
        if not path.is_file():
            return f"{path} is missing"
        if path.stat().st_size != expected.size:
            return f"{path} has {path.stat().st_size} bytes, not {expected.size}"
        if contents and FileSum.of(path) != expected:
            return f"{path} is not what was written: its checksum is not {expected.crc32}"
    return None


def check_readable(folder: Path) -> None:
    """Raise `PermissionError` for the first file in a folder of a model that this user may not read."""
    for path in sorted(folder.iterdir()):
        if path.is_file() and not os.access(path, os.R_OK):
            raise PermissionError(errno.EACCES, os.strerror(errno.EACCES), str(path))


def newest_checkpoint(run: Path) -> Path:
    """The newest whole checkpoint of a run folder.

    Raises:
        ValueError: there is none.
    """
    found = complete_checkpoints(run / "checkpoints")
    if not found:
        raise ValueError(f"{run} holds no complete checkpoint; has the run reached its first one?")
    return found[-1]


def _point(link: Path, target: str) -> None:
    """Make `link` a symbolic link to `target` beside it, replacing an older one in one move."""
    temporary = link.with_name(f".{link.name}.part")
    temporary.unlink(missing_ok=True)
    temporary.symlink_to(target)
    os.replace(temporary, link)


def _once(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    """A JSON object in which no key comes twice."""
    values = dict(pairs)
    if len(values) != len(pairs):
        raise ValueError("a key comes twice")
    return values
