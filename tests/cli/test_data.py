"""`nsa data check`: what it reports, its exit codes, and that it follows the config."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from corpus_files import NAMES, TEXTS, write_parquet
from nsa.cli import main

OPTIONS = ["--batches", "20"]


def test_the_table_has_speed_waits_and_contents(tiny_config: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["data", "check", str(tiny_config), *OPTIONS]) == 0
    out = capsys.readouterr().out
    words = tiny_config.parent / "words.txt"
    for part in (
        f"text ({words})",
        f"1, {words.stat().st_size / 1e6:,.1f} MB; into memory at the start",
        "120, 100 to train on",
        "a fraction of 0.2, by BLAKE2b of the name; evaluation has 20 documents",
        "20 batches, 5,120 tokens in",
        "sustained",
        "fetch        p50",
        "0.0000% of the positions",
        "byte, vocabulary 259",
    ):
        assert part in out, part
    assert not (tiny_config.parent / "runs").exists()


def test_json_is_one_object_with_units_in_its_names(tiny_config: Path, capsys: pytest.CaptureFixture[str]) -> None:
    arguments = ["data", "check", str(tiny_config), *OPTIONS, "--json", "--train.sequence_length", "32"]
    arguments += ["--train.batch_tokens", "512", "--data.heldout", "0"]
    assert main(arguments) == 0
    result = json.loads(capsys.readouterr().out)
    assert result["tokens"] == 20 * 4 * 32
    assert result["num_heldout_documents"] == 0
    assert result["num_training_documents"] == 120
    assert result["tokens_per_s"] == min(result["window_tokens_per_s"], result["batch_tokens_per_s"]) > 0
    assert 0 <= result["fetch_p50_ms"] <= result["fetch_p95_ms"] <= result["fetch_max_ms"]
    words = (tiny_config.parent / "words.txt").read_text(encoding="utf-8")
    assert result["epoch_tokens"] == sum(len(paragraph) for paragraph in words.split("\n\n"))


def test_files_that_are_read_by_chunks_are_counted_as_far_as_known(
    tiny_config: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    path = write_parquet(tiny_config.parent / "a.parquet", [text * 30 for text in TEXTS], NAMES)
    arguments = ["data", "check", str(tiny_config), "--data.source", "parquet", "--data.paths", str(path)]
    arguments += ["--data.in_memory_mib", "0", "--data.shuffle_window_tokens", "2048", *OPTIONS]
    assert main(arguments) == 0
    out = capsys.readouterr().out
    assert "documents    57\n" in out
    assert "by chunks during the run" in out
    assert "not known before one is over" in out


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ([], "usage: nsa data check CONFIG"),
        (["check"], "usage: nsa data check CONFIG"),
        (["look", "x.yaml"], "unknown action 'look'"),
        (["check", "absent.yaml"], "there is no config file absent.yaml"),
        (["check", "{config}", "--batches", "0"], "--batches must be from 1 to"),
        (["check", "{config}", "--data.paths", "nowhere.txt"], "no file, folder or match for nowhere.txt"),
        (["check", "{config}", "--data.heldout", "x"], 'held-out pattern "x" matches none of the 120'),
    ],
)
def test_mistakes_end_with_code_2_and_say_what_is_wrong(
    arguments: list[str], message: str, tiny_config: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    arguments = [argument.replace("{config}", str(tiny_config)) for argument in arguments]
    assert main(["data", *arguments]) == 2
    assert message in capsys.readouterr().err
