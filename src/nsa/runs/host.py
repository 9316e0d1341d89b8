"""Which running system a process belongs to, so that its number is not looked up in another one.

Two machines, or two containers of one machine, can have the same host name; a process number means something only in
one of them, and only until it restarts.
"""

from __future__ import annotations

import os
from pathlib import Path

BOOT_ID = Path("/proc/sys/kernel/random/boot_id")
PROCESSES = Path("/proc/self/ns/pid")


def this_machine() -> str | None:
    """The boot of the system and the namespace of process numbers; None where the system does not tell (not Linux)."""
    try:
        return f"{BOOT_ID.read_text(encoding='ascii').strip()} {os.readlink(PROCESSES)}"
    except OSError:
        return None
