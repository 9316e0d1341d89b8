"""Data that fails before or during `nsa train` ends it with an error that names it; what was written is whole."""

from __future__ import annotations

import csv
import json
import os
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path

import pytest
from huggingface_hub import constants

from corpus_files import write_jsonl
from nsa.cli import main

PATIENCE_S = 120.0
ENDLESS = ["--train.steps", "1000000", "--eval.every_steps", "500000"]


@pytest.fixture
def corpus(tiny_config: Path) -> Path:
    """A JSON Lines file with the words of the tiny corpus."""
    words = (tiny_config.parent / "words.txt").read_text(encoding="utf-8")
    return write_jsonl(tiny_config.parent / "words.jsonl", words.split("\n\n"))


@pytest.fixture
def large(tiny_config: Path, corpus: Path) -> list[str]:
    """A command that reads that file anew in each epoch, as it does with files that memory does not hold."""
    options = ["--data.source", "jsonl", "--data.paths", str(corpus), "--data.in_memory_mib", "0"]
    return ["train", str(tiny_config), *options, "--data.shuffle_window_tokens", "4096", *ENDLESS]


@contextmanager
def during_the_run(tiny_config: Path, act: Callable[[], None]) -> Iterator[None]:
    """Do something once a few steps are done."""
    table = tiny_config.parent / "runs" / "tiny" / "training.csv"

    def wait() -> None:
        deadline = time.monotonic() + PATIENCE_S
        while time.monotonic() < deadline and not (table.is_file() and table.read_text().count("\n") > 4):
            time.sleep(0.02)
        act()

    thread = threading.Thread(target=wait)
    thread.start()
    yield
    thread.join()


def assert_failed_whole(tiny_config: Path, reason: str) -> None:
    folder = tiny_config.parent / "runs" / "tiny"
    status = json.loads((folder / "status.json").read_text(encoding="utf-8"))
    assert status["state"] == "failed"
    assert reason in status["reason"]
    with (folder / "training.csv").open(encoding="utf-8") as file:
        rows = list(csv.DictReader(file))
    assert len(rows) > 2
    assert all(float(row["loss"]) > 0 for row in rows)
    assert json.loads((folder / "data_index.json").read_text(encoding="utf-8"))["num_documents"] == 120


def test_a_file_that_vanishes_during_the_run_ends_it(
    tiny_config: Path, corpus: Path, large: list[str], capsys: pytest.CaptureFixture[str]
) -> None:
    with during_the_run(tiny_config, corpus.unlink):
        assert main(large) == 1
    assert f"failed: {corpus} cannot be read: No such file or directory" in capsys.readouterr().err
    assert_failed_whole(tiny_config, f"DataError: {corpus} cannot be read")


def test_held_out_texts_that_are_trained_on_can_be_allowed_and_are_recorded(
    tiny_config: Path, corpus: Path, large: list[str], capsys: pytest.CaptureFixture[str]
) -> None:
    texts = [json.loads(line)["text"] for line in corpus.read_text(encoding="utf-8").splitlines()]
    write_jsonl(corpus, [*texts, *texts])
    few = [*large, "--train.steps", "2", "--sample.max_new_tokens", "0"]
    assert main(few) == 2
    assert "heldout-overlap: the training document" in capsys.readouterr().err
    run = tiny_config.parent / "runs" / "tiny"
    assert not run.exists()
    assert main([*few, "--preflight.allow", "heldout-overlap"]) == 0
    findings = json.loads((run / "preflight.json").read_text(encoding="utf-8"))["findings"]
    assert [finding["code"] for finding in findings if finding["allowed"]] == ["heldout-overlap"]


def test_a_file_that_is_another_at_a_resume_is_named(
    tiny_config: Path, corpus: Path, large: list[str], capsys: pytest.CaptureFixture[str]
) -> None:
    assert main([*large, "--train.steps", "2", "--sample.max_new_tokens", "0"]) == 0
    content = corpus.read_bytes()
    corpus.write_bytes(content[:-4] + b"x" + content[-3:])  # the last letter of the last text
    assert corpus.stat().st_size == len(content)
    assert main(["resume", str(tiny_config.parent / "runs" / "tiny"), "--train.steps", "4"]) == 2
    assert "the file words.jsonl has other contents" in capsys.readouterr().err


def test_a_line_that_is_damaged_during_the_run_ends_it(
    tiny_config: Path, corpus: Path, large: list[str], capsys: pytest.CaptureFixture[str]
) -> None:
    lines = corpus.read_bytes().split(b"\n")
    lines[40] = lines[40][:-1] + b","
    with during_the_run(tiny_config, lambda: corpus.write_bytes(b"\n".join(lines))):
        assert main(large) == 1
    message = f"failed: {corpus}:1 or soon after has changed since the run began; put the file back"
    assert message in capsys.readouterr().err
    assert_failed_whole(tiny_config, f"DataError: {corpus}:1 or soon after has changed")


def test_a_read_that_hangs_ends_the_run_after_the_stall_timeout(
    tiny_config: Path, corpus: Path, large: list[str], capsys: pytest.CaptureFixture[str]
) -> None:
    def hang() -> None:
        pipe = corpus.with_name("pipe")
        os.mkfifo(pipe)
        pipe.replace(corpus)  # whoever opens it waits for a writer

    with during_the_run(tiny_config, hang):
        assert main([*large, "--data.stall_timeout_s", "1.5"]) == 1
    assert f"a batch of jsonl ({corpus}) did not come within 1.5 s" in capsys.readouterr().err
    assert_failed_whole(tiny_config, "DataTimeoutError: a batch of jsonl")
    os.close(os.open(corpus, os.O_WRONLY | os.O_NONBLOCK))


def test_a_damaged_line_of_a_small_file_is_found_before_the_run(
    tiny_config: Path, corpus: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    corpus.write_text(corpus.read_text(encoding="utf-8") + '{"text": \n', encoding="utf-8")
    assert main(["train", str(tiny_config), "--data.source", "jsonl", "--data.paths", str(corpus)]) == 2
    assert f"{corpus}:121 is not JSON" in capsys.readouterr().err
    assert not (tiny_config.parent / "runs").exists()


def test_an_unreachable_hub_ends_the_run_before_it_begins(
    tiny_config: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(constants, "ENDPOINT", "http://127.0.0.1:9")
    start_s = time.monotonic()
    assert main(["train", str(tiny_config), "--data.source", "fineweb_edu", "--data.paths", "[]"]) == 2
    assert time.monotonic() - start_s < 30
    assert "the Hub at http://127.0.0.1:9 cannot be reached for dataset HuggingFaceFW/fineweb-edu" in (
        capsys.readouterr().err
    )
    assert not (tiny_config.parent / "runs").exists()


def test_synthetic_data_in_place_of_another_source_is_in_every_artifact(
    tiny_config: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(constants, "ENDPOINT", "http://127.0.0.1:9")
    options = ["--data.source", "fineweb_edu", "--data.paths", "[]", "--data.on_error", "synthetic"]
    options += ["--data.shuffle_window_tokens", "4096", "--data.max_eval_tokens", "512", "--train.steps", "3"]
    assert main(["train", str(tiny_config), *options]) == 0
    marked = "SYNTHETIC DATA (copy of 64) in place of fineweb_edu: the Hub at http://127.0.0.1:9 cannot be reached"
    assert marked in capsys.readouterr().out
    folder = tiny_config.parent / "runs" / "tiny"
    assert json.loads((folder / "data_index.json").read_text(encoding="utf-8"))["description"].startswith(marked)
    for name in ("status.json", "metrics.json"):
        assert json.loads((folder / name).read_text(encoding="utf-8"))["data"].startswith(marked)
    assert f"**{marked}" in (folder / "report.md").read_text(encoding="utf-8")
