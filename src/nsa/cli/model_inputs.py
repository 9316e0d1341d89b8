"""What `nsa generate` and `nsa inspect` are given beside a model: the prompt, and how many threads may work."""

from __future__ import annotations

import sys
from pathlib import Path
from typing import Any

from nsa.config.yaml_file import ConfigError, read_yaml

MAX_PROMPT_BYTES = 2**26
MAX_THREADS = 4096


def read_prompt(prompt: str | None, prompt_file: str | None) -> str:
    """The prompt that is given, in a file or on standard input ("-"); one newline at the end of those is left out.

    Raises:
        ValueError: neither or both are given, or the file cannot be read, is no UTF-8 text or too long.
    """
    if (prompt is None) == (prompt_file is None):
        raise ValueError("give the prompt by --prompt TEXT or by --prompt_file FILE (- is standard input), one of them")
    if prompt is not None:
        return prompt
    assert prompt_file is not None
    name, content = prompt_file, b""
    try:
        if prompt_file == "-":
            name, content = "standard input", sys.stdin.buffer.read(MAX_PROMPT_BYTES + 1)
        elif not Path(prompt_file).is_file():
            raise ValueError(f"--prompt_file {prompt_file}: there is no such file")
        else:
            with open(prompt_file, "rb") as file:
                content = file.read(MAX_PROMPT_BYTES + 1)
        text = content.decode("utf-8-sig")
    except UnicodeDecodeError as error:
        raise ValueError(f"the prompt in {name} is not UTF-8 text (byte {error.start}); save it as UTF-8") from None
    except OSError as error:
        raise ValueError(f"--prompt_file {prompt_file} cannot be read: {error.strerror}") from None
    if len(content) > MAX_PROMPT_BYTES:
        raise ValueError(f"the prompt in {name} is longer than {MAX_PROMPT_BYTES:,} bytes; give a part of it")
    return text.removesuffix("\n")


def choose_num_threads(given: int | None, model: Path) -> int:
    """Threads for CPU work: what is given, else the run's own number, else one.

    One token at a time keeps no more than a core busy, and on a busy machine several threads wait for one another: one
    is then several times faster than all. More help a large model with a long prompt on an idle machine. The number
    does not follow the machine's load, so that a seed gives the same text each time.

    Args:
        given: of the command line, or None.
        model: a run folder, one of its checkpoints, or a transformers folder.

    Raises:
        ValueError: the number is not from 1 to 4096.
    """
    if given is None:
        return next(filter(None, map(_stored_num_threads, (model / "run_config.yaml", model / "config.yaml"))), 1)
    if not 1 <= given <= MAX_THREADS:
        raise ValueError(f"--num_threads must be from 1 to {MAX_THREADS}, not {given}")
    return given


def _stored_num_threads(path: Path) -> int | None:
    """`run.num_threads` of a stored config; None where there is none, as in a config that cannot be read."""
    if not path.is_file():
        return None
    try:
        values: Any = read_yaml(path)
    except ConfigError:
        return None  # the model itself may still be whole
    section = values.get("run") if isinstance(values, dict) else None
    number = section.get("num_threads") if isinstance(section, dict) else None
    return number if isinstance(number, int) and not isinstance(number, bool) and 1 <= number <= MAX_THREADS else None
