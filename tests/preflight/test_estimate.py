"""What a run is said to need is what it needs."""

from __future__ import annotations

import weakref
from typing import Any

import pytest
import torch
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

from nsa.config.run import RunConfig
from nsa.loss import NextTokenLoss
from nsa.preflight import estimate
from nsa.train.activation import checkpoint_activations
from nsa.train.model import build_model
from nsa.train.optim import build_optimizer

VOCAB_SIZE = 300
GIB = 2**30


def config(**sections: dict[str, Any]) -> RunConfig:
    model = {"hidden_size": 64, "intermediate_size": 96, "num_hidden_layers": 2, "window_size": 32}
    train = {"sequence_length": 128, "batch_tokens": 1024, "micro_batch_rows": 4}
    return RunConfig.model_validate(
        {"model": model | sections.get("model", {}), "train": train | sections.get("train", {})}
    )


class LiveTensors(TorchDispatchMode):
    """An independent count: after each operation, the bytes of all tensors that were ever made and still exist."""

    def __init__(self) -> None:
        super().__init__()
        self.storages: weakref.WeakSet[Any] = weakref.WeakSet()
        self.peak = 0

    def __torch_dispatch__(self, function: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        result = function(*args, **(kwargs or {}))
        for value in tree_leaves(result):
            if isinstance(value, Tensor):
                self.storages.add(value.untyped_storage())
        self.peak = max(self.peak, self.now)
        return result

    @property
    def now(self) -> int:
        return sum({storage._cdata: storage.nbytes() for storage in self.storages}.values())


def bytes_of_real_step(subject: RunConfig) -> int:
    """The peak of two real optimizer steps."""
    with LiveTensors() as live:
        model = build_model(subject, vocab_size=VOCAB_SIZE, eos_token_id=0).train()
        checkpoint_activations(model, subject.train.activation_checkpointing)
        optimizer = build_optimizer(model, subject.optim)
        loss, ids = NextTokenLoss(model), torch.randint(VOCAB_SIZE, (4, 128))
        bounds = torch.arange(5, dtype=torch.int32) * 128
        for step in range(2):
            for _ in range(subject.num_micro_batches):
                with torch.autocast("cpu", torch.bfloat16, enabled=subject.train.precision == "bf16"):
                    total = loss(ids, ids.roll(-1, 1), bounds)
                total.backward()
            if step == 0:
                optimizer.step()
                optimizer.zero_grad()
        return live.peak


@pytest.mark.parametrize(
    "train", [{}, {"precision": "bf16"}, {"activation_checkpointing": "selective"}, {"batch_tokens": 512}]
)
def test_the_traced_memory_is_that_of_a_real_step(train: dict[str, Any]) -> None:
    subject = config(train=train)
    memory = estimate.trace_memory(subject, vocab_size=VOCAB_SIZE)
    traced = memory.total_gib - memory.overhead_gib - memory.activations_gib * (1 - 1 / (1 + estimate.SLACK))
    assert traced * GIB == pytest.approx(bytes_of_real_step(subject), rel=0.02)


def test_the_parts_of_the_memory_are_those_of_the_parameters() -> None:
    subject = config()
    total, inner = estimate.num_parameters(subject, VOCAB_SIZE)
    model = build_model(subject, vocab_size=VOCAB_SIZE, eos_token_id=0)
    assert total == sum(p.numel() for p in model.parameters())
    assert total - inner == 64 * VOCAB_SIZE
    untied = config(model={"tie_word_embeddings": False})
    assert estimate.num_parameters(untied, VOCAB_SIZE) == (total + 64 * VOCAB_SIZE, inner)
    memory = estimate.trace_memory(subject, vocab_size=VOCAB_SIZE)
    assert memory.weights_gib * GIB == pytest.approx(4 * total)
    assert memory.gradients_gib * GIB == pytest.approx(4 * total)
    assert memory.optimizer_gib * GIB == pytest.approx(8 * total, rel=1e-3)


@pytest.mark.parametrize(("precision", "share"), [("fp32", 1.0), ("bf16", 0.5)])
def test_fsdp2_shares_weights_and_optimizer_but_not_activations_or_gradients_of_earlier_passes(
    precision: str, share: float
) -> None:
    def memory(parallel: str, world_size: int) -> estimate.Memory:
        train = {"parallel": parallel, "batch_tokens": 2048, "precision": precision}  # four micro-batches
        subject = config(train=train)
        return estimate.trace_memory(subject, vocab_size=VOCAB_SIZE, world_size=world_size)

    one, two, four = memory("fsdp2", 1), memory("fsdp2", 2), memory("fsdp2", 4)
    assert memory("ddp", 2) == one
    assert two.optimizer_gib == one.optimizer_gib / 2
    assert one.weights_gib / 4 < four.weights_gib
    gathered = 64 * VOCAB_SIZE * 4 + share * 2 * (one.weights_gib * GIB - 64 * VOCAB_SIZE * 4) / 2
    assert four.weights_gib * GIB == pytest.approx(one.weights_gib * GIB / 4 + gathered)
    assert two.gradients_gib == one.gradients_gib
    assert four.gradients_gib == one.gradients_gib / 4
    assert two.activations_gib == one.activations_gib


def test_more_rows_longer_rows_and_a_larger_vocabulary_take_more() -> None:
    def activations(vocab_size: int = VOCAB_SIZE, **train: int) -> float:
        return estimate.trace_memory(config(train=train), vocab_size=vocab_size).activations_gib

    assert activations(micro_batch_rows=8) == pytest.approx(2 * activations(), rel=0.05)
    assert activations(sequence_length=256) == pytest.approx(2 * activations(), rel=0.05)
    assert activations(vocab_size=3000) > 2 * activations()


def test_disk_is_for_the_kept_checkpoints_and_the_one_being_written() -> None:
    size_gib = estimate.checkpoint_gib(GIB // 16)
    assert size_gib == 1.0
    for train, num_checkpoints in [
        ({"steps": 10_000, "checkpoint_every_steps": 500, "keep_checkpoints": 2}, 3),
        ({"steps": 600, "checkpoint_every_steps": 500, "keep_checkpoints": 5}, 2),
        ({"steps": 10_000, "checkpoint_every_steps": 0}, 1),
        ({"steps": 10_000, "checkpoint_every_steps": 500, "keep_checkpoints": 2, "keep_every_steps": 2000}, 8),
    ]:
        assert estimate.disk_needed_gib(config(train=train), GIB // 16) == num_checkpoints


def test_flops_grow_with_the_tokens_of_a_step_and_are_those_of_the_parameters_at_least() -> None:
    _, inner = estimate.num_parameters(config(), VOCAB_SIZE)
    flops = estimate.step_flops(config(), VOCAB_SIZE)
    weights = inner + 64 * VOCAB_SIZE
    assert 6 * weights * 1024 < flops < 12 * weights * 1024
    assert estimate.step_flops(config(train={"batch_tokens": 2048}), VOCAB_SIZE) == 2 * flops


def test_a_timed_step_counts_the_passes_of_this_process(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(estimate, "_time_steps", lambda *_: (2.0, 0.5, 3))
    cpu = torch.device("cpu")

    def step_s(batch_tokens: int, world_size: int = 1) -> float:
        subject = config(train={"batch_tokens": batch_tokens})
        return estimate.measure_speed(subject, cpu, vocab_size=VOCAB_SIZE, limit_s=0, world_size=world_size).step_s

    assert step_s(512) == 2.5
    assert step_s(2048) == 8.5
    assert step_s(2048, world_size=2) == 4.5


def test_timing_leaves_threads_and_random_numbers_as_they_were() -> None:
    subject = config()
    threads = subject.model_copy(update={"run": subject.run.model_copy(update={"num_threads": 1})})
    before = torch.get_rng_state()
    torch.set_num_threads(2)
    speed = estimate.measure_speed(threads, torch.device("cpu"), vocab_size=VOCAB_SIZE, limit_s=0)
    assert 0 < speed.step_s < 60
    assert speed.how == "1 micro-batches timed on cpu"
    after = torch.get_num_threads()
    torch.set_num_threads(1)  # the suite's
    assert after == 2
    assert torch.equal(torch.get_rng_state(), before)
