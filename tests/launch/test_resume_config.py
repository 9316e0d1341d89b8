"""The config that a run goes on with is that of its checkpoint; `config.yaml` changes what may be changed, by name."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import yaml

from nsa.config.load import dump_config
from nsa.config.run import RunConfig
from nsa.launch.resume_config import changed_keys, resumed_config, stored_config
from nsa.runs.folder import RunFolder
from saved_runs import write_files

CONFIG = RunConfig.model_validate({"run": {"name": "mine"}, "optim": {"lr": 0.01}, "train": {"steps": 8}})


@pytest.fixture
def run(tmp_path: Path) -> Path:
    """A run folder with a checkpoint of step 5 that holds its config, and a newer one that is not whole."""
    path = tmp_path / "run"
    env = {"config": CONFIG.model_dump(mode="json")}
    folder = RunFolder.create(path, config_yaml=dump_config(CONFIG), env=env, data_index={})
    folder.lock.close()
    write_files(folder.checkpoints, 5, more={"run_config.yaml": dump_config(CONFIG).encode()})
    (write_files(folder.checkpoints, 7, more={"run_config.yaml": b"run: {}"}) / "model.safetensors").unlink()
    return path


def edit(path: Path, /, **sections: dict[str, Any]) -> None:
    values = yaml.safe_load((path / "config.yaml").read_text())
    for section, keys in sections.items():
        values[section].update(keys)
    (path / "config.yaml").write_text(yaml.safe_dump(values))


def test_an_untouched_config_is_taken_as_it_is(run: Path) -> None:
    found = stored_config(run)
    assert (found.trained, found.wanted, found.note) == (CONFIG, CONFIG, None)


@pytest.mark.parametrize("contents", [None, b"", b" \n", b"\0" * 4096])
def test_a_lost_config_is_that_of_the_newest_whole_checkpoint(run: Path, contents: bytes | None) -> None:
    path = run / "config.yaml"
    path.unlink() if contents is None else path.write_bytes(contents)
    found = stored_config(run)
    assert found.wanted == CONFIG
    assert found.note == f"{path} is lost; the config is that of {run}/checkpoints/step_000005/run_config.yaml"


def test_what_config_yaml_lacks_is_taken_from_the_checkpoint_and_said(run: Path) -> None:
    text = (run / "config.yaml").read_text()
    (run / "config.yaml").write_text(text[: text.index("  warmup_steps")])
    found = stored_config(run)
    assert found.wanted == CONFIG
    assert "such as optim.warmup_steps; they are those of" in str(found.note)


def test_edited_keys_that_may_change_count_and_are_told_from_what_was_trained(run: Path) -> None:
    edit(run, train={"steps": 20}, run={"name": "renamed"})
    found = stored_config(run)
    assert changed_keys(found.trained, found.wanted) == {"run.name": ["mine", "renamed"], "train.steps": [8, 20]}


@pytest.mark.parametrize("checkpoints", [True, False])
def test_edited_keys_that_decide_a_step_are_refused_with_both_values(run: Path, checkpoints: bool) -> None:
    if not checkpoints:
        (run / "checkpoints").rename(run / "elsewhere")
    edit(run, optim={"lr": 0.5}, model={"window_size": 64})
    with pytest.raises(ValueError, match=r"config\.yaml is not what the run was trained with") as caught:
        stored_config(run)
    for part in ("  optim.lr: 0.01 -> 0.5", "  model.window_size: 512 -> 64", f"rm {run}/config.yaml", "nsa train"):
        assert part in str(caught.value)
    assert ("run_config.yaml" if checkpoints else "env.json") in str(caught.value)


def test_a_config_that_is_no_config_is_named_with_what_has_it(run: Path) -> None:
    (run / "config.yaml").write_text("train: {stepz: 3}")
    with pytest.raises(ValueError, match=r"train\.stepz is unknown(.|\n)*step_000005/run_config\.yaml has the config"):
        stored_config(run)


def test_without_a_checkpoint_and_env_json_the_file_must_be_whole(run: Path) -> None:
    (run / "checkpoints").rename(run / "elsewhere")
    (run / "env.json").write_text(json.dumps({}))
    assert stored_config(run).wanted == CONFIG
    text = (run / "config.yaml").read_text()
    (run / "config.yaml").write_text(text[: text.index("train:")])
    with pytest.raises(ValueError, match="has lost its sections eval, guards, observe, preflight, sample, train"):
        stored_config(run)
    (run / "config.yaml").write_text("")
    with pytest.raises(ValueError, match=r"holds no config\.yaml with contents"):
        stored_config(run)


def test_a_run_config_whose_checksum_is_wrong_is_not_trusted(run: Path) -> None:
    path = run / "checkpoints" / "step_000005" / "run_config.yaml"
    path.write_text(path.read_text().replace("lr: 0.01", "lr: 0.91"))
    (run / "config.yaml").write_text("")
    assert stored_config(run).wanted == CONFIG


def test_resume_records_what_was_edited(tiny: Callable[..., RunConfig], capsys: pytest.CaptureFixture[str]) -> None:
    from nsa.launch.resume import prepare_resume
    from nsa.launch.start import prepare

    _, folder = prepare(tiny(train={"steps": 2}))
    folder.lock.close()
    edit(folder.path, train={"steps": 3})
    _, folder = prepare_resume(resumed_config(folder.path))
    folder.lock.close()
    assert "train.steps: 2 -> 3" in capsys.readouterr().out
    assert folder.read_status()["resumed_from"]["changed"] == {"train.steps": [2, 3]}
