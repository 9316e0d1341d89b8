"""`nsa bench`: kinds, settings by flags, files, and mistakes."""

import csv
import json

import pytest

from nsa.cli import EXIT_DONE, EXIT_USAGE, bench, main

FLAGS = ["--lengths", "40", "--num_heads", "2", "--head_dim", "8", "--value_head_dim", "8"]
FLAGS += ["--repeats", "1", "--warmup", "0", "--no_memory"]


def test_prefill_writes_a_csv_and_the_command(tmp_path, capsys):
    out = tmp_path / "prefill.csv"
    assert bench.main(["prefill", *FLAGS, "--out", str(out)]) == EXIT_DONE
    (row,) = csv.DictReader(out.open())
    assert row["length"] == "40"
    assert float(row["speedup"]) > 0
    facts = json.loads(out.with_suffix(".json").read_text())
    assert facts["command"].startswith("nsa bench prefill --lengths 40 --num_heads 2")
    assert facts["settings"]["num_heads"] == 2
    assert "nsa_total_ms" in capsys.readouterr().out
    assert out.with_suffix(".png").read_bytes().startswith(b"\x89PNG")


def test_results_lie_in_this_folder_unless_told_and_are_not_replaced_unasked(tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    assert main(["bench", "prefill", *FLAGS]) == EXIT_DONE
    before = (tmp_path / "bench_prefill.csv").read_text()
    capsys.readouterr()
    assert main(["bench", "prefill", *FLAGS]) == EXIT_USAGE
    assert "bench_prefill.csv is there already; give another --out, or --overwrite" in capsys.readouterr().err
    assert (tmp_path / "bench_prefill.csv").read_text() == before
    assert main(["bench", "prefill", *FLAGS, "--overwrite"]) == EXIT_DONE
    assert (tmp_path / "bench_prefill.csv").read_text() != before


def test_keys_of_a_config_follow_as_in_all_commands(tmp_path, monkeypatch):
    seen = []
    monkeypatch.setattr("nsa.bench.train.measure_train", lambda bench: seen.append(bench) or [])
    monkeypatch.chdir(tmp_path)
    arguments = ["train_copy", "--lengths", "64", "128", "--train.compile", "true", "--device", "cpu"]
    assert main(["bench", "train", *arguments]) == EXIT_DONE
    assert (seen[0].config, seen[0].lengths, seen[0].device) == ("train_copy", (64, 128), "cpu")
    assert seen[0].overrides == ("--train.compile", "true")


@pytest.mark.parametrize("kind", bench.KINDS)
def test_every_kind_has_settings_and_help(kind, capsys):
    assert bench.KINDS[kind].settings().device == "auto"
    assert main(["bench", kind, "--help"]) == EXIT_DONE
    assert "--out" in capsys.readouterr().out


def test_mistakes_name_the_remedy(capsys, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    assert bench.main([]) == EXIT_USAGE
    assert bench.main(["prefil"]) == EXIT_USAGE
    assert "did you mean `nsa bench prefill`" in capsys.readouterr().err
    assert bench.main(["prefill", "--lengths", "40", "--num_kv_heads", "3"]) == EXIT_USAGE
    assert "multiple of the 3" in capsys.readouterr().err
