"""The files of a run folder that grow, brought to where a resumed run goes on: what was lost is restored, or named."""

from __future__ import annotations

from pathlib import Path

from nsa.runs.checkpoints import TABLES
from nsa.runs.files import put_aside
from nsa.runs.folder import RunFolder, write_text
from nsa.runs.heartbeat import heartbeat_files, read_heartbeats
from nsa.runs.tables import HEALTH_COLUMNS, TRAINING_COLUMNS, VALIDATION_COLUMNS, read_csv, rows_until

DAMAGED = "damaged_"


def restore_tables(folder: RunFolder, checkpoint: Path | None, step: int) -> list[str]:
    """Let every table end with the row of a checkpoint, from its copy there if need be.

    Args:
        folder: of the run; its tables may be missing, emptied, damaged or longer.
        checkpoint: that the run resumes from; None where it begins again.
        step: of the checkpoint.

    Returns:
        A line about each table that was restored, or whose rows are lost.
    """
    columns = (TRAINING_COLUMNS, VALIDATION_COLUMNS, HEALTH_COLUMNS)
    notes = (_restore(path, names, checkpoint, step) for path, names in zip(folder.tables, columns, strict=True))
    return [note for note in notes if note]


def put_damaged_beats_aside(folder: RunFolder) -> list[str]:
    """Give heartbeat files that cannot be read another name, and say so: the report reads them when the run ends."""
    notes = []
    for path in heartbeat_files(folder.path).values():
        try:
            read_heartbeats(path)
        except ValueError as error:
            notes.append(f"{error}; the file is now {put_aside(path, DAMAGED).name}, and a new one is begun")
    return notes


def _restore(path: Path, columns: tuple[str, ...], checkpoint: Path | None, step: int) -> str | None:
    found, problem = _rows(path, columns, step)
    copy = None if checkpoint is None else checkpoint / TABLES / path.name
    if copy is not None and (stored := _rows(copy, columns, step)[0]) is not None:
        if found == stored:
            return None
        aside = _clear(path)
        write_text(path, stored)
        return f"{path} {problem or f'is not as it was at step {step}'}; restored from {copy}{aside}"
    if problem:
        aside = _clear(path)
        lost = f" and {checkpoint} has no copy: the rows up to step {step} are lost" if checkpoint else ""
        return f"{path} {problem}{lost}; a new one is begun{aside}" if lost or aside else None
    last = max((row["step"] or 0 for row in read_csv(path, columns)), default=0)
    if "loss" in columns and last < step:
        return f"{path} ends with step {last}: the rows from there to step {step} are lost"
    return None


def _rows(path: Path, columns: tuple[str, ...], step: int) -> tuple[str | None, str | None]:
    """The text of a table up to a step, or what is wrong with it."""
    if not path.is_file():
        return None, "is missing"
    try:
        return rows_until(path, columns, step), None
    except ValueError as error:
        return None, f"is damaged ({error})"


def _clear(path: Path) -> str:
    """Make way for a new table; what an old one still holds is kept under another name, which is returned in words."""
    if not path.is_file():
        return ""
    if not path.stat().st_size:
        path.unlink()
        return ""
    return f"; what was there is now {put_aside(path, DAMAGED).name}"
