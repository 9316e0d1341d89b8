"""What a run ran on: versions, machine, commit and command, for `env.json`."""

from __future__ import annotations

import subprocess
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch

import nsa
from nsa.machine import environment
from nsa.terminal import redacted


def snapshot(device: torch.device, command: Sequence[str]) -> dict[str, Any]:
    """Command, commit, versions and machine of this process as plain values."""
    return {
        "command": [redacted(part) for part in command],
        "git_commit": git_commit(Path(nsa.__file__).parent),
        **environment(device),
    }


def git_commit(folder: Path) -> str | None:
    """The commit checked out around `folder`, with "+changes" when files differ from it; None outside a repository."""
    try:
        commit = _git(folder, "rev-parse", "HEAD")
        changed = _git(folder, "status", "--porcelain", "--untracked-files=no")
    except (OSError, subprocess.SubprocessError):
        return None
    return f"{commit}+changes" if changed else commit


def _git(folder: Path, *arguments: str) -> str:
    run = subprocess.run(["git", "-C", str(folder), *arguments], capture_output=True, text=True, check=True, timeout=20)
    return run.stdout.strip()
