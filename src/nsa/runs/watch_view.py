"""What a look at a run shows: a table for people, plain values for programs, one line for logs.

The table takes as many columns as the terminal has room for, in the order of `_cells`; what is left over stands below
it, a line for each rank. Nothing that a file says reaches the terminal but as text.
"""

from __future__ import annotations

import json
from collections.abc import Sequence
from dataclasses import asdict
from typing import Any

from rich.cells import cell_len
from rich.console import Group
from rich.table import Table
from rich.text import Text

from nsa.runs.heartbeat import SCHEMA
from nsa.runs.watch import Look
from nsa.terminal import printable

GAP = 2  # blanks between columns
MAX_DETAILED = 8  # ranks that have a line of what the table has no room for
MAX_ROWS = 64  # ranks of the table


def as_table(look: Look, notes: Sequence[str] = (), *, width: int) -> Group:
    """State and findings, the watch's last notes, then the ranks.

    Args:
        width: columns of the terminal.
    """
    rows = {rank: _cells(look, rank) for rank in list(look.beats)[:MAX_ROWS]}
    headings = _fitting(list(rows.values()), width)
    parts = [_headline(look)]
    parts += [_text(str(found), style="yellow" if found.level == "warn" else "bold red") for found in look.findings]
    parts += map(_text, notes)
    if len(look.beats) > MAX_ROWS:
        parts.append(_text(f"the first {MAX_ROWS} of {len(look.beats)} ranks; --json has all"))
    table = Table(box=None, padding=(0, GAP, 0, 0), pad_edge=False, header_style="bold")
    for heading in headings:
        table.add_column(heading, justify="left" if heading in ("phase", "process") else "right")
    for cells in rows.values():
        table.add_row(*(_text(cells[heading]) for heading in headings))
    details = [_details(rank, cells, headings) for rank, cells in rows.items()] if len(rows) <= MAX_DETAILED else []
    return Group(*parts, *([table] if rows else []), *filter(None, details))


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
    loss = "" if beat.loss is None else f"  loss {_number(beat.loss, '.4f')}  {beat.tokens_per_s or 0:,.0f} tokens/s"
    found = ", ".join(f"{finding.name} (rank {finding.rank})" for finding in look.findings) or "healthy"
    return printable(f"{look.status['state']}  step {beat.step}/{beat.num_steps}  {beat.phase}{loss}  {found}")


def _headline(look: Look) -> Text:
    status = look.status
    where = "" if status.get("rank") is None else f" by rank {status['rank']}"
    reason = f"{where}: {status['reason']}" if status.get("reason") else ""
    line = _text(f"{look.run}  {status['state']}{reason}  ", style="bold")
    if not look.beats:
        line.append("no beats yet" if look.running else "no beats", style="yellow")
    elif not look.findings:
        line.append("healthy", style="green")
    return line


def _cells(look: Look, rank: int) -> dict[str, str]:
    """What is shown of a rank by its heading, the most important first."""
    beat = look.beats[rank]
    age_s = beat.progress_age_s + look.silence_s[rank]
    gate = beat.gate
    return {
        "rank": str(rank),
        "step": f"{beat.step}/{beat.num_steps}",
        "loss": _number(beat.loss, ".4f"),
        "tokens/s": _number(beat.tokens_per_s, ",.0f"),
        "phase": beat.phase,
        "progress": "" if beat.phase == "ended" else f"{age_s:.0f} s ago",
        "MFU": _number(beat.mfu, ".1%"),
        "GPU mem": _number(beat.gpu_reserved_gib, ".2f", " GiB"),
        "grad norm": _number(beat.grad_norm, ".3f"),
        "a step": _number(beat.step_s, ".3f", " s"),
        "fetch p95": _number(beat.fetch_p95_ms, ".2f", " ms"),
        "host mem": _number(beat.host_rss_gib, ".2f", " GiB"),
        "gate entropy": "" if gate is None else f"{gate.entropy_mean_nats:.3f}",
        "collapsed": "" if gate is None else f"{gate.collapse_share:.1%}",
        "process": f"{beat.pid} on {beat.host}",
    }


def _fitting(rows: Sequence[dict[str, str]], width: int) -> list[str]:
    """The first headings whose columns fit beside each other; columns without a value take no room."""
    headings: list[str] = []
    used = 0
    for heading in rows[0] if rows else ():
        widths = [cell_len(printable(cells[heading])) for cells in rows]
        if not any(widths):
            continue
        used += max(len(heading), *widths) + (GAP if headings else 0)
        if used > width:
            break
        headings.append(heading)
    return headings


def _details(rank: int, cells: dict[str, str], headings: Sequence[str]) -> Text | None:
    """What of a rank the table has no room for."""
    left = [f"{heading} {cell}" for heading, cell in cells.items() if cell and heading not in headings]
    return _text(f"rank {rank}: {', '.join(left)}", style="dim") if left else None


def _text(text: str, style: str = "") -> Text:
    """Text that is shown as it is: neither escape sequences nor markup act."""
    return Text(printable(text), style=style)


def _number(value: float | None, form: str, unit: str = "") -> str:
    if value is None:
        return ""
    return f"{value:{form if abs(value) < 1e9 else '.3g'}}{unit}"
