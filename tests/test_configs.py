"""Every shipped config loads, has the size that it says, and passes preflight for its machine."""

import re
from pathlib import Path

import pytest

from nsa.config.load import load_config
from nsa.machine import machine_named
from nsa.preflight.estimate import num_parameters
from nsa.preflight.examine import examine

CONFIGS = Path(__file__).parent.parent / "configs"
MAKEFILE = (CONFIGS.parent / "Makefile").read_text(encoding="utf-8")
# Name -> (machine, parameters in millions, rows of so many tokens, longest run in hours).
EXPECTED = {
    "train_showcase": (None, (0.5, 3), 1024, 1.0),
    "nsa_vs_dense": (None, (0.5, 3), 512, 1.0),
    "train_copy": (None, (0.05, 0.5), 136, 1.0),
    "track_a": ("h200", (5, 15), 1024, 1.0),
    "track_b": ("h200", (20, 40), 8192, 2.0),
    "nsa_125m": ("h200", (110, 130), 2048, 5.0),
    "train_50k": ("h200", (110, 130), 2048, 12.0),
}


def test_every_config_is_listed_here():
    assert {path.stem for path in CONFIGS.glob("*.yaml")} == set(EXPECTED)


@pytest.mark.parametrize("name", EXPECTED)
def test_a_config_has_its_size_and_passes_preflight(name, monkeypatch, tmp_path):
    gpu, (least, most), length, hours = EXPECTED[name]
    config = load_config(CONFIGS / f"{name}.yaml")
    assert config.run.name == {"train_showcase": "showcase"}.get(name, name)
    monkeypatch.chdir(tmp_path)
    report = examine(config, machine=gpu and machine_named(gpu))
    assert report.findings == (), report.text()
    assert least <= report.plan.num_parameters / 1e6 <= most
    assert config.train.sequence_length == length
    assert report.plan.run_s < hours * 3600
    assert report.seconds < 60


def test_the_125m_model_is_that_of_the_specification():
    for name in ("nsa_125m", "train_50k"):
        model = load_config(CONFIGS / f"{name}.yaml").model
        assert (model.hidden_size, model.num_hidden_layers) == (768, 12)
        assert (model.num_attention_heads, model.num_key_value_heads, model.head_dim) == (12, 2, 64)


def test_the_long_run_is_guarded():
    config = load_config(CONFIGS / "train_50k.yaml")
    assert config.train.steps == 50_000
    assert 0 < config.train.checkpoint_every_steps <= 1000
    assert config.guards.spike_factor
    assert config.guards.entropy_floor_nats
    assert config.train.early_stop_evals


@pytest.mark.parametrize("name", [name for name, (gpu, *_) in EXPECTED.items() if gpu])
def test_the_configs_for_gpus_can_be_shared_among_four(name):
    train = load_config(CONFIGS / f"{name}.yaml").train
    assert train.batch_tokens % (4 * train.micro_batch_rows * train.sequence_length) == 0


def test_the_dense_twin_of_the_showcase_has_as_many_parameters():
    (words,) = re.findall(r"--model\.layer_types full_attention \\\n\s+(--model\.\w+ \d+)", MAKEFILE)
    twin = load_config(CONFIGS / "train_showcase.yaml", ["--model.layer_types", "full_attention", *words.split()])
    sizes = [num_parameters(config, 1024)[0] for config in (load_config(CONFIGS / "train_showcase.yaml"), twin)]
    assert sizes[1] == pytest.approx(sizes[0], rel=1e-3)
