"""What ends a run: errors whose messages name the step or file, and the remedy."""

from __future__ import annotations


class TrainingError(RuntimeError):
    """A run that must not go on; the message names the step and the remedy."""


class CheckpointError(TrainingError):
    """A checkpoint that could not be written or read; the message names the folder, step, rank and remedy."""
