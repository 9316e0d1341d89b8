"""Text of a run's files inside Markdown: shown as it is, never as structure, links or HTML.

print(f"| {cell('a|b <img src=x>')} |")    # | a\\|b \\<img src=x> |
"""

from __future__ import annotations

import re

from nsa.terminal import printable

_MARKS = re.compile(r"[\\`*\[\]<>|&!~$]|(?<!\w)_|_(?!\w)")
MAX_CELL = 1000  # characters of a text in a table


def inline(text: str) -> str:
    """The text in one line, with what Markdown or HTML would take for a mark escaped."""
    return _MARKS.sub(lambda found: f"\\{found[0]}", " ".join(printable(text).split()))


def cell(text: str) -> str:
    """A text in a table; one that stands between backticks already is code, and stays so."""
    if re.fullmatch(r"`[^`|\n]+`", text):
        return printable(text)
    return inline(text if len(text) <= MAX_CELL else f"{text[:MAX_CELL]} ...")


def code_block(text: str) -> str:
    """A block of indented code, which nothing in the text can close."""
    return "\n".join(f"    {printable(line)}" for line in text.split("\n"))
