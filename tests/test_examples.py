"""The examples run as they stand, each in a process of its own."""

import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).parent.parent
EXAMPLES = sorted(path.name for path in (ROOT / "examples").glob("*.py"))


def test_there_are_examples():
    assert {"operator_alone.py", "plain_pytorch.py", "transformers_generate.py"} <= set(EXAMPLES)


@pytest.mark.parametrize("name", EXAMPLES)
def test_an_example_runs(name, tmp_path):
    code = (
        f"import runpy, sys; sys.path.insert(0, {str(ROOT / 'src')!r})\n"
        "import torch; torch.set_num_threads(1)\n"
        "runpy.run_path(sys.argv[1], run_name='__main__')"
    )
    done = subprocess.run(
        [sys.executable, "-c", code, ROOT / "examples" / name],
        capture_output=True,
        text=True,
        cwd=tmp_path,
        timeout=120,
        check=False,
    )
    assert done.returncode == 0, done.stderr
    assert done.stdout.strip()
    assert list(tmp_path.iterdir()) == []
    if name == "plain_pytorch.py":
        losses = [float(line.split()[-1]) for line in done.stdout.splitlines()]
        assert losses[-1] < 0.75 * losses[0]
