"""`nsa bench`: kinds, settings by flags, files, and mistakes."""

import csv
import json

import pytest

from nsa.cli import EXIT_DONE, EXIT_USAGE, bench

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


def test_results_go_to_the_folder_of_results_unless_told(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    assert bench.main(["prefill", *FLAGS]) == EXIT_DONE
    assert (tmp_path / "benchmarks/results/prefill_cpu.csv").exists()


@pytest.mark.parametrize("kind", bench.KINDS)
def test_every_kind_has_settings_and_help(kind, capsys):
    settings, measure = bench.load(kind)
    assert callable(measure)
    assert settings().device
    with pytest.raises(SystemExit) as stop:
        bench.main([kind, "--help"])
    assert stop.value.code == 0
    assert "--out" in capsys.readouterr().out


def test_mistakes_name_the_remedy(capsys):
    assert bench.main([]) == EXIT_USAGE
    assert bench.main(["prefil"]) == EXIT_USAGE
    assert "did you mean `nsa bench prefill`" in capsys.readouterr().err
    assert bench.main(["prefill", "--lengths", "40", "--num_kv_heads", "3"]) == EXIT_USAGE
    assert "multiple of the 3" in capsys.readouterr().err
