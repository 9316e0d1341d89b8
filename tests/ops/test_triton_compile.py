"""Every Triton kernel compiles for Ampere, Hopper and Blackwell without a GPU, within their shared memory."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest

pytest.importorskip("triton")

PROGRAM = Path(__file__).with_name("triton_compile.py")
PATHS = [str(Path(__file__).parents[2] / "src"), str(Path(__file__).parents[1])]
KERNELS = {
    "mean_pool_kernel", "mean_pool_backward_kernel", "delta_kernel", "choice_kernel", "count_kernel",
    "sort_kernel", "first_item_kernel", "item_kernel", "selected_forward_kernel", "selected_reduce_kernel",
    "selected_dq_reduce_kernel", "selected_dkdv_reduce_kernel", "gate_backward_kernel", "union_kernel",
}  # fmt: skip
PLAIN_KERNELS = {
    "dense_forward_kernel", "dense_dkdv_kernel", "dense_dq_kernel", "scores_kernel", "union_forward_kernel",
    "union_dq_kernel", "selected_backward_kernel", "forced_forward_kernel",
}  # fmt: skip
HOPPER_KERNELS = {
    "dense_forward_sm90_kernel", "dense_dkdv_sm90_kernel", "dense_dq_sm90_kernel", "scores_sm90_kernel",
    "selected_forward_sm90_kernel", "selected_backward_sm90_kernel", "union_forward_sm90_kernel",
    "union_dq_sm90_kernel",
}  # fmt: skip
DECODE_KERNELS = {
    "decode_compressed_kernel", "decode_importance_kernel", "decode_choice_window_kernel", "decode_selected_kernel",
    "decode_merge_kernel",
}  # fmt: skip
LAYOUT_KERNELS = {"_compressed_bounds", "_spread"}
MATRIX_KERNELS = {"selected_forward_kernel"}
# Shared memory that a program may have: consumer Ampere and Ada 99 KiB, Hopper and data-centre Blackwell 227 KiB.
LIMITS = {80: 99 * 1024, 90: 227 * 1024, 100: 227 * 1024}


def compiled(architecture: int, dtype: str, group_size: int, head_dim: int, packed: bool, cache: Path) -> list[dict]:
    arguments = [str(x) for x in (architecture, dtype, group_size, head_dim, int(packed))]
    environment = {k: v for k, v in os.environ.items() if k != "TRITON_INTERPRET"}
    environment |= {"PYTHONPATH": os.pathsep.join(PATHS), "TRITON_CACHE_DIR": str(cache)}
    run = subprocess.run(
        [sys.executable, str(PROGRAM), *arguments],
        env=environment,
        capture_output=True,
        text=True,
        timeout=250,
        check=False,
    )
    assert run.returncode == 0, run.stderr[-3000:]
    return [json.loads(line) for line in run.stdout.splitlines()]


@pytest.mark.parametrize(
    ("architecture", "dtype", "group_size", "head_dim", "packed"),
    [
        (80, "float16", 4, 64, True),
        (90, "bfloat16", 16, 128, False),
        (90, "float16", 4, 64, True),
        (90, "bfloat16", 5, 128, False),
        (90, "bfloat16", 16, 192, False),
        (90, "bfloat16", 1, 192, False),
        (90, "bfloat16", 4, 96, False),
        (100, "bfloat16", 5, 64, True),
    ],
)
def test_all_kernels_compile_within_shared_memory(architecture, dtype, group_size, head_dim, packed, tmp_path):
    """Hopper has kernels of its own for heads of 64 and 128, and for keys of 192."""
    kernels = compiled(architecture, dtype, group_size, head_dim, packed, tmp_path)
    hopper = architecture == 90 and head_dim in (64, 128, 192)
    matrix = HOPPER_KERNELS if hopper else PLAIN_KERNELS
    if hopper and group_size == 1:  # nor has that for the scores for one wide head; unions take three heads or more
        matrix = matrix - {"scores_sm90_kernel"} - {name for name in matrix if "union" in name} | {"scores_kernel"}
        matrix |= {"union_forward_kernel", "union_dq_kernel"}
    others = ({"_pack_rows_kernel"} if hopper else set()) | (LAYOUT_KERNELS | DECODE_KERNELS if packed else set())
    assert {kernel["kernel"] for kernel in kernels} == KERNELS | matrix | others
    assert max(kernel["shared_bytes"] for kernel in kernels) <= LIMITS[architecture]
    if architecture == 90:
        assert {kernel["kernel"] for kernel in kernels if kernel["wgmma"]} == MATRIX_KERNELS | matrix
