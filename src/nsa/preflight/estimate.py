"""What a run needs: parameters, memory, time and disk, before anything is computed.

Memory is found by running the training step with fake tensors, which have sizes and no contents: exact for weights,
gradients, optimizer, saved activations and the loss head, whatever the model's options. What an operator needs inside
itself is not seen; `OVERHEAD_GIB` and `SLACK` stand for that, for the device's libraries and for fragmentation.

    memory = trace_memory(config, vocab_size=50257)
    print(memory.total_gib, memory.activations_gib)
"""

from __future__ import annotations

import math
import time
import weakref
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

from nsa.config.run import RunConfig
from nsa.data.stream.packing import Batch
from nsa.flops import FlopCount
from nsa.hf import NSAForCausalLM
from nsa.loss import NextTokenLoss
from nsa.train.activation import checkpoint_activations
from nsa.train.model import build_model, compile_layers
from nsa.train.optim import build_optimizer
from nsa.units import GIB

OVERHEAD_GIB = {"cpu": 0.6, "cuda": 0.8}  # interpreter and libraries; CUDA context and kernels
SLACK = 0.1  # share of the activations for work space inside operators, and for fragmentation
BYTES_PER_PARAMETER = 4  # weights, gradients and both optimizer moments are fp32


@dataclass(frozen=True)
class Memory:
    """GiB on each device at the peak of a training step."""

    weights_gib: float
    gradients_gib: float
    optimizer_gib: float
    activations_gib: float
    overhead_gib: float

    @property
    def total_gib(self) -> float:
        return self.weights_gib + self.gradients_gib + self.optimizer_gib + self.activations_gib + self.overhead_gib


@dataclass(frozen=True)
class Speed:
    """Seconds of an optimizer step, and how they were found."""

    step_s: float
    how: str


def num_parameters(config: RunConfig, vocab_size: int) -> tuple[int, int]:
    """All parameters, and those without the embedding and an output layer of its own.

    Raises:
        ValueError: no model can be built from the config.
    """
    model = _model_without_weights(config, vocab_size)
    total = sum(parameter.numel() for parameter in model.parameters())
    embeddings = {id(layer.weight): layer.weight.numel() for layer in (model.model.embed_tokens, model.lm_head)}
    return total, total - sum(embeddings.values())


def step_flops(config: RunConfig, vocab_size: int) -> float:
    """Floating-point operations of an optimizer step whose rows are one document each, all processes together."""
    length = config.train.sequence_length
    count = FlopCount(_model_without_weights(config, vocab_size).config, max_length=length)
    return count.training(torch.tensor([length])) * config.train.batch_tokens / length


def trace_memory(config: RunConfig, *, vocab_size: int, world_size: int = 1, kind: str = "cuda") -> Memory:
    """Memory of each process at the peak of a step of `config`.

    Args:
        config: of the run.
        vocab_size: of its tokenizer.
        world_size: processes that share the batch and, with FSDP2, weights, gradients and optimizer state.
        kind: "cuda" or "cpu", for the overhead.

    Raises:
        ValueError: no model can be built from the config.
    """
    num_passes = math.ceil(config.num_micro_batches / world_size)
    bounds = row_bounds(config)  # real numbers: the checks of `cu_seqlens` read them
    with FakeTensorMode(allow_non_fake_inputs=True), _LiveBytes() as live:
        model = build_model(config_for_cpu(config), vocab_size=vocab_size, eos_token_id=0).train()
        checkpoint_activations(model, config.train.activation_checkpointing)
        weights = live.now
        optimizer = build_optimizer(model, config.optim)
        loss = NextTokenLoss(model)
        batch = random_rows(config, vocab_size, torch.device("cpu"), bounds)
        _forward_backward(loss, batch, config)
        gradients = sum(p.grad.untyped_storage().nbytes() for p in model.parameters() if p.grad is not None)
        before = live.now - gradients
        optimizer.step()
        state = live.now - before - gradients
        if num_passes == 1:  # else gradients are there already while the next are computed
            optimizer.zero_grad(set_to_none=True)
        live.peak = live.now
        _forward_backward(loss, batch, config)
        activations = live.peak - weights - gradients - state
    shards, gathered = 1, 0.0
    if config.train.parallel == "fsdp2" and world_size > 1:
        shards, gathered = world_size, _gathered_bytes(config, model, weights)
    return Memory(
        weights_gib=(weights / shards + gathered) / GIB,
        # FSDP2 shares gradients out with the last micro-batch of a step only.
        gradients_gib=gradients / (shards if num_passes == 1 else 1) / GIB,
        optimizer_gib=state / shards / GIB,
        activations_gib=activations * (1 + SLACK) / GIB,
        overhead_gib=OVERHEAD_GIB[kind],
    )


def measure_speed(
    config: RunConfig, device: torch.device, *, vocab_size: int, limit_s: float, world_size: int = 1
) -> Speed:
    """Time real steps of the configured model on random tokens, after one that does not count.

    Args:
        config: of the run.
        device: where to run; the step must fit there.
        vocab_size: of its tokenizer.
        limit_s: no further step begins after so many seconds.
        world_size: processes that share a step's micro-batches; what they say to one another is not counted.

    Raises:
        torch.OutOfMemoryError: the step does not fit.
    """
    with _threads_of(config), torch.random.fork_rng(devices=[]):
        torch.manual_seed(config.run.seed)
        pass_s, update_s, count = _time_steps(config, device, vocab_size, limit_s)
    num_passes = math.ceil(config.num_micro_batches / world_size)
    return Speed(num_passes * pass_s + update_s, f"{count} micro-batches timed on {device}")


def checkpoint_gib(num_parameters: int) -> float:
    """Size of one checkpoint: the weights for `from_pretrained`, and weights and both moments to resume from."""
    return 4 * BYTES_PER_PARAMETER * num_parameters / GIB


def disk_needed_gib(config: RunConfig, num_parameters: int) -> float:
    """Disk for all checkpoints that are kept, and the one being written beside them."""
    every = config.train.checkpoint_every_steps
    written = 1 + (config.train.steps // every if every else 0)
    forever = config.train.steps // config.train.keep_every_steps if config.train.keep_every_steps else 0
    return min(config.train.keep_checkpoints + 1 + forever, written) * checkpoint_gib(num_parameters)


def cpu_flops_per_s(config: RunConfig) -> float:
    """What matrix products in fp32 reach on this CPU, with the run's threads."""
    size, repeats = 768, 0
    with _threads_of(config):
        matrix = torch.ones(size, size)
        _ = matrix @ matrix
        start_s = time.perf_counter()
        while (elapsed_s := time.perf_counter() - start_s) < 0.05:
            _ = matrix @ matrix
            repeats += 1
    return repeats * 2 * size**3 / elapsed_s


def row_bounds(config: RunConfig) -> Tensor:
    """`cu_seqlens` of a micro-batch whose rows are one document each."""
    return torch.arange(config.train.micro_batch_rows + 1, dtype=torch.int32) * config.train.sequence_length


def random_rows(config: RunConfig, vocab_size: int, device: torch.device, bounds: Tensor) -> Batch:
    """A micro-batch of random tokens, as the loader gives it."""
    shape = config.train.micro_batch_rows, config.train.sequence_length
    ids = torch.randint(vocab_size, shape, device=device)
    return Batch(ids, ids.roll(-1, 1), bounds)


def config_for_cpu(config: RunConfig) -> RunConfig:
    """`config` with a backend that the CPU has; the tensors that a step keeps are the same."""
    if config.model.attention_backend != "triton":
        return config
    return config.model_copy(update={"model": config.model.model_copy(update={"attention_backend": "torch"})})


def _gathered_bytes(config: RunConfig, model: NSAForCausalLM, weights: int) -> float:
    """Weights that a rank of FSDP2 has whole at a time: the embedding, and two of the decoder layers."""
    ends = {id(layer.weight): layer.weight.numel() for layer in (model.model.embed_tokens, model.lm_head)}
    outside = BYTES_PER_PARAMETER * sum(ends.values())
    share = 0.5 if config.train.precision == "bf16" else 1.0
    return outside + share * 2 * (weights - outside) / config.model.num_hidden_layers


def _model_without_weights(config: RunConfig, vocab_size: int) -> NSAForCausalLM:
    """The model with the shapes of its weights only."""
    with torch.device("meta"):
        return build_model(config, vocab_size=vocab_size, eos_token_id=0)


@contextmanager
def _threads_of(config: RunConfig) -> Iterator[None]:
    """Use the run's number of threads inside the block."""
    before = torch.get_num_threads()
    torch.set_num_threads(config.run.num_threads or before)
    try:
        yield
    finally:
        torch.set_num_threads(before)


def _time_steps(config: RunConfig, device: torch.device, vocab_size: int, limit_s: float) -> tuple[float, float, int]:
    """Seconds of a forward and backward pass and of an update, and how many were timed."""
    model = build_model(config, vocab_size=vocab_size, eos_token_id=0).train()
    model.to(device)  # pyright: ignore[reportArgumentType]  (transformers wraps `to`)
    checkpoint_activations(model, config.train.activation_checkpointing)
    compiled = config.train.compile and device.type == "cuda"  # on the CPU that takes longer than it tells
    if compiled:
        compile_layers(model)
    optimizer = build_optimizer(model, config.optim)
    loss = NextTokenLoss(model, compiled=compiled)
    batch = random_rows(config, vocab_size, device, row_bounds(config).to(device))
    passes_s: list[float] = []
    updates_s: list[float] = []
    begin_s = time.perf_counter()
    while len(passes_s) < 4 and (len(passes_s) < 2 or time.perf_counter() - begin_s < limit_s):
        start_s = time.perf_counter()
        _forward_backward(loss, batch, config)
        _wait(device)
        passes_s.append(time.perf_counter() - start_s)
        start_s = time.perf_counter()
        optimizer.step()
        optimizer.zero_grad(set_to_none=True)
        _wait(device)
        updates_s.append(time.perf_counter() - start_s)
    return min(passes_s[1:]), min(updates_s[1:]), len(passes_s) - 1


def _forward_backward(loss: nn.Module, batch: Batch, config: RunConfig) -> None:
    device = batch.input_ids.device
    with torch.autocast(device.type, torch.bfloat16, enabled=config.train.precision == "bf16"):
        total = loss(batch.input_ids, batch.labels, batch.cu_seqlens)
    total.backward()


def _wait(device: torch.device) -> None:
    if device.type == "cuda":
        torch.cuda.synchronize(device)


class _LiveBytes(TorchDispatchMode):
    """Counts the bytes of all tensors that are alive, and their peak.

    Attributes:
        now: bytes alive.
        peak: the most that were alive at a time since it was last set.
    """

    def __init__(self) -> None:
        super().__init__()
        self.now = self.peak = 0
        self._sizes: dict[int, int] = {}

    def __torch_dispatch__(self, function: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        result = function(*args, **(kwargs or {}))
        for value in tree_leaves(result):
            if isinstance(value, Tensor):
                self._add(value.untyped_storage())
        return result

    def _add(self, storage: torch.UntypedStorage) -> None:
        key = storage._cdata  # the address of the storage that all its views share
        if key not in self._sizes:
            self._sizes[key] = storage.nbytes()
            self.now += self._sizes[key]
            self.peak = max(self.peak, self.now)
            weakref.finalize(storage, self._remove, key)

    def _remove(self, key: int) -> None:
        self.now -= self._sizes.pop(key)
