"""The README's commands and code blocks run as they are written."""

import re
import shlex
from pathlib import Path

import pytest

from nsa.cli import main

ROOT = Path(__file__).parent.parent
README = (ROOT / "README.md").read_text(encoding="utf-8")
BLOCKS = re.findall(r"^```(\w*)\n(.*?)^```", README, flags=re.MULTILINE | re.DOTALL)
DOCUMENTS = ["README.md", "CONTRIBUTING.md", *sorted(str(p) for p in (ROOT / "docs").glob("*.md"))]
CONFIGS = [text for language, text in BLOCKS if language == "yaml"]
PYTHON = [text for language, text in BLOCKS if language == "python"]
COMMANDS = [line[2:] for language, text in BLOCKS if language == "console" for line in text.splitlines()]

# The showcase takes minutes, and times itself first: the commands that use it get a run folder of the same name, made
# in seconds.
TINY = {
    "model.hidden_size": 32,
    "model.intermediate_size": 64,
    "model.num_hidden_layers": 1,
    "train.steps": 2,
    "train.max_minutes": None,
    "train.sequence_length": 64,
    "train.batch_tokens": 128,
    "train.micro_batch_rows": 2,
    "optim.warmup_steps": 1,
    "data.max_eval_tokens": 256,
    "eval.rows": 2,
    "sample.max_new_tokens": 4,
}
TINY_ARGUMENTS = [word for key, value in TINY.items() for word in (f"--{key}", str(value))]


@pytest.fixture(scope="module")
def workplace(tmp_path_factory):
    """A folder with the configs and a tiny `runs/showcase`, the working directory of the module's tests."""
    folder = tmp_path_factory.mktemp("readme")
    for name in ("configs", "LICENSE"):
        (folder / name).symlink_to(ROOT / name)
    with pytest.MonkeyPatch.context() as patch:
        patch.chdir(folder)
        assert main(["train", "configs/train_showcase.yaml", *TINY_ARGUMENTS]) == 0
        yield folder


@pytest.mark.parametrize("code", PYTHON, ids=lambda code: code.splitlines()[-1][:40])
def test_python_block_runs(code, workplace):
    exec(compile(code, "README.md", "exec"), {})


@pytest.mark.parametrize("text", CONFIGS)
def test_a_config_trains(text, workplace, capsys):
    (workplace / "my_texts").mkdir(exist_ok=True)
    for index in range(20):
        (workplace / "my_texts" / f"{index}.md").write_text(f"Text {index}. " * 200)
    (workplace / "mine.yaml").write_text(text)
    small = {"train.steps": 2, "train.max_minutes": None, "train.sequence_length": 64, "train.batch_tokens": 1024}
    words = [word for key, value in small.items() for word in (f"--{key}", str(value))]
    assert main(["train", "mine.yaml", *words, "--optim.warmup_steps", "1", "--sample.max_new_tokens", "0"]) == 0
    assert "held-out documents after step 2" in capsys.readouterr().out


@pytest.mark.parametrize("command", COMMANDS)
def test_command_runs(command, workplace, capsys):
    words = shlex.split(command)
    assert words[0] == "nsa"
    small = TINY_ARGUMENTS if words[1] == "train" else []
    assert main([*words[1:], *small]) == 0
    assert capsys.readouterr().out


def test_the_readme_has_blocks_to_run():
    assert len(PYTHON) >= 3
    assert len(CONFIGS) == 1
    assert len(COMMANDS) >= 3


@pytest.mark.parametrize("document", DOCUMENTS)
def test_links_lead_somewhere(document):
    path = ROOT / document
    for target in re.findall(r"\]\(([^)#]+)\)", path.read_text(encoding="utf-8")):
        assert target.startswith("https://") or (path.parent / target).exists(), target


@pytest.mark.parametrize("document", DOCUMENTS)
def test_tables_are_whole(document):
    tables = re.findall(r"(?:^\|.*\n)+", (ROOT / document).read_text(encoding="utf-8"), flags=re.MULTILINE)
    for _, rule, *rows in (table.splitlines() for table in tables):
        assert re.fullmatch(r"[-| ]+", rule), rule
        assert {row.replace("\\|", "").count("|") for row in rows} <= {rule.count("|")}, rule


def test_every_file_is_in_the_reading_order_of_its_folder():
    orders = [p for p in (ROOT / "src").rglob("__init__.py") if "Reading order:" in p.read_text(encoding="utf-8")]
    assert len(orders) >= 7
    for order in orders:
        docstring = order.read_text(encoding="utf-8").split('"""')[1]
        files = {path.stem for path in order.parent.glob("*.py")} - {"__init__"}
        assert files <= set(re.findall(r"\w+", docstring)), order


def test_paths_named_in_backticks_exist():
    for document in ("README.md", "CONTRIBUTING.md"):
        for path in re.findall(r"`((?:src|tests|configs|docs|examples)/[\w./]+)`", (ROOT / document).read_text()):
            assert (ROOT / path).exists(), f"{document}: {path}"
