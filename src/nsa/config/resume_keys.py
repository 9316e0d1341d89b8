"""What a resumed run may change of its config."""

from __future__ import annotations

ALLOWED = frozenset(
    {
        "run.device",
        "run.num_threads",
        "model.attention_backend",
        "data.cache_folder",
        "data.first_batch_timeout_s",
        "data.hub_access",
        "data.paths",
        "data.prefetch_batches",
        "data.stall_timeout_s",
        "train.activation_checkpointing",
        "train.checkpoint_every_steps",
        "train.collective_timeout_s",
        "train.compile",
        "train.early_stop_evals",
        "train.keep_checkpoints",
        "train.keep_every_steps",
        "train.log_every_steps",
        "train.micro_batch_rows",
        "train.parallel",
        "train.steps",
        "eval.every_steps",
        "eval.rows",
    }
)
"""Keys that a resumed run may change: how long, where and how it computes, and what it writes. None changes what a step
is meant to compute, though another device or another cut of the batch changes the last bits. Files may lie elsewhere,
but their contents must be the same: the data's fingerprint is compared."""

ALLOWED_SECTIONS = ("guards", "observe", "preflight", "sample")
"""Sections that a resumed run may change throughout."""


def is_allowed(name: str) -> bool:
    """Whether a resumed run may change this key."""
    return name in ALLOWED or name.partition(".")[0] in ALLOWED_SECTIONS
