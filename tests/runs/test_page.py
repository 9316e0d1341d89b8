"""The page of a run: it holds all that it shows, hides nothing of a comparison, and no text of a run acts in it."""

from __future__ import annotations

import re
import shutil
from html.parser import HTMLParser
from pathlib import Path

import pytest

from nsa.cli import main
from nsa.launch.start import prepare
from nsa.runs.folder import RunFolder, read_json, write_json
from nsa.runs.page import write_page
from nsa.train.loop import train

HOSTILE = '<script>alert("x")</script>\x1b[2J'


@pytest.fixture(scope="module")
def finished(module_tiny) -> Path:
    return train(*prepare(module_tiny(train={"steps": 3}, eval={"every_steps": 3}))).folder.path


@pytest.fixture
def run(finished: Path, tmp_path: Path) -> RunFolder:
    return RunFolder(Path(shutil.copytree(finished, tmp_path / "tiny")))


class Tags(HTMLParser):
    """The tags of a page, and what they would load."""

    def __init__(self, page: str) -> None:
        super().__init__()
        self.open: list[str] = []
        self.seen: set[str] = set()
        self.sources: list[str] = []
        self.feed(page)

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.seen.add(tag)
        self.sources += [value or "" for name, value in attrs if name in ("src", "href")]
        if tag not in ("meta", "img"):
            self.open.append(tag)

    def handle_endtag(self, tag: str) -> None:
        assert self.open.pop() == tag


def page_of(run: RunFolder) -> str:
    return run.report_html.read_text(encoding="utf-8")


def test_a_run_leaves_a_page_that_needs_nothing_else(run: RunFolder) -> None:
    page = page_of(run)
    tags = Tags(page)
    assert not tags.open
    assert len(tags.sources) == 2  # the curves and the selection
    assert all(source.startswith("data:image/png;base64,") for source in tags.sources)
    metrics = read_json(run.metrics_json)
    assert metrics is not None
    for part in (
        f"{metrics['val_bits_per_byte']:.4f}",
        "What it selects",
        "dense / NSA",
        "before training",
        "[prompt]",
    ):
        assert part in page, part


def test_no_text_of_a_run_acts(run: RunFolder) -> None:
    (run.samples / "after.txt").write_text(HOSTILE, encoding="utf-8")
    metrics = read_json(run.metrics_json) or {}
    write_json(run.metrics_json, {**metrics, "findings": [HOSTILE], "stopped_by": HOSTILE})
    write_page(run)
    page = page_of(run)
    assert "script" not in Tags(page).seen
    assert "\x1b" not in page
    assert page.count("&lt;script&gt;") == 3
    assert f"nsa resume {run.path}" in page


def test_another_run_stands_beside_it_and_what_differs_is_said(
    run: RunFolder, module_tiny, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    twin = RunFolder(Path(shutil.copytree(run.path, tmp_path / "twin")))
    assert main(["page", str(run.path), "--beside", str(twin.path)]) == 0
    assert "report.html" in capsys.readouterr().out
    assert "same data in the same order" in page_of(run)
    assert "+0.00%" in page_of(run)
    text = twin.config_yaml.read_text(encoding="utf-8")
    twin.config_yaml.write_text(re.sub(r"(?m)^  lr: .*$", "  lr: 0.5", text), encoding="utf-8")
    write_page(run, twin)
    assert "Not a fair comparison: they differ in optim." in page_of(run)
