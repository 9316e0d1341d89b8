"""Is a run healthy? One rank's beats, judged by the thresholds, become findings with a remedy each.

    for finding in judge(read_heartbeats(path), Thresholds(), now_s=time.time()):
        print(finding)

The watch judges a living run, the report and the smoke check one that has ended.
"""

from __future__ import annotations

import math
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from statistics import median
from typing import Literal

from nsa.inspect.statistics import GateStatistics, pool_gates
from nsa.runs.heartbeat import Beat, heartbeat_files, read_heartbeats
from nsa.runs.tables import GATE_NUMBERS, HEALTH_COLUMNS, Row, iter_csv
from nsa.runs.thresholds import Thresholds

Level = Literal["warn", "stacks", "halt"]
"""How far the watch goes for a finding that lasts: it says so; it also asks for stacks; it also halts the run."""

Name = Literal["stall", "silent", "nonfinite", "throughput", "memory", "loss", "gates", "gate layer", "counters", "run"]

Process = Literal["alive", "gone", "unknown"]

SILENCE: dict[Process, str] = {
    "alive": "is there: it is suspended, or hangs in C with the interpreter locked. Its stacks say where; kill it, "
    "then `nsa resume`",
    "gone": "is gone: killed, out of memory, or its machine restarted. `nsa resume`",
    "unknown": "is gone, suspended, or hangs in C with the interpreter locked. Look there, kill it if it is still "
    "there, then `nsa resume`",
}


@dataclass(frozen=True)
class Finding:
    """Something about a run that is not healthy.

    Attributes:
        name: what kind of thing.
        level: how far the watch goes for it.
        rank, step: where and when.
        message: what it is, with the numbers.
        remedy: what to do.
    """

    name: Name
    level: Level
    rank: int
    step: int
    message: str
    remedy: str

    def __str__(self) -> str:
        return f"{self.name}: rank {self.rank}, step {self.step}: {self.message}. {self.remedy}"


def judge(
    beats: Sequence[Beat], thresholds: Thresholds, *, now_s: float | None = None, process: Process = "unknown"
) -> list[Finding]:
    """What is wrong with one rank.

    Args:
        beats: of one rank, oldest first; for speed, memory and liveness those of its newest process count.
        now_s: Unix time, to judge whether a living process makes progress; leave it out for one that has ended.
        process: whether the process is there, where that can be told; explains a silence.
    """
    if not beats:
        return []
    last = beats[-1]
    newest = [beat for beat in beats if (beat.pid, beat.process_start_s) == (last.pid, last.process_start_s)]
    # A resumed process measures no gates at first; what was measured last holds till then.
    measured = next((beat for beat in reversed(beats) if beat.gate is not None), last)
    findings = [] if now_s is None or last.phase == "ended" else [_liveness(last, thresholds, now_s, process)]
    findings += [_nonfinite(last), _throughput(newest, thresholds), _memory(newest, thresholds)]
    findings += [_loss(beats, thresholds), _gates(measured, thresholds), _counters(last)]
    return [finding for finding in findings if finding is not None]


def judge_run(run: Path, thresholds: Thresholds) -> list[Finding]:
    """What was wrong with a run that has ended, over all its ranks; its gates as they stand at the end of health.csv.

    Raises:
        ValueError: a heartbeat file or the table cannot be read.
    """
    found = [found for path in heartbeat_files(run).values() for found in judge(read_heartbeats(path), thresholds)]
    rows = [row for row in last_health(run / "health.csv") if row["gate_entropy_mean_nats"] is not None]
    if not rows:
        return found
    judged = _gates_of_table(rows, thresholds)
    return [finding for finding in found if finding.name not in ("gates", "gate layer")] + ([judged] if judged else [])


def last_health(path: Path) -> list[Row]:
    """The rows of the last measurement in a `health.csv`, one for each layer; none where there is none."""
    last: list[Row] = []
    for row in iter_csv(path, HEALTH_COLUMNS) if path.is_file() else ():
        last = [row] if not last or row["step"] != last[0]["step"] else [*last, row]
    return last


def gate_of_row(row: Row) -> GateStatistics:
    """The gates of a row of `health.csv`; an empty cell is NaN."""
    cells = {name: row[f"gate_{name}"] for name in GATE_NUMBERS}
    return GateStatistics(1, **{name: math.nan if value is None else value for name, value in cells.items()})


def judge_gate(gate: GateStatistics, thresholds: Thresholds) -> list[str]:
    """What of a gate is outside its thresholds, in words."""
    return list(outside_columns(gate, thresholds).values())


def outside_columns(gate: GateStatistics, thresholds: Thresholds) -> dict[str, str]:
    """The columns of `health.csv` in which a gate is outside its thresholds, each in words."""
    found = {}
    # Written so that NaN is outside.
    if not gate.entropy_mean_nats > thresholds.gate_entropy_mean_nats:
        words = f"mean entropy {gate.entropy_mean_nats:.3f} nats, at least {thresholds.gate_entropy_mean_nats:g}"
        found["gate_entropy_mean_nats"] = words
    if not gate.max_mean < thresholds.gate_max_mean:
        found["gate_max_mean"] = f"mean maximum {gate.max_mean:.3f}, at most {thresholds.gate_max_mean:g}"
    if not gate.collapse_share <= thresholds.gate_collapse_share:
        words = f"{gate.collapse_share:.1%} of them collapsed, at most {thresholds.gate_collapse_share:.1%}"
        found["gate_collapse_share"] = words
    return found


def _liveness(last: Beat, thresholds: Thresholds, now_s: float, process: Process) -> Finding | None:
    silent_s = now_s - last.unix_time_s
    if silent_s > thresholds.silent_s:
        return Finding(
            *("silent", "halt", last.rank, last.step),
            f"no beat for {silent_s:.0f} s (at most {thresholds.silent_s:g}), the last one in {last.phase!r}",
            f"Process {last.pid} on {last.host} {SILENCE[process]}",
        )
    busy = last.phase in ("fetch", "step") and last.step - last.start_step >= thresholds.warmup_steps
    limit_s = thresholds.stall_s if busy else thresholds.slow_phase_stall_s
    stalled_s = last.progress_age_s + max(0.0, silent_s)
    if stalled_s <= limit_s:
        return None
    if last.phase == "fetch":
        what, remedy = "the loader gives no batch", "Look at the data's disk or network, and at the stacks for where"
    else:
        what = f"it hangs in {last.phase!r}"
        remedy = "Its stacks say where; a rank that waits for the others stands in a collective, so look at all ranks"
    return Finding(
        *("stall", "halt", last.rank, last.step),
        f"no progress for {stalled_s:.0f} s (at most {limit_s:g}): {what}",
        f"{remedy}. Then kill process {last.pid} on {last.host} and `nsa resume`",
    )


def _nonfinite(last: Beat) -> Finding | None:
    values = {"loss": last.loss, "gradient norm": last.grad_norm}
    found = [f"{name} {value}" for name, value in values.items() if value is not None and not math.isfinite(value)]
    if not found:
        return None
    return Finding(
        *("nonfinite", "halt", last.rank, last.step),
        " and ".join(found),
        "Lower optim.lr or look at the data, and resume from a checkpoint before this step",
    )


def _throughput(beats: Sequence[Beat], thresholds: Thresholds) -> Finding | None:
    stepped = _stepped(beats, thresholds)
    since_s = beats[-1].unix_time_s - thresholds.throughput_window_s
    recent = [beat for beat in stepped if beat.unix_time_s > since_s]
    if min(len(recent), len(stepped) - len(recent)) < thresholds.throughput_min_beats:
        return None
    usual, now = _median(stepped, "tokens_per_s"), _median(recent, "tokens_per_s")
    if now >= usual * (1 - thresholds.throughput_drop):
        return None
    last = beats[-1]
    waited = (
        f"; waits for data: p50 {last.fetch_p50_ms:.1f} ms, p95 {last.fetch_p95_ms:.1f} ms" if last.fetch_p50_ms else ""
    )
    return Finding(
        *("throughput", "stacks", last.rank, last.step),
        f"{now:,.0f} tokens/s over the last {thresholds.throughput_window_s:g} s, {1 - now / usual:.0%} below the "
        f"run's median of {usual:,.0f}{waited}",
        "If the waits have grown, look at the data's disk or network; if not, for other work on the device, its clocks "
        "and temperature (nvidia-smi), or a slow rank",
    )


def _memory(beats: Sequence[Beat], thresholds: Thresholds) -> Finding | None:
    beats = [beat for beat in beats if beat.step - beat.start_step >= thresholds.warmup_steps]
    if len(beats) < thresholds.memory_min_beats:
        return None
    quarter = len(beats) // 4
    for name, what in (("gpu_reserved_gib", "device memory"), ("host_rss_gib", "host memory")):
        if getattr(beats[-1], name) is None:
            continue
        before, now = _median(beats[quarter : 2 * quarter], name), _median(beats[-quarter:], name)
        if now - before > max(thresholds.memory_growth_gib, before * thresholds.memory_growth):
            return Finding(
                *("memory", "warn", beats[-1].rank, beats[-1].step),
                f"{what} grew from {before:.2f} to {now:.2f} GiB since step {beats[quarter].step}",
                "Something is kept from step to step; `observe.memory_snapshot_steps` records what holds device memory",
            )
    return None


def _loss(beats: Sequence[Beat], thresholds: Thresholds) -> Finding | None:
    stepped = _stepped(beats, thresholds)
    size = thresholds.loss_beats
    losses = [_median(stepped[end - size : end], "loss") for end in range(len(stepped), size - 1, -size)]
    if len(losses) < 2 or not losses[0] > min(losses[1:]) + thresholds.loss_rise_nats:
        return None
    return Finding(
        *("loss", "warn", beats[-1].rank, beats[-1].step),
        f"the loss rose to {losses[0]:.3f} nats per token from {min(losses[1:]):.3f}",
        "Look at the gradient norm and the data of these steps; lower optim.lr or resume from an earlier checkpoint",
    )


def _gates(last: Beat, thresholds: Thresholds) -> Finding | None:
    layers = {} if last.worst_gate is None else {last.worst_gate_layer: last.worst_gate}
    return _gate_finding(last.rank, last.step, last.gate, layers, thresholds)


def _gates_of_table(rows: Sequence[Row], thresholds: Thresholds) -> Finding | None:
    layers: dict[int | None, GateStatistics] = {int(row["layer"] or 0): gate_of_row(row) for row in rows}
    return _gate_finding(0, int(rows[0]["step"] or 0), pool_gates(list(layers.values())), layers, thresholds)


def _gate_finding(
    rank: int,
    step: int,
    pooled: GateStatistics | None,
    layers: Mapping[int | None, GateStatistics],
    thresholds: Thresholds,
) -> Finding | None:
    """All layers together outside the thresholds, or else the layers that are."""
    remedy = "Raise model.gate_temperature or lower optim.lr; health.csv has every layer"
    if pooled is not None and (found := judge_gate(pooled, thresholds)):
        shares = f"shares {pooled.share_cmp:.2f} compressed, {pooled.share_slc:.2f} selected, "
        shares += f"{pooled.share_win:.2f} window"
        return Finding("gates", "halt", rank, step, f"the gates have {'; '.join(found)} ({shares})", remedy)
    outside = {layer: found for layer, gate in layers.items() if (found := judge_gate(gate, thresholds))}
    if not outside:
        return None
    message = "; ".join(f"the gates of layer {layer} have {', '.join(found)}" for layer, found in outside.items())
    return Finding("gate layer", "warn", rank, step, message, remedy)


def _counters(last: Beat) -> Finding | None:
    found = ", ".join(f"{name.replace('_', ' ')} {total}" for name, total in list(last.counters.items())[:8] if total)
    if not found:
        return None
    return Finding("counters", "warn", last.rank, last.step, found, "All of these are 0 in a healthy run; see its log")


def _stepped(beats: Iterable[Beat], thresholds: Thresholds) -> list[Beat]:
    """The first beat of each step that any beat shows, after the warm-up."""
    found: list[Beat] = []
    for beat in beats:
        step = found[-1].step if found else beat.start_step + thresholds.warmup_steps
        if beat.step > step and beat.loss is not None and beat.tokens_per_s is not None:
            found.append(beat)
    return found


def _median(beats: Sequence[Beat], name: str) -> float:
    return median(getattr(beat, name) for beat in beats)
