"""`report.md`: health as the table below it has it, and texts of files that stay texts."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
from markdown_it import MarkdownIt

from made_up_beats import beat, write_beats
from made_up_runs import write_health, write_run
from nsa.config.run import RunConfig
from nsa.runs.folder import RunFolder, write_json
from nsa.runs.health import judge_run
from nsa.runs.markdown import cell, code_block, inline
from nsa.runs.report import write_report
from nsa.runs.thresholds import Thresholds

HOSTILE = "<img src=x onerror=alert(1)> [go](http://x) | `code` **bold** &lt; ![](y) $x$\n# heading\x1b[2J"


def report(folder: RunFolder, **changes: Any) -> str:
    """The text of a report of a made-up run."""
    values = {
        "step": 2,
        "tokens": 200,
        "stopped_by": None,
        "data": "words",
        "data_replaced_because": None,
        "num_parameters": 9,
        "vocab_size": 259,
        "log_vocab_size": 5.5,
        "untrained_val_loss": 5.5,
        "train_loss": 2.0,
        "val_step": 2,
        "val_loss": 2.0,
        "val_ppl": 7.0,
        "val_bits_per_byte": 2.8,
        "best_val_loss": 2.0,
        "num_skipped_steps": 0,
        "train_s": 1.0,
        "wall_s": 2.0,
        "tokens_per_s": 200.0,
        "findings": [str(finding) for finding in judge_run(folder.path, Thresholds())],
        **changes,
    }
    write_report(folder, RunConfig(), values)
    return folder.report_md.read_text(encoding="utf-8")


@pytest.fixture
def folder(tmp_path: Path) -> RunFolder:
    folder = RunFolder(write_run(tmp_path / "run", [5.0, 2.0, 1.9]))
    folder.samples.mkdir()
    write_beats(folder.path, [beat(gate=None, worst_gate=None, phase="ended")])
    env = {"packages": {}, "device": "cpu", "device_name": "a CPU", "num_cpus": 1, "num_threads": 1, "platform": "here"}
    write_json(folder.env_json, env | {"nsa": "1", "python": "3", "git_commit": None, "command": ["nsa", "train"]})
    index = {"description": "words", "replaced_because": None, "held_out_documents": ["one", "two"]}
    write_json(folder.data_index_json, index)
    return folder


def test_after_a_resume_the_words_on_health_are_those_of_the_table(folder: RunFolder) -> None:
    outside = {"gate_collapse_share": 0.3}
    write_health(folder.path, [{"step": 1, "layer": 0, **outside}, {"step": 1, "layer": 1}])
    text = report(folder)
    assert "Nothing is outside" not in text
    assert "the gates have 15.0% of them collapsed" in text
    assert text.count("**0.3**") == 1
    assert "step 1; bold: outside the thresholds" in text
    write_health(folder.path, [{"step": 1, "layer": 0}])
    assert "Nothing is outside the thresholds" in report(folder)


def test_texts_of_files_stay_texts(folder: RunFolder) -> None:
    (folder.samples / "after.txt").write_text(f"a sample\r\n\n{HOSTILE}\r# heading\n```\n</pre><b>", encoding="utf-8")
    write_json(
        folder.data_index_json, {"description": HOSTILE, "replaced_because": "x", "held_out_documents": [HOSTILE]}
    )
    write_health(folder.path, [{"step": 1, "layer": 0}])
    text = report(folder, stopped_by=f"HALT: {HOSTILE}", data=HOSTILE, findings=[HOSTILE])
    assert "\x1b" not in text
    html = MarkdownIt("commonmark").enable("table").render(text)
    assert html.count("<img") == 1  # of the curves
    assert "<b>" not in html
    assert 'href="http://x"' not in html
    assert html.count("<h1>") == 1
    assert "alert(1)" in html
    rows = [line for line in text.splitlines() if line.startswith("| data |")]
    assert len(rows) == 1


def test_what_needs_no_escape_stays_as_it_is() -> None:
    assert inline("nsa_125m, 2.0 nats per token (after step 3)") == "nsa_125m, 2.0 nats per token (after step 3)"
    assert cell("`optim.lr`") == "`optim.lr`"
    assert cell("`a|b`") == r"\`a\|b\`"
    assert inline("_under_ a\nb") == r"\_under\_ a b"
    assert len(cell("x" * 10**6)) < 2000
    assert code_block("a\nb\r# c") == "    a\n    b\\r# c"
