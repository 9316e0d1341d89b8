"""The telemetry benchmark spreads each part over the steps that it belongs to."""

from __future__ import annotations

from pathlib import Path

import pytest
import yaml

from nsa.bench.settings import TelemetryBench
from nsa.bench.telemetry import measure_telemetry
from tiny_runs import tiny_config_values, write_corpus


def test_parts_are_spread_over_their_steps_and_summed(tmp_path: Path, capsys: pytest.CaptureFixture) -> None:
    write_corpus(tmp_path / "words.txt")
    path = tmp_path / "tiny.yaml"
    path.write_text(yaml.safe_dump(tiny_config_values(tmp_path / "words.txt", tmp_path / "runs")))
    overrides = ("--observe.health_every_steps=50", "--observe.heartbeat_s=10")
    rows = {row.part: row for row in measure_telemetry(TelemetryBench(str(path), overrides, warmup=0, repeats=2))}
    assert list(rows) == ["step", "report", "guards", "beat", "health", "telemetry and guards"]
    step_ms = rows["step"].ms
    assert (rows["report"].every_steps, rows["health"].every_steps) == (1, 50)
    assert rows["beat"].every_steps == pytest.approx(10_000 / step_ms)
    assert rows["beat"].share == pytest.approx(rows["beat"].ms / 10_000)
    assert rows["health"].share == pytest.approx(rows["health"].ms / 50 / step_ms)
    parts = [rows[part].share for part in ("report", "guards", "beat", "health")]
    assert rows["telemetry and guards"].share == pytest.approx(sum(parts))
    assert not (tmp_path / "runs").exists()
    off = measure_telemetry(TelemetryBench(str(path), ("--observe.health_every_steps=0",), warmup=0, repeats=1))
    assert "health" not in [row.part for row in off]
