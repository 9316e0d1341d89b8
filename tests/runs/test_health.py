"""What beats say about a run's health: each finding at its threshold, and none for a healthy run."""

from __future__ import annotations

import math
from dataclasses import fields, replace
from pathlib import Path

import pytest

from made_up_beats import COLLAPSED_GATE, EVEN_GATE, NOW_S, beat, beats, of_rank, write_beats
from made_up_runs import write_health
from nsa.runs.health import judge, judge_run
from nsa.runs.heartbeat import Beat
from nsa.runs.thresholds import AT_MOST, Thresholds

LIMITS = Thresholds()


def names(found: list[Beat], now_s: float | None = NOW_S, limits: Thresholds = LIMITS) -> list[str]:
    return [finding.name for finding in judge(found, limits, now_s=now_s)]


def test_a_healthy_run_has_no_findings() -> None:
    losses = [5.0 - 0.01 * k for k in range(200)]
    speeds = [10_000.0 + 500 * math.sin(k) for k in range(200)]
    assert names(beats(200, loss=losses, tokens_per_s=speeds)) == []
    assert names([]) == []


@pytest.mark.parametrize(("phase", "what"), [("fetch", "the loader gives no batch"), ("step", "it hangs in 'step'")])
def test_a_stall_names_rank_step_process_and_remedy(phase: str, what: str) -> None:
    assert names([beat(phase=phase, progress_age_s=180.0)]) == []
    (finding,) = judge([beat(phase=phase, progress_age_s=175.0, rank=3)], LIMITS, now_s=NOW_S + 6)
    assert (finding.name, finding.level, finding.rank, finding.step) == ("stall", "halt", 3, 50)
    for part in ("no progress for 181 s (at most 180)", what, f"kill process {beat().pid}", "`nsa resume`"):
        assert part in str(finding), part


@pytest.mark.parametrize("phase", ["startup", "preflight", "evaluate", "checkpoint", "sample", "finish"])
def test_slow_phases_and_the_warm_up_have_more_time(phase: str) -> None:
    for slow in (beat(phase=phase), beat(start_step=48), beat(start_step=50)):
        assert names([replace(slow, progress_age_s=1700.0)]) == []
        assert names([replace(slow, progress_age_s=1801.0)]) == ["stall"]
    assert names([beat(start_step=47, progress_age_s=181.0)]) == ["stall"]


def test_a_process_that_falls_silent_is_not_called_stalled_too() -> None:
    assert names([beat()], NOW_S + 60) == []
    (finding,) = judge([beat()], LIMITS, now_s=NOW_S + 500)
    assert (finding.name, finding.level) == ("silent", "halt")
    assert "no beat for 500 s (at most 60), the last one in 'step'" in finding.message


def test_a_run_that_has_ended_is_neither_silent_nor_stalled() -> None:
    assert names([beat(phase="ended")], NOW_S + 10_000) == []
    assert names([beat(progress_age_s=10_000.0)], None) == []


@pytest.mark.parametrize("changes", [{"loss": math.nan}, {"grad_norm": math.inf}, {"loss": -math.inf}])
def test_a_loss_or_norm_that_is_not_finite_halts(changes: dict[str, float]) -> None:
    (finding,) = judge([beat(**changes)], LIMITS, now_s=NOW_S)
    assert (finding.name, finding.level, finding.step) == ("nonfinite", "halt", 50)
    assert str(next(iter(changes.values()))) in finding.message
    assert "optim.lr" in finding.remedy


def speeds(usual: int, recent: int, drop: float) -> list[Beat]:
    """`usual` beats of 10,000 tokens/s and then `recent` ones with a share less."""
    values = [10_000.0] * usual + [10_000.0 * (1 - drop)] * recent
    return beats(usual + recent, tokens_per_s=values)


def test_throughput_below_the_runs_own_median_is_found_when_it_lasts() -> None:
    (finding,) = judge(speeds(100, 24, 0.12), LIMITS, now_s=NOW_S)
    assert (finding.name, finding.level) == ("throughput", "stacks")
    assert "8,800 tokens/s over the last 120 s, 12% below the run's median of 10,000" in finding.message
    assert "p95 0.4 ms" in finding.message
    assert names(speeds(100, 24, 0.09)) == []
    assert names(speeds(100, 8, 0.5)) == []  # a third of the window


def test_throughput_needs_steps_of_their_own_and_passes_over_the_warm_up() -> None:
    limits = Thresholds(warmup_steps=40, throughput_window_s=50.0, throughput_min_beats=5)
    fast_start = beats(60, tokens_per_s=[50_000.0] * 40 + [10_000.0] * 20, step=list(range(1, 61)))
    assert names(fast_start, limits=limits) == []
    assert names(fast_start, limits=replace(limits, warmup_steps=0)) == ["throughput"]
    one_slow_step = speeds(100, 24, 0.5)
    one_slow_step[-24:] = [replace(one, step=110) for one in one_slow_step[-24:]]
    assert names(one_slow_step) == []


def test_only_the_newest_process_counts() -> None:
    earlier = beats(100, last_s=NOW_S - 120)
    later = beats(24, tokens_per_s=5_000.0, step=list(range(110, 134)))
    assert names(earlier + later) == ["throughput"]
    for changes in ({"pid": 1}, {"process_start_s": 1.0}):
        assert names([replace(one, **changes) for one in earlier] + later) == []


def test_memory_that_grows_is_found_and_memory_that_fills_once_is_not() -> None:
    grown = beats(80, host_rss_gib=[4.0 + 0.04 * k for k in range(80)])
    (finding,) = judge(grown, LIMITS, now_s=NOW_S)
    assert (finding.name, finding.level) == ("memory", "warn")
    assert finding.message == "host memory grew from 5.18 to 6.78 GiB since step 30"
    assert names(beats(80, host_rss_gib=[1.0] * 15 + [4.0] * 65)) == []
    assert names(beats(80, host_rss_gib=[1.0 + 0.005 * k for k in range(80)])) == []  # a third, but little
    assert names(beats(80, host_rss_gib=[60.0 + 0.05 * k for k in range(80)])) == []  # much, but a small share
    (finding,) = judge(beats(80, gpu_reserved_gib=[20.0 + k for k in range(80)]), LIMITS, now_s=NOW_S)
    assert finding.message.startswith("device memory grew")


def test_a_loss_that_rises_above_its_lowest_is_found_and_noise_is_not() -> None:
    falling = [4.0 - 0.05 * k for k in range(40)]
    (finding,) = judge(beats(60, loss=falling + [3.0] * 20), LIMITS, now_s=NOW_S)
    assert (finding.name, finding.level) == ("loss", "warn")
    assert "rose to 3.000 nats per token from 2.275" in finding.message
    assert names(beats(60, loss=falling + [2.6] * 20)) == []
    assert names(beats(60, loss=[2.0, 4.0] * 30)) == []


@pytest.mark.parametrize(
    ("changes", "words"),
    [
        ({"entropy_mean_nats": 0.5}, "mean entropy 0.500 nats, at least 0.5"),
        ({"entropy_mean_nats": math.nan}, "mean entropy nan nats"),
        ({"max_mean": 0.9}, "mean maximum 0.900, at most 0.9"),
        ({"collapse_share": 0.051}, "5.1% of them collapsed, at most 5.0%"),
    ],
)
def test_gates_are_held_to_each_of_their_thresholds(changes: dict[str, float], words: str) -> None:
    gate = replace(EVEN_GATE, **changes)
    (finding,) = judge([beat(gate=gate)], LIMITS, now_s=NOW_S)
    assert (finding.name, finding.level) == ("gates", "halt")
    assert words in finding.message
    assert "model.gate_temperature" in finding.remedy


def test_gates_just_inside_are_healthy_and_a_single_collapsed_layer_is_named() -> None:
    inside = replace(EVEN_GATE, entropy_mean_nats=0.51, max_mean=0.89, collapse_share=0.05)
    assert names([beat(gate=inside, worst_gate=inside)]) == []
    (finding,) = judge([beat(worst_gate=COLLAPSED_GATE, worst_gate_layer=7)], LIMITS, now_s=NOW_S)
    assert (finding.name, finding.level) == ("gate layer", "warn")
    assert "gates of layer 7" in finding.message
    assert names([beat(gate=COLLAPSED_GATE, worst_gate=COLLAPSED_GATE)]) == ["gates"]


def test_counters_that_are_not_zero_are_told() -> None:
    assert names([beat(counters={"skipped_steps": 0})]) == []
    (finding,) = judge([beat(counters={"skipped_steps": 2, "fallbacks": 0})], LIMITS, now_s=NOW_S)
    assert (finding.name, finding.message) == ("counters", "skipped steps 2")


def test_a_run_is_judged_over_all_its_ranks(tmp_path: Path) -> None:
    write_beats(tmp_path, of_rank(0, [beat(phase="ended")]))
    write_beats(tmp_path, of_rank(1, [beat(phase="ended", loss=math.nan)]))
    assert [(finding.name, finding.rank) for finding in judge_run(tmp_path, LIMITS)] == [("nonfinite", 1)]


OUTSIDE = {"gate_collapse_share": 0.3}


def test_the_gates_of_a_run_that_went_on_from_a_checkpoint_are_those_of_its_table(tmp_path: Path) -> None:
    earlier = beat(phase="ended", gate=COLLAPSED_GATE, pid=1)
    write_beats(tmp_path, [earlier, beat(phase="ended", gate=None, worst_gate=None, worst_gate_layer=None)])
    write_health(tmp_path, [{"step": 40, "layer": layer} for layer in (0, 1)])
    assert judge_run(tmp_path, LIMITS) == []
    write_health(tmp_path, [{"step": step, "layer": layer, **OUTSIDE} for step in (20, 40) for layer in (0, 1)])
    (finding,) = judge_run(tmp_path, LIMITS)
    assert (finding.name, finding.step) == ("gates", 40)
    assert "30.0% of them collapsed" in finding.message
    write_health(tmp_path, [{"step": 40, "layer": layer, **(OUTSIDE if layer == 7 else {})} for layer in range(8)])
    (finding,) = judge_run(tmp_path, LIMITS)
    assert finding.name == "gate layer"
    assert "the gates of layer 7 have 30.0% of them collapsed" in finding.message


def test_after_a_resume_the_last_measured_gates_and_the_lowest_loss_still_count() -> None:
    earlier = [replace(one, gate=COLLAPSED_GATE) for one in beats(40, last_s=NOW_S - 200, loss=1.0, pid=1)]
    steps = list(range(50, 90))
    later = beats(40, loss=2.0, gate=None, worst_gate=None, worst_gate_layer=None, step=steps, start_step=40)
    assert names(earlier + later) == ["loss", "gates"]


@pytest.mark.parametrize("name", [field.name for field in fields(Thresholds)])
@pytest.mark.parametrize("value", [math.nan, math.inf, -1])
def test_a_threshold_that_would_silence_its_alarm_is_refused(name: str, value: float) -> None:
    with pytest.raises(ValueError, match=rf"thresholds\.{name} is {value:g}; it must be a finite number"):
        Thresholds(**{name: value})
    if name in AT_MOST:
        with pytest.raises(ValueError, match=r"is 1\.5; it must be a finite number, from 0 to 1"):
            Thresholds(**{name: 1.5})
