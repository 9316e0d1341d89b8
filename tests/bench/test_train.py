"""The training benchmark measures what it says: whole steps of all models, from medians."""

from __future__ import annotations

import math
from pathlib import Path

import pytest
import torch

from nsa.bench.settings import TrainBench
from nsa.bench.train import bench_config, config_at, measure_train
from nsa.cli import EXIT_USAGE, main
from nsa.train.trainer import Trainer
from tiny_runs import write_corpus

SMALL = (
    "--model.hidden_size=32",
    "--model.num_attention_heads=4",
    "--train.batch_tokens=256",
    "--train.micro_batch_rows=2",
)


@pytest.fixture(scope="module")
def small(tmp_path_factory: pytest.TempPathFactory) -> tuple[str, ...]:
    """Overrides for a small model and a small text."""
    path = tmp_path_factory.mktemp("corpus") / "words.txt"
    write_corpus(path)
    return (*SMALL, "--data.source=text", f"--data.paths=[{path}]", "--data.text_split=paragraphs")


def test_all_models_are_measured_at_all_lengths_in_whole_steps(small: tuple[str, ...]) -> None:
    rows = measure_train(
        TrainBench(overrides=(*small, "--train.sequence_length=64"), lengths=(64, 32), warmup=1, steps=3)
    )
    kinds = [(row.attention, row.length, row.tokens) for row in rows]
    assert kinds == [(kind, length, 256) for length in (64, 32) for kind in ("nsa", "full_attention")]
    for nsa, dense in (rows[:2], rows[2:]):
        assert nsa.num_parameters > dense.num_parameters
        assert nsa.speedup == pytest.approx(nsa.tokens_per_s / dense.tokens_per_s)
        assert dense.speedup == 1
    for row in rows:
        assert row.tokens_per_s == pytest.approx(1000 * row.tokens / row.step_ms)
        assert math.isnan(row.mfu)  # a CPU's peak is not known


def test_the_default_is_the_one_layer_toy() -> None:
    config = bench_config(TrainBench())
    model, train = config.model, config.train
    sizes = (model.num_hidden_layers, model.hidden_size, model.num_attention_heads, model.num_key_value_heads)
    assert (*sizes, train.sequence_length, train.micro_batch_rows) == (1, 128, 8, 2, 128, 8)
    geometry = model.geometry
    assert (geometry.compress_block_size, geometry.compress_stride, geometry.select_block_size) == (16, 8, 32)
    assert (geometry.num_selected_blocks, geometry.window_size) == (8, 64)


def test_a_config_is_changed_by_overrides(tmp_path: Path) -> None:
    path = tmp_path / "small.yaml"
    path.write_text("train: {precision: bf16}\n")
    config = bench_config(TrainBench(config=str(path), overrides=("--train.compile=true", "--data.heldout=0.2")))
    assert (config.train.precision, config.train.compile, config.data.heldout) == ("bf16", True, 0.2)
    assert config.run.device == "auto"
    with pytest.raises(ValueError, match=r"--train\.compyle is unknown; did you mean --train\.compile"):
        bench_config(TrainBench(overrides=("--train.compyle=true",)))
    with pytest.raises(ValueError, match=r"'compile' is one word too many"):
        bench_config(TrainBench(overrides=("compile",)))


@pytest.mark.parametrize(
    ("length", "world_size", "rows", "tokens"),
    [(128, 1, 8, 8192), (512, 1, 2, 8192), (2048, 1, 1, 8192), (2048, 2, 1, 8192), (16384, 1, 1, 16384)],
)
def test_other_lengths_keep_the_tokens_of_a_step(length: int, world_size: int, rows: int, tokens: int) -> None:
    config = bench_config(TrainBench(overrides=("--train.batch_tokens=8192",)))
    train = config_at(config, length, world_size).train
    assert (train.sequence_length, train.micro_batch_rows, train.batch_tokens) == (length, rows, tokens)


@pytest.mark.parametrize("documents", ["rows", "packed"])
def test_a_row_is_one_document_unless_documents_are_kept_apart(
    documents: str, small: tuple[str, ...], monkeypatch: pytest.MonkeyPatch
) -> None:
    bounds = []
    monkeypatch.setattr(Trainer, "_count", lambda self, batches: bounds.extend(b.cu_seqlens for b in batches) or (1, 1))
    settings = {"overrides": small, "layer_types": ("nsa",), "warmup": 0, "steps": 2}
    measure_train(TrainBench(**settings, documents=documents))
    assert len(bounds) == 2
    if documents == "rows":
        assert bounds == [None, None]
    else:
        assert all(x.dtype == torch.int32 and x.numel() >= 3 for x in bounds)


def test_nothing_to_count_is_refused(small: tuple[str, ...], capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(ValueError, match="steps must be at least 1"):
        measure_train(TrainBench(overrides=small, steps=0))
    assert main(["bench", "train", "absent.yaml"]) == EXIT_USAGE
    assert "no config file absent.yaml" in capsys.readouterr().err
