"""What a look at a run shows: a table for people, plain values for programs, one line for logs."""

from __future__ import annotations

import json
from collections.abc import Sequence
from dataclasses import asdict
from typing import Any

from rich.console import Group
from rich.table import Table
from rich.text import Text

from nsa.train.observe.heartbeat import SCHEMA, Beat
from nsa.train.observe.watch import Look

COLUMNS = (
    *("rank", "process", "phase", "step", "progress", "loss", "grad norm", "tokens/s", "MFU", "step", "fetch p95"),
    *("GPU", "host", "gate entropy", "collapsed"),
)


def as_table(look: Look, notes: Sequence[str] = ()) -> Group:
    """Ranks, findings and the watch's last notes."""
    status = look.status
    where = "" if status.get("rank") is None else f" by rank {status['rank']}"
    reason = f"{where}: {status['reason']}" if status["reason"] else ""
    table = Table(*COLUMNS, title=f"{look.run}  {status['state']}{reason}", title_justify="left", expand=False)
    for beat in look.beats.values():
        table.add_row(*_cells(beat, look.unix_time_s))
    findings = [Text(str(found), style="yellow" if found.level == "warn" else "bold red") for found in look.findings]
    healthy = Text("healthy" if look.beats else "no beats yet", style="green")
    return Group(table, *(findings or [healthy]), *map(Text, notes))


def as_json(look: Look, notes: Sequence[str] = ()) -> dict[str, Any]:
    """Status, newest beats, findings and what the watch did."""
    return {
        "run": str(look.run),
        "unix_time_s": look.unix_time_s,
        "status": look.status,
        "healthy": not look.findings,
        "findings": [asdict(finding) for finding in look.findings],
        "beats": [json.loads(SCHEMA.dump_json(beat)) for beat in look.beats.values()],
        "done": list(notes),
    }


def as_line(look: Look) -> str:
    """The run's position in one line, of its slowest rank."""
    if not look.beats:
        return f"{look.status['state']}, no beats yet"
    beat = min(look.beats.values(), key=lambda beat: (beat.step, -beat.progress_age_s))
    loss = "" if beat.loss is None else f"  loss {beat.loss:.4f}  {beat.tokens_per_s or 0:,.0f} tokens/s"
    found = ", ".join(f"{finding.name} (rank {finding.rank})" for finding in look.findings) or "healthy"
    return f"{look.status['state']}  step {beat.step}/{beat.num_steps}  {beat.phase}{loss}  {found}"


def _cells(beat: Beat, now_s: float) -> list[str]:
    age_s = beat.progress_age_s + max(0.0, now_s - beat.unix_time_s)
    gate = beat.gate
    return [
        str(beat.rank),
        f"{beat.host}:{beat.pid}",
        beat.phase,
        f"{beat.step}/{beat.num_steps}",
        "" if beat.phase == "ended" else f"{age_s:.0f} s ago",
        _number(beat.loss, ".4f"),
        _number(beat.grad_norm, ".3f"),
        _number(beat.tokens_per_s, ",.0f"),
        _number(beat.mfu, ".1%"),
        _number(beat.step_s, ".3f", " s"),
        _number(beat.fetch_p95_ms, ".2f", " ms"),
        _number(beat.gpu_reserved_gib, ".2f", " GiB"),
        _number(beat.host_rss_gib, ".2f", " GiB"),
        "" if gate is None else f"{gate.entropy_mean_nats:.3f}",
        "" if gate is None else f"{gate.collapse_share:.1%}",
    ]


def _number(value: float | None, form: str, unit: str = "") -> str:
    return "" if value is None else f"{value:{form}}{unit}"
