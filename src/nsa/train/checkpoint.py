"""Checkpoints of a run: written whole, found by scanning, the newest ones kept.

    checkpoints/step_000500/   config.json, model.safetensors, tokenizer files   <- `from_pretrained` reads these
                               trainer.json   step, tokens and evaluations so far
                               complete.json  name and size of every file; written last
    checkpoints/latest -> step_000500

A checkpoint is written into a temporary folder that is then renamed, so that a folder with its final name is whole. The
scan for whole folders is the truth; `latest` is for people and may be one behind after a crash.
"""

from __future__ import annotations

import json
import os
import re
import shutil
from pathlib import Path
from typing import Any, Protocol

from nsa.train.run_folder import write_json

STEP_FOLDER = re.compile(r"step_(\d{6,})")
COMPLETE = "complete.json"


class Saveable(Protocol):
    """A transformers model."""

    def save_pretrained(self, save_directory: str) -> Any: ...


class SaveableTokenizer(Protocol):
    """A tokenizer of `nsa.data`."""

    def save(self, folder: Path) -> None: ...


def save_checkpoint(
    checkpoints: Path, step: int, *, model: Saveable, tokenizer: SaveableTokenizer, trainer: dict[str, Any], keep: int
) -> Path:
    """Write `checkpoints/step_NNNNNN`, point `latest` at it and remove all but the newest `keep`.

    Args:
        checkpoints: the run's folder of checkpoints; made when missing.
        step: optimizer steps done.
        model: written as a transformers folder.
        trainer: plain values about the training so far.
        keep: how many checkpoints stay.
    """
    final = checkpoints / f"step_{step:06d}"
    temporary = checkpoints / f".{final.name}.part"
    shutil.rmtree(temporary, ignore_errors=True)
    temporary.mkdir(parents=True)
    model.save_pretrained(str(temporary))
    tokenizer.save(temporary)
    write_json(temporary / "trainer.json", {"step": step, **trainer})
    files = {str(path.relative_to(temporary)): path.stat().st_size for path in temporary.rglob("*") if path.is_file()}
    write_json(temporary / COMPLETE, {"files": files})
    if final.exists():
        shutil.rmtree(final)
    os.replace(temporary, final)
    _point(checkpoints / "latest", final.name)
    for old in complete_checkpoints(checkpoints)[:-keep]:
        shutil.rmtree(old)
    return final


def complete_checkpoints(checkpoints: Path) -> list[Path]:
    """The whole checkpoints in a folder, oldest first."""
    if not checkpoints.is_dir():
        return []
    found = [(int(match[1]), path) for path in checkpoints.iterdir() if (match := STEP_FOLDER.fullmatch(path.name))]
    return [path for _, path in sorted(found) if is_complete(path)]


def is_complete(checkpoint: Path) -> bool:
    """Whether every file that the checkpoint lists is there in its full size."""
    listing = checkpoint / COMPLETE
    if not listing.is_file():
        return False
    files = json.loads(listing.read_text(encoding="utf-8"))["files"]
    return all((checkpoint / name).is_file() and (checkpoint / name).stat().st_size == files[name] for name in files)


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
