"""The errors of everything that enters the pipeline from outside: files, names, tokenizers, the Hub."""

from __future__ import annotations


class DataError(ValueError):
    """Data that cannot be used; the message names the file, the line where there is one, and the remedy."""

    def __init__(self, message: str) -> None:
        super().__init__(printable(message))


class DataTimeoutError(DataError):
    """Data that did not come in time; the message names the source and the seconds."""


def printable(text: str) -> str:
    r"""`text` with control characters and bytes that are no UTF-8 written out, as names of files may hold them.

    >>> printable("a\x1b[2J.txt")
    'a\\x1b[2J.txt'
    """
    if text.isprintable():
        return text
    return "".join(
        sign if sign.isprintable() or sign == "\n" else sign.encode("unicode_escape").decode() for sign in text
    )


def shortened(items: list[str], *, most: int = 12, length: int = 40) -> str:
    """A list for a message, of so many entries and characters at most.

    >>> shortened(["text", "id"])
    "['id', 'text']"
    """
    shown = [item if len(item) <= length else f"{item[:length]}..." for item in sorted(items)[:most]]
    return f"{shown}" if len(items) <= most else f"{shown} and {len(items) - most:,} more"
