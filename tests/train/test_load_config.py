"""A run's config: what a file or an override may say, and how a mistake is explained."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import yaml
from pydantic import ValidationError

from nsa.train.config import RunConfig
from nsa.train.load_config import ConfigError, dump_config, load_config

CONFIGS = sorted((Path(__file__).parents[2] / "configs").glob("*.yaml"))


def write(folder: Path, values: Any) -> Path:
    path = folder / "config.yaml"
    path.write_text(values if isinstance(values, str) else yaml.safe_dump(values), encoding="utf-8")
    return path


@pytest.mark.parametrize("path", CONFIGS, ids=lambda path: path.stem)
def test_every_config_in_the_repository_loads(path: Path) -> None:
    assert load_config(path).run.name


def test_overrides_lie_on_top_of_the_file(tmp_path: Path, tiny_values: dict[str, Any]) -> None:
    path = write(tmp_path, tiny_values)
    overrides = ["--optim.lr", "3e-4", "--model.layer_types", "full_attention", "--run.deterministic", "False"]
    config = load_config(path, overrides)
    assert config.optim.lr == 3e-4
    assert config.model.layer_types == ("full_attention",)
    assert not config.run.deterministic
    assert config.train.steps == tiny_values["train"]["steps"]
    assert config.data.paths == tuple(tiny_values["data"]["paths"])


def test_an_exponent_without_a_point_is_a_number(tmp_path: Path) -> None:
    assert load_config(write(tmp_path, "optim: {lr: 3e-4}")).optim.lr == 3e-4


def test_the_dumped_config_reads_back_equal(tmp_path: Path, tiny_values: dict[str, Any]) -> None:
    config = load_config(write(tmp_path, tiny_values), ["--guards.spike_factor", "3"])
    assert load_config(write(tmp_path, dump_config(config))) == config


@pytest.mark.parametrize(
    ("values", "words"),
    [
        ({"optim": {"lrr": 1e-3}}, ["optim.lrr is unknown", "did you mean optim.lr?"]),
        ({"optimm": {}}, ["optimm is unknown", "did you mean optim?"]),
        ({"train": {"warmup_stepz": 3}}, ["train.warmup_stepz is unknown", "did you mean optim.warmup_steps?"]),
        ({"data": {"tokeniser": "byte"}}, ["data.tokeniser is unknown", "did you mean data.tokenizer?"]),
        ({"run": {"zzzzzz": 1}}, ["run.zzzzzz is unknown", "run.name"]),
    ],
)
def test_an_unknown_key_of_a_file_names_the_nearest_one(tmp_path: Path, values: Any, words: list[str]) -> None:
    path = write(tmp_path, values)
    with pytest.raises(ConfigError) as caught:
        load_config(path)
    assert all(word in str(caught.value) for word in [str(path), *words]), caught.value


def test_an_unknown_option_names_the_nearest_one(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit) as caught:
        load_config(write(tmp_path, {}), ["--optim.lrr", "1"])
    assert caught.value.code == 2
    message = capsys.readouterr().err
    assert "--optim.lrr" in message
    assert "--optim.lr FLOAT" in message


@pytest.mark.parametrize(
    ("values", "words"),
    [
        ({"train": {"steps": "many"}}, ["train.steps", "integer", "'many'"]),
        ({"train": {"steps": 2.5}}, ["train.steps", "integer", "2.5"]),
        ({"optim": {"lr": -1.0}}, ["optim.lr", "greater than 0", "-1.0"]),
        ({"model": {"layer_types": ["nsa", "linear"]}}, ["model.layer_types.1", "full_attention", "'linear'"]),
        ({"run": {"name": "../up"}}, ["run.name", "'../up'"]),
        ({"model": {"compress_stride": 5}}, ["model", "compress_stride 5 must divide"]),
        ({"model": {"num_key_value_heads": 3}}, ["num_key_value_heads 3 must divide num_attention_heads 4"]),
        ({"model": {"layer_types": ["nsa", "nsa"]}}, ["layer_types needs 1 entry or one for each of the 4 layers"]),
        ({"train": {"batch_tokens": 8000}}, ["train.batch_tokens 8000 must be a multiple", "8192"]),
        ({"train": 3}, ["train", "3"]),
    ],
)
def test_a_wrong_value_of_a_file_names_its_key_and_itself(tmp_path: Path, values: Any, words: list[str]) -> None:
    with pytest.raises(ConfigError) as caught:
        load_config(write(tmp_path, values))
    assert all(word in str(caught.value) for word in words), caught.value


@pytest.mark.parametrize(
    ("overrides", "words"),
    [
        (["--train.steps", "many"], ["--train.steps", "many"]),
        (["--optim.lr", "-1"], ["lr", "greater than 0"]),
        (["--model.layer_types", "linear"], ["--model.layer_types", "full_attention"]),
        (["--train.batch_tokens", "8000"], ["train.batch_tokens 8000", "8192"]),
    ],
)
def test_a_wrong_value_of_an_option_names_its_key(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], overrides: list[str], words: list[str]
) -> None:
    with pytest.raises(SystemExit) as caught:
        load_config(write(tmp_path, {}), overrides)
    assert caught.value.code == 2
    message = " ".join(capsys.readouterr().err.split())
    assert all(word in message for word in words), message


def test_a_file_that_is_missing_or_no_config_is_explained(tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match=r"there is no config file .*absent\.yaml"):
        load_config(tmp_path / "absent.yaml")
    with pytest.raises(ConfigError, match="not valid YAML"):
        load_config(write(tmp_path, "train: [1"))
    with pytest.raises(ConfigError, match="must hold sections"):
        load_config(write(tmp_path, "- train"))
    (tmp_path / "latin.yaml").write_bytes(b"run: {name: caf\xe9}")
    with pytest.raises(ConfigError, match="not UTF-8"):
        load_config(tmp_path / "latin.yaml")


def test_a_config_cannot_be_changed_after_it_was_checked() -> None:
    with pytest.raises(ValidationError, match="frozen"):
        RunConfig().train.steps = 3  # pyright: ignore[reportAttributeAccessIssue]


def test_every_key_is_documented() -> None:
    for name, section in RunConfig.model_fields.items():
        if name != "data":
            fields = section.annotation.model_fields
            assert [key for key, field in fields.items() if not field.description] == [], name
