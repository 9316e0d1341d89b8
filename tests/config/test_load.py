"""A run's config: what a file or an override may say, and how a mistake is explained."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import yaml
from pydantic import ValidationError

from nsa.config.load import ConfigError, dump_config, load_config
from nsa.config.run import RunConfig

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


def test_an_unknown_option_names_the_nearest_one(tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match=r"--optim.lrr is unknown; did you mean --optim.lr\?"):
        load_config(write(tmp_path, {}), ["--optim.lrr", "1"])
    with pytest.raises(ConfigError, match=r"--steps is unknown; did you mean --train.steps\?"):
        load_config(write(tmp_path, {}), ["--steps", "1"])


@pytest.mark.parametrize(
    ("values", "words"),
    [
        ({"train": {"steps": "many"}}, ["train.steps", "integer", "'many'"]),
        ({"train": {"steps": 2.5}}, ["train.steps", "integer", "2.5"]),
        ({"optim": {"lr": -1.0}}, ["optim.lr", "greater than 0", "-1.0"]),
        ({"model": {"layer_types": ["nsa", "linear"]}}, ["model.layer_types.1", "full_attention", "'linear'"]),
        ({"run": {"name": "../up"}}, ["run.name", "'../up'"]),
        ({"model": {"compress_stride": 5}}, ["model", "compress_stride 5 must divide"]),
        (
            {"model": {"num_key_value_heads": 3}},
            ["num_attention_heads 4", "multiple of num_key_value_heads 3"],
        ),
        ({"model": {"hidden_size": 129}}, ["hidden_size 129 is no multiple of num_attention_heads 4; give head_dim"]),
        ({"model": {"head_dim": 7}}, ["model", "head_dim must be positive and even"]),
        ({"model": {"rope_parameters": 4}}, ["model.rope_parameters", "key: value"]),
        ({"model": {"rope_parameters": {"rope_type": "dynamic"}}}, ["model.rope_parameters", "yarn", "'dynamic'"]),
        (
            {"model": {"rope_parameters": {"rope_type": "yarn"}}},
            ["model.rope_parameters", "a factor of at least 1"],
        ),
        ({"model": {"rope_parameters": {"rope_type": "ntk", "factr": 2, "factor": 2}}}, ["factor, not 'factr'"]),
        ({"model": {"rope_parameters": {"rope_theta": 1e6}}}, ["no more keys", "the base is model.rope_theta"]),
        ({"model": {"rope_parameters": {"rope_type": "yarn", "factor": 2, "beta_slow": True}}}, ["beta_slow", "True"]),
        ({"model": {"rope_parameters": {"rope_type": "llama3", "factor": 2}}}, ["low_freq_factor, high_freq_factor"]),
        ({"model": {"attention_bias": 1}}, ["model.attention_bias", "boolean", "1"]),
        ({"model": {"layer_types": ["nsa", "nsa"]}}, ["layer_types needs 1 entry or one for each of the 4 layers"]),
        ({"train": {"batch_tokens": 8000}}, ["train.batch_tokens 8000 must be a multiple", "8192"]),
        ({"train": 3}, ["train", "3"]),
        ({"train": {"steps": True}}, ["train.steps", "integer", "True"]),
        ({"train": {"compile": 1}}, ["train.compile", "boolean", "1"]),
        ({"optim": {"lr": "0.1"}}, ["optim.lr", "number", "'0.1'"]),
        ({"optim": {"lr": float("nan")}}, ["optim.lr", "finite", "nan"]),
        ({"observe": {"heartbeat_s": float("inf")}}, ["observe.heartbeat_s", "finite", "inf"]),
        ({"run": {"seed": 2**64}}, ["run.seed", "less than", str(2**64)]),
        ({"run": {"device": "mps"}}, ["run.device", "'mps'", "cuda:N"]),
        ({"run": {"folder": "a\0b"}}, ["run.folder", "NUL"]),
        ({"model": {"num_hidden_layers": 10**7}}, ["model.num_hidden_layers", "1000", str(10**7)]),
        ({"model": {"num_hidden_layers": 900, "hidden_size": 65536}}, ["model", "parameters", "hidden_size"]),
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
        (["--train.steps"], ["--train.steps needs a value"]),
        (["--train.steps", "1", "2"], ["'2' is one word too many"]),
        (["--train.steps", "true"], ["--train.steps", "whole number", "'true'"]),
        (["--train.compile", "maybe"], ["--train.compile must be true or false", "'maybe'"]),
        (["--optim.lr", "nan"], ["--optim.lr must be a finite number", "'nan'"]),
        (["--observe.profile_steps", "1"], ["--observe.profile_steps takes 2 values, not 1"]),
    ],
)
def test_a_wrong_value_of_an_option_names_its_key(tmp_path: Path, overrides: list[str], words: list[str]) -> None:
    with pytest.raises(ConfigError) as caught:
        load_config(write(tmp_path, {}), overrides)
    assert all(word in str(caught.value) for word in words), caught.value
    assert "pydantic" not in str(caught.value)


@pytest.mark.parametrize(
    ("overrides", "key", "value"),
    [
        (["--train.compile", "true"], "train.compile", True),
        (["--train.compile", "True"], "train.compile", True),
        (["--run.deterministic=false"], "run.deterministic", False),
        (["--run.num_threads", "null"], "run.num_threads", None),
        (["--run.num_threads", "None"], "run.num_threads", None),
        (["--train.batch-tokens", "16384"], "train.batch_tokens", 16384),
        (
            ["--model.layer_types", "[nsa, nsa, full_attention, nsa]"],
            "model.layer_types",
            ("nsa", "nsa", "full_attention", "nsa"),
        ),
        (["--observe.profile_steps", "[3, 5]"], "observe.profile_steps", (3, 5)),
        (["--observe.profile_steps", "3", "5"], "observe.profile_steps", (3, 5)),
        (["--preflight.allow", "[]"], "preflight.allow", ()),
        (["--sample.prompts", "[ab]*[cd]", "1e3"], "sample.prompts", ("[ab]*[cd]", "1e3")),
        (["--run.name", "2026"], "run.name", "2026"),
        (["--data.heldout", "1e-2"], "data.heldout", 0.01),
        (["--data.heldout", "1790 *", "b"], "data.heldout", ("1790 *", "b")),
        (["--optim.lr", "1e-3", "--optim.lr", "2e-3"], "optim.lr", 2e-3),
    ],
)
def test_options_are_written_as_in_yaml(tmp_path: Path, overrides: list[str], key: str, value: Any) -> None:
    section, _, name = key.partition(".")
    assert getattr(getattr(load_config(write(tmp_path, {}), overrides), section), name) == value


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


@pytest.mark.parametrize(
    ("text", "words"),
    [
        ("train:\n  steps: 3\noptim: {}\ntrain:\n  steps: 4\n", ["train twice", "line 1", "line 4"]),
        ("train:\n  steps: 3\n  steps: 4\n", ["train.steps twice", "line 2", "line 3"]),
        ("train: {steps: 3, steps: 4}", ["train.steps twice", "line 1"]),
        ("{a: " * 20_000, ["nested too deep"]),
        ("a: &a [*a]", ["line 1", "alias"]),
        ("run: {name: a\0b}", ["line 1", "0x0"]),
        ("train: {steps: 3", ["line 1", "not valid YAML"]),
        ("? [a, b]\n: 3", ["line 1", "plain name"]),
        ("run: {name: !!python/object:os.system x}", ["line 1", "not valid YAML"]),
        ("#" * 2**19, ["bytes"]),
        ("run: {seed: " + "9" * 5000 + "}", ["not valid YAML"]),
    ],
)
def test_damaged_yaml_names_its_line(tmp_path: Path, text: str, words: list[str]) -> None:
    with pytest.raises(ConfigError) as caught:
        load_config(write(tmp_path, text))
    assert all(word in str(caught.value) for word in [str(tmp_path), *words]), caught.value
    assert len(str(caught.value)) < 500


def test_aliases_that_unfold_without_bounds_are_refused_at_once(tmp_path: Path) -> None:
    rows = [f"k{i}: &k{i} [{', '.join([f'*k{i - 1}'] * 9)}]" for i in range(1, 9)]
    with pytest.raises(ConfigError, match="unfolds to more than"):
        load_config(write(tmp_path, "\n".join(["k0: &k0 [x, x, x]", *rows])))


def test_anchors_and_merges_stay_allowed(tmp_path: Path) -> None:
    config = load_config(
        write(tmp_path, "eval: &rows {rows: 8}\ntrain: {steps: 20}\nguards:\nsample:\n  <<: {top_k: 3}\n")
    )
    assert (config.eval.rows, config.sample.top_k, config.guards.on_nonfinite) == (8, 3, "stop")


def test_numbers_are_those_of_yaml_1_2(tmp_path: Path) -> None:
    config = load_config(
        write(tmp_path, "optim: {lr: 1e-3, eps: 1.5e-8}\nrun: {name: 2026-01-02}\ntrain: {steps: 1_000}")
    )
    assert (config.optim.lr, config.optim.eps, config.run.name, config.train.steps) == (
        1e-3,
        1.5e-8,
        "2026-01-02",
        1000,
    )
    with pytest.raises(ConfigError, match=r"train.steps: must be a valid integer, not '010'"):
        load_config(write(tmp_path, "train: {steps: 010}"))


def test_texts_that_look_like_numbers_survive_a_dump(tmp_path: Path) -> None:
    texts = ("1e3", "010", "2026-01-02", "true", "null", "0x1f", "12:30", "~", "a: b", "é")
    config = RunConfig.model_validate({"sample": {"prompts": texts}})
    assert load_config(write(tmp_path, dump_config(config))) == config


def test_configs_of_the_package_go_by_name_from_anywhere(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    assert load_config("train_copy") == load_config(CONFIGS[0].with_name("train_copy.yaml"))
    with pytest.raises(ConfigError, match="did you mean train_copy"):
        load_config("configs/train_cpy.yaml")
    with pytest.raises(ConfigError, match="is a folder"):
        load_config(tmp_path)


def test_a_config_cannot_be_changed_after_it_was_checked() -> None:
    with pytest.raises(ValidationError, match="frozen"):
        RunConfig().train.steps = 3  # pyright: ignore[reportAttributeAccessIssue]


def test_every_key_is_documented() -> None:
    for name, section in RunConfig.model_fields.items():
        fields = section.annotation.model_fields
        assert [key for key, field in fields.items() if not field.description] == [], name
