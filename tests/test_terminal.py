"""No character of a stranger's text acts on a terminal."""

from __future__ import annotations

import unicodedata

from nsa.terminal import printable


def test_controls_become_visible_and_text_stays() -> None:
    assert printable("\x1b]0;title\x07\x9b2J\r\u202egpj.exe\u2066") == r"\x1b]0;title\x07\x9b2J\r\u202egpj.exe\u2066"
    kept = "tabs\tand\nlines, ünïcödé, 中文, ⟨x⟩ 🙂, e\u0301, joined \u200d"
    assert printable(kept) == kept
    assert printable("name\udc9b") == r"name\udc9b"


def test_no_control_character_passes() -> None:
    shown = printable("".join(map(chr, range(0x3000))))
    assert {c for c in shown if unicodedata.category(c) == "Cc"} == {"\n", "\t"}
    assert not [c for c in shown if unicodedata.bidirectional(c) in {"RLO", "LRO", "RLE", "LRE", "PDF", "RLI", "LRI"}]
