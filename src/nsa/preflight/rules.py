"""The checks that need only the config, the machine and the estimates; each is one function from a `Plan` to findings.

To add one: a name in `findings.CODES`, a function here, its place in `RULES`, a test that triggers it.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path

from nsa.config.findings import Finding
from nsa.config.run import RunConfig
from nsa.machine import Machine
from nsa.preflight.estimate import Memory, Speed

LONG_RUN_STEPS = 5000  # from here on a run must be able to lose its machine
MAX_LOST_HOURS = 1.0  # of work between two checkpoints
LONG_RUN_HOURS = 48.0  # from here on a run should know when to end
LEARNING_RATES = 1e-6, 3e-2  # outside, AdamW has hardly ever trained a Transformer
ABSURD_LEARNING_RATES = 1e-8, 0.3
MEMORY_WARNING = 0.9  # share of the device's memory
COMPILED_SPARES = 0.4  # share of the traced activations that compiled layers may do without; 0.39 measured


@dataclass(frozen=True)
class Plan:
    """A run as far as it is known before it starts; None where something is not known.

    Attributes:
        config: of the run.
        machine: what it runs on; None when the device that it asks for is not here.
        world_size: its processes.
        vocab_size: of its tokenizer.
        num_parameters, num_non_embedding: of its model.
        memory: at the peak of a step.
        speed: of a step.
        run_s: seconds of the whole run.
        fitted_steps: about so many of the steps fit into `train.max_minutes`; None where all do.
        disk_needed_gib: of its checkpoints.
        disk_free_gib: where the run folder will be; None when the run is meant for another machine.
    """

    config: RunConfig
    machine: Machine | None
    world_size: int
    vocab_size: int | None = None
    num_parameters: int | None = None
    num_non_embedding: int | None = None
    memory: Memory | None = None
    speed: Speed | None = None
    run_s: float | None = None
    fitted_steps: int | None = None
    disk_needed_gib: float | None = None
    disk_free_gib: float | None = None

    @property
    def is_long(self) -> bool:
        return self.config.train.steps >= LONG_RUN_STEPS

    @property
    def is_here(self) -> bool:
        """Whether the run is meant for this machine."""
        return self.machine is None or self.machine.is_here


Rule = Callable[[Plan], Iterator[Finding]]


def check(plan: Plan) -> list[Finding]:
    """All findings of all rules."""
    return [finding for rule in RULES for finding in rule(plan)]


def run_folder(plan: Plan) -> Iterator[Finding]:
    path = Path(plan.config.run.folder) / plan.config.run.name
    if plan.is_here and path.exists():
        yield Finding(
            "run-folder-used",
            "error",
            f"the run folder {path} exists already",
            f"give another name (--run.name {path.name}-2), or remove the folder first",
        )


def checkpoints(plan: Plan) -> Iterator[Finding]:
    train = plan.config.train
    every = train.checkpoint_every_steps
    between = min(every or train.steps, train.steps)  # the last step writes one in any case
    if plan.is_long and not 0 < every < train.steps:
        yield Finding(
            "no-checkpoints",
            "error",
            f"{train.steps:,} steps with train.checkpoint_every_steps {every} write no checkpoint before the last step",
            f"set train.checkpoint_every_steps, for example {max(1, train.steps // 50)}",
        )
    elif plan.speed and between * plan.speed.step_s > MAX_LOST_HOURS * 3600:
        hours = between * plan.speed.step_s / 3600
        steps = max(1, int(MAX_LOST_HOURS * 1800 / plan.speed.step_s))
        yield Finding(
            "checkpoints-too-rare",
            "error" if plan.is_long else "warning",
            f"{between:,} steps between checkpoints are about {hours:.1f} hours, which a crash would lose",
            f"set train.checkpoint_every_steps to {steps} or less",
        )


def disk(plan: Plan) -> Iterator[Finding]:
    if plan.disk_needed_gib is None or plan.disk_free_gib is None or plan.disk_needed_gib <= plan.disk_free_gib:
        return
    yield Finding(
        "disk-too-small",
        "error",
        f"the checkpoints take up to {plan.disk_needed_gib:.2f} GiB, but {plan.disk_free_gib:.2f} GiB are free at "
        f"{plan.config.run.folder}",
        f"free space, set run.folder to another disk, or lower train.keep_checkpoints "
        f"{plan.config.train.keep_checkpoints}",
    )


def device(plan: Plan) -> Iterator[Finding]:
    config, machine = plan.config, plan.machine
    if machine is None:
        return
    if machine.kind == "cuda" and machine.has_fast_bf16 and config.train.precision == "fp32":
        yield Finding(
            "fp32-on-bf16-gpu",
            "error",
            f"train.precision fp32 on {machine.name}, which computes bf16 many times faster",
            "set train.precision to bf16; weights and optimizer stay in fp32",
        )
    if machine.kind == "cpu" and config.train.precision == "bf16" and not machine.has_fast_bf16:
        yield Finding(
            "bf16-on-cpu",
            "warning",
            f"train.precision bf16, but {machine.name} has no bf16 instructions",
            "set train.precision to fp32, which is faster there",
        )


def backend(plan: Plan) -> Iterator[Finding]:
    asked = plan.config.model.attention_backend
    if plan.machine is not None and asked == "triton" and not plan.machine.has_triton:
        yield Finding(
            "backend-missing",
            "error",
            f"model.attention_backend triton needs an NVIDIA GPU of compute capability 8.0 or newer and the package "
            f"triton, not {plan.machine.name}",
            "set model.attention_backend to auto or torch",
        )


def batch(plan: Plan) -> Iterator[Finding]:
    try:
        plan.config.micro_batches_of_each(plan.world_size)
    except ValueError as error:
        remedy = "set train.batch_tokens to that, or lower train.micro_batch_rows"
        yield Finding("batch-not-divisible", "error", str(error), remedy)


def memory(plan: Plan) -> Iterator[Finding]:
    if plan.memory is None or plan.machine is None:
        return
    needed, there = plan.memory.total_gib, plan.machine.memory_gib
    compiled = plan.config.train.compile and plan.config.train.activation_checkpointing == "none"
    spared = COMPILED_SPARES * plan.memory.activations_gib if compiled else 0.0
    if needed > MEMORY_WARNING * there:
        too_much = needed - spared > there
        yield Finding(
            "memory",
            "error" if too_much else "warning",
            f"a step takes about {needed:.1f} GiB ({plan.memory.activations_gib:.1f} of them activations) "
            f"and {plan.machine.name} has {there:.1f} GiB",
            f"lower train.micro_batch_rows {plan.config.train.micro_batch_rows}, set train.activation_checkpointing, "
            f"or share the weights (train.parallel fsdp2)",
        )


def geometry(plan: Plan) -> Iterator[Finding]:
    model, length = plan.config.model, plan.config.train.sequence_length
    if "nsa" not in model.layer_types:
        return
    blocks = model.geometry
    if blocks.compress_block_size > length:
        yield Finding(
            "nothing-compressed",
            "error",
            f"no compressed token exists in rows of {length}: model.compress_block_size is "
            f"{blocks.compress_block_size}",
            "shorten the blocks or lengthen train.sequence_length",
        )
    selected = blocks.num_selected_blocks * blocks.select_block_size
    covering = {"selection": selected, "window": blocks.window_size}
    covers = [f"{name} covers {tokens}" for name, tokens in covering.items() if tokens >= length]
    if covers:
        yield Finding(
            "selection-covers-all",
            "info",
            f"{' and '.join(covers)} tokens, rows have {length}: nothing is left out, and nothing is faster than dense",
            "fine for a test of correctness; for sparsity lower num_selected_blocks or window_size",
        )


def schedule(plan: Plan) -> Iterator[Finding]:
    config = plan.config
    warmup, steps, rate = config.optim.warmup_steps, config.train.steps, config.optim.lr
    if warmup > steps:
        yield Finding(
            "warmup-too-long",
            "error",
            f"optim.warmup_steps {warmup:,}, but the run has {steps:,} steps: the rate never reaches its peak",
            f"set optim.warmup_steps to {max(1, steps // 50)} or so",
        )
    least, most = LEARNING_RATES
    if not least <= rate <= most:
        absurd = not ABSURD_LEARNING_RATES[0] <= rate <= ABSURD_LEARNING_RATES[1]
        yield Finding(
            "learning-rate",
            "error" if absurd else "warning",
            f"optim.lr {rate:g} is outside of {least:g} to {most:g}, where AdamW trains Transformers",
            "for most sizes 3e-4 to 3e-3 is right",
        )


def evaluation(plan: Plan) -> Iterator[Finding]:
    config = plan.config
    if config.eval.every_steps >= config.train.steps > 1:
        yield Finding(
            "no-evaluation",
            "error" if plan.is_long else "info",
            f"eval.every_steps {config.eval.every_steps:,} of {config.train.steps:,} steps: the held-out loss is known "
            f"only at the start and at the end",
            f"set eval.every_steps to {max(1, config.train.steps // 20)} or so",
        )


def length(plan: Plan) -> Iterator[Finding]:
    if plan.run_s is None:
        return
    hours = plan.run_s / 3600
    if hours > LONG_RUN_HOURS and not plan.config.train.early_stop_evals:
        yield Finding(
            "no-early-stop",
            "warning",
            f"the run takes about {hours:,.0f} hours and never ends early",
            "set train.early_stop_evals, for example 10, or fewer train.steps",
        )


def floor(plan: Plan) -> Iterator[Finding]:
    asked = plan.config.guards.entropy_floor_nats
    if asked is not None and plan.vocab_size and asked >= math.log(plan.vocab_size):
        yield Finding(
            "entropy-floor",
            "error",
            f"guards.entropy_floor_nats {asked:g} is not below ln({plan.vocab_size}) = "
            f"{math.log(plan.vocab_size):.3f}, the loss of a uniform guess: the first step would end the run",
            "set it in nats per token to what the data cannot be predicted better than",
        )


RULES: tuple[Rule, ...] = (
    run_folder,
    checkpoints,
    disk,
    device,
    backend,
    batch,
    memory,
    geometry,
    schedule,
    evaluation,
    length,
    floor,
)
