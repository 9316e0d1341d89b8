r"""Text from files and other machines on its way to a terminal: what would act there is shown instead.

printable("\x1b[2Jgone")   # \x1b[2Jgone
"""

from __future__ import annotations

import re

# C0 and C1 controls but newline and tab, line separators, and what turns the direction of text (bidi controls).
_ACTS = re.compile("[\x00-\x08\x0b-\x1f\x7f-\x9f\u061c\u200e\u200f\u2028\u2029\u202a-\u202e\u2066-\u2069\ud800-\udfff]")
_CREDENTIALS = re.compile(r"://[^/\s\"'<>]+@")


def printable(text: str) -> str:
    """The text with every character that a terminal would obey written as an escape, such as `\\x1b`.

    Newlines and tabs stay; lone surrogates, which no terminal can be sent, become escapes too.
    """
    return _ACTS.sub(lambda found: found[0].encode("unicode_escape").decode("ascii"), text)


def redacted(text: str) -> str:
    """The text without user names and passwords in its addresses: `https://***@hub.example`."""
    return _CREDENTIALS.sub("://***@", text)
