"""Training benchmark: whole optimizer steps of a model with NSA and of the same model with dense attention.

    nsa bench train                                                     # the one-layer toy on the CPU
    nsa bench train configs/nsa_125m.yaml --lengths 2048 32768 --data.source sotu
    torchrun --nproc-per-node 2 -m nsa.cli bench train configs/nsa_125m.yaml --layer_types nsa

A step is `Trainer.train_step`: fetch batches of real text, forward, loss, backward, clip, guard, AdamW. The models take
turns, so that a busy machine slows all alike. Each row of T tokens is attended to as one document (`--documents packed`
keeps the documents in it apart), so dense attention has the plain causal form, without a mask tensor; on a GPU it is
the fastest of PyTorch's kernels at that shape. A step has about as many tokens at every length, the config's.

CSV columns: `attention`, `dense_kernel`, `processes`, `length` T, `num_parameters`, `tokens` of a step, `step_ms`
(median), `tokens_per_s` from that median, `mfu` by NSA's own FLOP count (nan where the device's peak is not known),
`peak_gib` of device memory (nan on the CPU), `speedup` in tokens per second over dense attention at that length.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Callable
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass, field
from typing import Any

import torch
from torch.nn.attention import SDPBackend, sdpa_kernel

from nsa.bench.protocol import median_ms, timed_s
from nsa.bench.settings import TrainBench
from nsa.config.load import load_config, override_config
from nsa.config.run import RunConfig
from nsa.data.stream.packing import Batch
from nsa.train.parallel import Parallel, setup_parallel
from nsa.train.trainer import Trainer
from nsa.units import GIB

DENSE_KERNELS = {"flash": SDPBackend.FLASH_ATTENTION, "cudnn": SDPBackend.CUDNN_ATTENTION}
NAN = float("nan")
PROFILE_ROWS, PROFILE_NAME = 32, 90  # kernels, and characters of their names, that are printed
# One layer of width 128, 8 heads in 2 groups, 8 rows of 128 bytes.
TOY = {
    "model": {
        "num_hidden_layers": 1,
        "hidden_size": 128,
        "intermediate_size": 352,
        "num_attention_heads": 8,
        "num_key_value_heads": 2,
        "compress_block_size": 16,
        "compress_stride": 8,
        "select_block_size": 32,
        "num_selected_blocks": 8,
        "window_size": 64,
    },
    "train": {"sequence_length": 128, "batch_tokens": 1024, "micro_batch_rows": 8},
}


@dataclass(frozen=True)
class TrainRow:
    """One line of the CSV; its fields are the columns."""

    attention: str
    dense_kernel: str
    processes: int
    length: int
    num_parameters: int
    tokens: int
    step_ms: float
    tokens_per_s: float
    mfu: float = NAN
    peak_gib: float = NAN
    speedup: float = NAN


@dataclass
class _Candidate:
    """A model that is measured, and what was seen of it."""

    name: str
    trainer: Trainer
    dense_kernel: str
    state_bytes: int
    peak_bytes: int = 0
    mfus: list[float] = field(default_factory=list)

    def step(self) -> None:
        """One optimizer step."""
        device = self.trainer.device
        if device.type == "cuda":
            torch.cuda.reset_peak_memory_stats(device)
        with self.kernel():
            record = self.trainer.train_step()
        self.mfus.append(NAN if record.mfu is None else record.mfu * record.step_s)
        if device.type == "cuda":
            self.peak_bytes = max(self.peak_bytes, torch.cuda.max_memory_allocated(device))

    def kernel(self) -> AbstractContextManager[object]:
        """Dense attention by the chosen kernel alone."""
        return sdpa_kernel(DENSE_KERNELS[self.dense_kernel]) if self.dense_kernel in DENSE_KERNELS else nullcontext()


def measure_train(bench: TrainBench) -> list[TrainRow]:
    """Run the benchmark, a row for each length and kind of attention; none on ranks other than 0.

    Raises:
        ValueError: a size or key of the config does not fit.
    """
    if bench.steps < 1 or bench.warmup < 0:
        raise ValueError(f"steps must be at least 1 and warmup at least 0, not {bench.steps} and {bench.warmup}")
    base = bench_config(bench)
    rows: list[TrainRow] = []
    with setup_parallel(bench.device, base.train.parallel) as parallel:
        for length in bench.lengths or (base.train.sequence_length,):
            rows += _measure(bench, config_at(base, length, parallel.world_size), parallel)
        return rows if parallel.is_main else []


def bench_config(bench: TrainBench) -> RunConfig:
    """The config of the benchmark's models, less length and layer types."""
    config = RunConfig.model_validate(TOY) if bench.config is None else load_config(bench.config)
    return override_config(config, ("--run.device", bench.device, *bench.overrides))


def config_at(config: RunConfig, length: int, world_size: int) -> RunConfig:
    """The config with rows of `length` tokens, and about as many tokens in a micro-batch and in a step."""
    rows = max(1, config.train.micro_batch_rows * config.train.sequence_length // length)
    piece = rows * length * world_size
    train = {
        "sequence_length": length,
        "micro_batch_rows": rows,
        "batch_tokens": max(1, config.train.batch_tokens // piece) * piece,
    }
    return _changed(config, train=train)


def _changed(config: RunConfig, **sections: dict[str, Any]) -> RunConfig:
    values = config.model_dump()
    return RunConfig.model_validate({**values, **{name: {**values[name], **new} for name, new in sections.items()}})


def _measure(bench: TrainBench, config: RunConfig, parallel: Parallel) -> list[TrainRow]:
    # A utilisation is then of one step alone.
    num_steps = {"steps": bench.warmup + bench.steps + bench.profile, "log_every_steps": 1}
    candidates = [
        _candidate(name, _changed(config, model={"layer_types": (name,)}, train=num_steps), bench, parallel)
        for name in bench.layer_types
    ]
    steps: dict[str, dict[str, Callable[[], object]]] = {c.name: {"step": c.step} for c in candidates}
    ms = median_ms(steps, parallel.device, bench.warmup, bench.steps)
    if bench.profile:
        for candidate in candidates:
            _print_profile(candidate)
    rows = [_row(candidate, candidates, ms[f"{candidate.name}_step"]) for candidate in candidates]
    for candidate in candidates:
        candidate.trainer.loader.close()
    dense = next((row.tokens_per_s for row in rows if row.attention == "full_attention"), NAN)
    return [dataclasses.replace(row, speedup=row.tokens_per_s / dense) for row in rows]


def _candidate(name: str, config: RunConfig, bench: TrainBench, parallel: Parallel) -> _Candidate:
    on_cuda = parallel.device.type == "cuda"
    held = torch.cuda.memory_allocated(parallel.device) if on_cuda else 0
    trainer = Trainer(config, parallel)
    if bench.documents == "rows":
        trainer.batches = map(_rows_as_documents, trainer.batches)
    kernel = fastest_kernel(config, parallel.device) if name == "full_attention" else ""
    candidate = _Candidate(name, trainer, kernel, 0)
    if on_cuda:
        candidate.step()  # compiles, and makes the optimizer's state
        candidate.state_bytes = torch.cuda.memory_allocated(parallel.device) - held
    return candidate


def _rows_as_documents(batch: Batch) -> Batch:
    return dataclasses.replace(batch, cu_seqlens=None)


def fastest_kernel(config: RunConfig, device: torch.device) -> str:
    """The name in `DENSE_KERNELS` that is fastest, forward and backward, at the config's shape; "" on the CPU."""
    if device.type != "cuda":
        return ""
    model, rows, length = config.model, config.train.micro_batch_rows, config.train.sequence_length
    (key_size, value_size), groups = model.head_sizes, model.num_key_value_heads
    sizes = [(model.num_attention_heads, key_size), (groups, key_size), (groups, value_size)]
    dtype = torch.bfloat16 if config.train.precision == "bf16" else torch.float32
    tensors = [torch.randn(rows, heads, length, size, device=device, dtype=dtype) for heads, size in sizes]
    q, k, v = (x.requires_grad_() for x in tensors)

    def run() -> None:
        out = torch.nn.functional.scaled_dot_product_attention(q, k, v, is_causal=True, enable_gqa=True)
        torch.autograd.grad(out.sum(), (q, k, v))

    seconds = {}
    for name, kernel in DENSE_KERNELS.items():
        try:
            with sdpa_kernel(kernel):
                seconds[name] = min(timed_s(run, device) for _ in range(4))
        except RuntimeError as error:  # "No available kernel"
            print(f"dense attention by {name}: {error}")
    print("dense attention alone:", {name: f"{1000 * s:.2f} ms" for name, s in seconds.items()})
    return min(seconds, key=seconds.__getitem__) if seconds else ""


def _row(candidate: _Candidate, all_: list[_Candidate], step_ms: float) -> TrainRow:
    trainer, others = candidate.trainer, [c for c in all_ if c is not candidate]
    tokens = trainer.config.train.batch_tokens
    # MFU times seconds hardly varies, with the documents' lengths alone.
    work = sorted(candidate.mfus)[len(candidate.mfus) // 2]
    peak = candidate.peak_bytes - sum(other.state_bytes for other in others)
    return TrainRow(
        attention=candidate.name,
        dense_kernel=candidate.dense_kernel,
        processes=trainer.parallel.world_size,
        length=trainer.config.train.sequence_length,
        num_parameters=trainer.model.num_parameters(),
        tokens=tokens,
        step_ms=step_ms,
        tokens_per_s=1000 * tokens / step_ms,
        mfu=1000 * work / step_ms,
        peak_gib=peak / GIB if candidate.peak_bytes else NAN,
    )


def _print_profile(candidate: _Candidate) -> None:
    """One step's kernels by their time: operators on the CPU, kernels on a GPU."""
    trainer = candidate.trainer
    on_cuda = trainer.device.type == "cuda"
    with torch.profiler.profile() as profiler:
        candidate.step()
    spent = []
    for event in profiler.key_averages():
        if (event.device_type.name == "CUDA") == on_cuda:
            us = event.self_device_time_total if on_cuda else event.self_cpu_time_total
            spent.append((us / 1000, event.count, event.key[:PROFILE_NAME]))
    if trainer.parallel.is_main:
        total = sum(ms for ms, *_ in spent)
        print(f"one step of {candidate.name}, {trainer.config.train.sequence_length} tokens a row: {total:.1f} ms busy")
        for ms, count, name in sorted(spent, reverse=True)[:PROFILE_ROWS]:
            print(f"{ms:10.2f} ms {ms / total:6.1%} {count:6d} x {name}")
