"""What the ranks of a run report: beats on each, shared tables on rank 0 alone."""

from __future__ import annotations

import json
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

from nsa.launch.start import prepare
from nsa.runs.folder import RunFolder
from nsa.runs.health import judge_run
from nsa.runs.heartbeat import heartbeat_path, read_heartbeats
from nsa.runs.tables import HEALTH_COLUMNS, TRAINING_COLUMNS, EvalRecord, StepRecord, read_csv
from nsa.runs.thresholds import Thresholds
from nsa.train.loop import train
from nsa.train.parallel import Parallel
from nsa.train.telemetry import telemetry as telemetry_module
from nsa.train.telemetry.telemetry import Telemetry
from ranks import run_ranks

RECORD = StepRecord(
    step=4,
    tokens=400,
    loss=2.5,
    lr=1e-3,
    grad_norm=0.5,
    tokens_per_s=100.0,
    mfu=0.25,
    step_s=1.0,
    fetch_s=0.1,
    waits_s=(0.1,),
)


@pytest.fixture(scope="module")
def finished(module_tiny) -> Path:
    """The folder of a whole run that measured gates every two of its 5 steps and beat very often."""
    return train(
        *prepare(module_tiny(train={"steps": 5}, observe={"health_every_steps": 2, "heartbeat_s": 0.01}))
    ).folder.path


def test_a_run_reports_each_phase_it_enters(tiny, monkeypatch: pytest.MonkeyPatch) -> None:
    phases: list[str] = []
    enter = Telemetry.phase
    monkeypatch.setattr(Telemetry, "phase", lambda self, name: (phases.append(name), enter(self, name))[1])
    train(*prepare(tiny(train={"steps": 3, "checkpoint_every_steps": 2}, eval={"every_steps": 2})))
    step = ["fetch", "step"]
    assert phases == [
        *("sample", "evaluate"),
        *(*step, *step, "evaluate", "checkpoint"),
        *(*step, "evaluate", "checkpoint", "finish"),
    ]


def test_beats_end_with_the_run_and_are_those_of_a_healthy_one(finished: Path) -> None:
    beats = read_heartbeats(heartbeat_path(finished, 0))
    assert [beats[0].phase, beats[-1].phase] == ["startup", "ended"]
    assert (beats[-1].step, beats[-1].num_steps, beats[-1].world_size) == (5, 5, 1)
    last = read_csv(finished / "training.csv", TRAINING_COLUMNS)[-1]
    assert {name: getattr(beats[-1], name) for name in ("loss", "grad_norm", "lr", "step_s")} == {
        name: last[name] for name in ("loss", "grad_norm", "lr", "step_s")
    }
    assert beats[-1].fetch_p95_ms is not None
    assert judge_run(finished, Thresholds()) == []


def test_gates_and_selection_are_in_the_table_tensorboard_and_beats(finished: Path) -> None:
    rows = read_csv(finished / "health.csv", HEALTH_COLUMNS)
    assert [(row["step"], row["layer"]) for row in rows] == [(2, 0), (4, 0), (5, 0)]
    last = read_heartbeats(heartbeat_path(finished, 0))[-1]
    assert last.gate is not None
    assert last.selection is not None
    assert last.gate.entropy_mean_nats == rows[-1]["gate_entropy_mean_nats"]
    assert last.selection.mean_coverage == rows[-1]["mean_coverage"]
    assert sum(last.selection.distance_histogram.values()) > 0
    board = EventAccumulator(str(finished / "tb"))
    board.Reload()
    for name, value in (
        ("gate/entropy_mean_nats", rows[-1]["gate_entropy_mean_nats"]),
        ("selection/mean_coverage", rows[-1]["mean_coverage"]),
        ("health_gate_max_mean/layer_0", rows[-1]["gate_max_mean"]),
    ):
        events = board.Scalars(name)
        assert [event.step for event in events] == [2, 4, 5]
        assert events[-1].value == pytest.approx(value)


def test_health_is_judged_in_metrics_and_report(finished: Path) -> None:
    assert json.loads((finished / "metrics.json").read_text())["findings"] == []
    report = (finished / "report.md").read_text()
    rows = read_csv(finished / "health.csv", HEALTH_COLUMNS)
    assert "Nothing is outside the thresholds of a healthy run." in report
    assert "Gates and selection at step 5:" in report
    assert f"| 0 | {rows[-1]['gate_entropy_mean_nats']:.4g} | {rows[-1]['gate_max_mean']:.4g} |" in report


def test_what_is_not_healthy_is_in_metrics_and_report(tiny) -> None:
    trainer, folder = prepare(tiny(train={"steps": 2}))
    with torch.no_grad():
        trainer.model.model.layers[0].self_attn.gate.down.bias.view(-1, 3)[:, 0] = 50
    (finding,) = train(trainer, folder).metrics["findings"]
    assert finding.startswith("gates: rank 0, step 2: the gates have mean entropy 0.000 nats")
    assert f"- {finding}" in folder.report_md.read_text()


def test_measurements_can_be_switched_off(tiny) -> None:
    folder = train(*prepare(tiny(train={"steps": 2}, observe={"health_every_steps": 0}))).folder.path
    assert read_csv(folder / "health.csv", HEALTH_COLUMNS) == []
    assert read_heartbeats(heartbeat_path(folder, 0))[-1].gate is None
    assert "Gates and selection were not measured." in (folder / "report.md").read_text()


def test_only_rank_0_writes_shared_files_and_each_rank_its_own(tiny, tmp_path: Path) -> None:
    for rank in (0, 1):
        with Telemetry(RunFolder(tmp_path), tiny(), Parallel(rank, rank, 2, torch.device("cpu"), "ddp")) as telemetry:
            if rank == 1:
                before = {path.name: path.read_bytes() for path in tmp_path.glob("*.csv")}
            telemetry.phase("step")
            telemetry.step(RECORD, num_skipped=rank)
    assert {path.name: path.read_bytes() for path in tmp_path.glob("*.csv")} == before
    assert len(list((tmp_path / "tb").iterdir())) == 1
    for rank in (0, 1):
        last = read_heartbeats(heartbeat_path(tmp_path, rank))[-1]
        assert (last.rank, last.world_size, last.fetch_p95_ms) == (rank, 2, 100.0)
        told = ("step", "loss", "lr", "grad_norm", "tokens_per_s", "mfu", "step_s")
        assert {name: getattr(last, name) for name in told} == {name: getattr(RECORD, name) for name in told}
        assert last.counters == {"fallbacks": 0, "skipped_steps": rank}
        assert (tmp_path / f"stacks_rank{rank}.txt").is_file()


def test_curves_are_drawn_anew_at_evaluations_and_a_damaged_table_does_not_end_the_run(
    tiny, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    folder = RunFolder(tmp_path)
    with Telemetry(folder, tiny(), Parallel(0, 0, 1, torch.device("cpu"), "none")) as telemetry:
        telemetry.evaluation(EvalRecord(0, 5.0, 148.0, 7.2))
        assert not folder.curves_png.exists()  # two minutes are not over
        monkeypatch.setattr(telemetry_module, "REDRAW_AFTER_S", 0.0)
        telemetry.evaluation(EvalRecord(1, 4.0, 54.0, 5.7))
        assert folder.curves_png.stat().st_size > 10_000
        folder.health_csv.write_text("damaged\n")
        telemetry.evaluation(EvalRecord(2, 3.0, 20.0, 4.3))
    assert "curves.png cannot be drawn" in capsys.readouterr().out


TWO_RANKS = """
from nsa.config.run import RunConfig
from nsa.launch.start import prepare
from nsa.train.loop import train

with setup_parallel("cpu", "fsdp2") as parallel:
    train(*prepare(RunConfig.model_validate(given), parallel=parallel))
"""


def test_with_sharded_weights_both_ranks_beat_and_measure_what_one_process_does(tiny_values, tiny) -> None:
    observe = {"observe": {"health_every_steps": 1}}
    alone = train(*prepare(tiny(**observe, train={"steps": 2}))).folder.path
    values = {**tiny_values, **observe, "train": {**tiny_values["train"], "steps": 2, "parallel": "fsdp2"}}
    values["run"] = {**values["run"], "name": "sharded"}
    run_ranks(TWO_RANKS, values)
    together = alone.parent / "sharded"
    for expected, row in zip(*(read_csv(run / "health.csv", HEALTH_COLUMNS) for run in (alone, together)), strict=True):
        assert row == pytest.approx(expected, rel=1e-4)
    last = [read_heartbeats(heartbeat_path(together, rank))[-1] for rank in (0, 1)]
    assert [(beat.rank, beat.world_size, beat.step, beat.phase) for beat in last] == [
        (rank, 2, 2, "ended") for rank in (0, 1)
    ]
    assert last[0].gate is not None
    assert last[0].gate == last[1].gate
    assert last[0].pid != last[1].pid


def test_a_resumed_run_continues_its_tables_and_says_where_it_began(tiny, tmp_path: Path) -> None:
    parallel = Parallel(0, 0, 1, torch.device("cpu"), "none")
    with Telemetry(RunFolder(tmp_path), tiny(), parallel) as telemetry:
        for step in (3, 4):
            telemetry.step(replace(RECORD, step=step), num_skipped=0)
    with Telemetry(RunFolder(tmp_path), tiny(), parallel, start_step=3) as telemetry:
        pass
    assert [row["step"] for row in read_csv(tmp_path / "training.csv", TRAINING_COLUMNS)] == [3]
    last = read_heartbeats(heartbeat_path(tmp_path, 0))[-1]
    assert (last.start_step, last.step) == (3, 3)
