"""The picture of a prefill benchmark has something in every panel, also for one length and without dense attention."""

from __future__ import annotations

from pathlib import Path

import pytest
from matplotlib.figure import Figure

from nsa.bench.prefill import PrefillRow
from nsa.bench.prefill_picture import draw, short
from nsa.bench.settings import PrefillBench

BOTH = PrefillRow(1024, 1.0, 2.0, 3.0, 4.0, 6.0, 10.0, 3.3, 0.5, 0.7)
LONGER = PrefillRow(8192, 2.0, 4.0, 6.0, 16.0, 24.0, 40.0, 6.6, 0.9, 1.4)
ALONE = PrefillRow(2**20, 358.4, 528.4, 887.1, nsa_peak_gib=11.4)
BARE = PrefillRow(2**20, 358.4, 528.4, 887.1)


@pytest.mark.parametrize("rows", [[BOTH, LONGER], [BOTH], [ALONE], [BARE], [ALONE, LONGER], [BOTH, BARE]])
def test_no_panel_is_empty(rows: list[PrefillRow], tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    figures = []
    save = Figure.savefig
    monkeypatch.setattr(
        Figure, "savefig", lambda self, *args, **kwargs: figures.append(self) or save(self, *args, **kwargs)
    )
    draw(rows, PrefillBench(), tmp_path / "prefill.png", device="NVIDIA H200")
    (figure,) = figures
    assert (tmp_path / "prefill.png").stat().st_size > 10_000
    for axes in figure.axes:
        assert axes.lines or axes.patches or axes.texts
    assert "NVIDIA H200" in figure.get_suptitle()
    assert ("dense" in figure.get_suptitle()) == (any(row in rows for row in (BOTH, LONGER)))


def test_lengths_are_short() -> None:
    assert [short(length) for length in (512, 1024, 65536, 2**20, 3 * 2**19)] == ["512", "1k", "64k", "1M", "1.5M"]
