"""The FLOP count against counts by hand and against the matrix products of a model."""

from __future__ import annotations

import pytest
import torch
from torch.utils.flop_counter import FlopCounterMode

from nsa.flops import FlopCount, compression_flops, keys_seen, linear_flops, new_compressed
from nsa.geometry import BlockGeometry
from nsa.machine import peak_flops
from nsa.train.trainer import Trainer
from tiny_models import tiny_config, tiny_model

GEOMETRY = BlockGeometry(8, 4, 16, 3, window_size=5)


def test_keys_of_one_query_by_hand() -> None:
    """Blocks of 8 every 4 tokens, selection blocks of 16 of which 3 are chosen, a window of 5."""
    position = torch.tensor([0, 7, 15, 16, 40, 70])
    compressed = [0, 1, 3, 3, 9, 16]  # blocks [0,8) [4,12) ... that have ended: 70 -> (71 - 8) // 4 + 1 = 16
    selected = [1, 8, 16, 17, 41, 32 + 7]  # 70 is the 7th token of block 4; two whole blocks beside it
    window = [1, 5, 5, 5, 5, 5]
    by_hand = [sum(parts) for parts in zip(compressed, selected, window, strict=True)]
    assert keys_seen("nsa", position, GEOMETRY).tolist() == by_hand
    assert keys_seen("full_attention", position, GEOMETRY).tolist() == [1, 8, 16, 17, 41, 71]
    assert keys_seen("sliding_attention", position, GEOMETRY).tolist() == window
    assert sum(new_compressed(torch.arange(71), GEOMETRY).tolist()) == 16


@pytest.mark.parametrize("layers", [("nsa", "nsa"), ("full_attention", "sliding_attention"), ("nsa", "full_attention")])
@pytest.mark.parametrize("changes", [{}, {"shared_kv": True}, {"head_dim": 16, "value_head_dim": 4}])
def test_the_linear_layers_are_those_of_the_model(layers: tuple[str, ...], changes: dict) -> None:
    model = tiny_model(*layers, tie_word_embeddings=False, **changes)
    linears = [m for m in model.modules() if isinstance(m, torch.nn.Linear)]
    assert linear_flops(model.config) == 2 * sum(m.weight.numel() for m in linears)


@pytest.mark.parametrize("compression", ["conv", "mlp"])
def test_learned_compression_is_counted_for_each_block(compression: str) -> None:
    config = tiny_config(compression=compression, num_key_value_heads=2)
    operator = tiny_model(compression=compression).model.layers[0].self_attn.compress_k
    with FlopCounterMode(display=False) as counter:
        operator(torch.randn(1, 8, 2, 8, dtype=torch.float64))
    assert compression_flops(config) == 2 * counter.get_total_flops()  # one for keys, one for values


def test_documents_are_counted_by_their_own_lengths() -> None:
    config = tiny_config("nsa", "full_attention")
    count = FlopCount(config, max_length=64)
    lengths = torch.tensor([64, 10, 0, 1])
    per_key = 2 * 4 * (8 + 8)
    keys = sum(
        int(keys_seen(kind, torch.tensor([t]), config.geometry))
        for kind in ("nsa", "full_attention")
        for length in lengths.tolist()
        for t in range(length)
    )
    assert count.forward(lengths) == linear_flops(config) * 75 + per_key * keys
    assert count.training(lengths) == 3 * count.forward(lengths)
    assert count.forward(torch.tensor([64])) > 2 * count.forward(torch.tensor([32]))


def test_a_dense_layer_counts_half_of_what_a_full_matrix_would() -> None:
    """PyTorch's counter has the whole T x T; the causal half of it, with the diagonal, is T (T + 1) / 2."""
    config = tiny_config("full_attention")
    length = 32
    attention = FlopCount(config, length).forward(torch.tensor([length])) - length * linear_flops(config)
    assert attention == 2 * 4 * 16 * length * (length + 1) // 2


def test_peaks_are_by_name_and_precision() -> None:
    assert peak_flops("NVIDIA H200", "bf16") == 989e12
    assert peak_flops("NVIDIA A100-SXM4-80GB", "bf16") == 312e12
    assert peak_flops("NVIDIA H100 PCIe", "bf16") < peak_flops("NVIDIA H100 80GB HBM3", "bf16")
    assert peak_flops("NVIDIA H200", "fp32") == 67e12
    assert peak_flops("AMD EPYC", "bf16") is None


def test_mfu_is_the_work_of_the_steps_own_documents_over_the_peak(tiny) -> None:
    trainer, fetched = Trainer(tiny(train={"steps": 1})), []
    trainer.peak_flops = 1e9
    fetch = trainer._fetch

    def remembered(count: int):
        batches, waits_s = fetch(count)
        fetched.extend(batches)
        return batches, waits_s

    trainer._fetch = remembered
    record = trainer.train_step()
    work = sum(trainer.flops.training(batch.cu_seqlens.diff()) for batch in fetched)
    assert len(fetched) == 2
    assert record.mfu == pytest.approx(work / record.step_s / 1e9)
