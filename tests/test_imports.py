"""What importing the package needs, each in a process of its own."""

import subprocess
import sys
from pathlib import Path

import pytest

SOURCE = str(Path(__file__).parent.parent / "src")


def run(code: str) -> None:
    path = f"import sys; sys.path.insert(0, {SOURCE!r})\n"
    done = subprocess.run([sys.executable, "-c", path + code], capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr


# None in sys.modules makes a package look as if it were not installed.
BLOCK = "for name in {blocked!r}: sys.modules[name] = None\n"


def test_the_operator_runs_without_triton():
    run(
        BLOCK.format(blocked=("triton",))
        + """
import torch, nsa
geometry = nsa.BlockGeometry(8, 4, 16, 4, window_size=16)
layer = nsa.NSAAttention(32, num_heads=4, num_kv_heads=2, geometry=geometry)
layer(torch.randn(1, 50, 32)).sum().backward()
"""
    )


def test_the_bare_package_needs_torch_only():
    extras = ("transformers", "pydantic", "tyro", "yaml", "rich", "matplotlib", "tensorboard", "grain", "tokenizers")
    run(BLOCK.format(blocked=extras) + "import nsa\nfor name in nsa.__all__: getattr(nsa, name)")


@pytest.mark.parametrize("module", ["nsa", "nsa.geometry"])
def test_the_geometry_needs_no_torch(module):
    run(BLOCK.format(blocked=("torch",)) + f"import {module}\nfrom nsa import BlockGeometry\nBlockGeometry()")


def test_unknown_names_are_attribute_errors():
    run("import nsa; assert 'NSAAttention' in dir(nsa); assert not hasattr(nsa, 'Nothing')")


@pytest.mark.parametrize("package", ["nsa.config", "nsa.runs"])
def test_a_run_s_files_and_its_config_need_no_torch(package):
    """So that any machine can check a config, and watch, halt or compare runs."""
    run(
        BLOCK.format(blocked=("torch", "transformers"))
        + f"""
import importlib, pkgutil
package = importlib.import_module({package!r})
names = [module.name for module in pkgutil.walk_packages(package.__path__, {package!r} + ".")]
assert len(names) > 5
for name in names:
    importlib.import_module(name)
"""
    )
