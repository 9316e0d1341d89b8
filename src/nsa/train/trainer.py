"""What a run consists of, and one optimizer step of it.

    trainer = Trainer(config)
    record = trainer.train_step()
    print(record.loss, trainer.evaluate().val_bits_per_byte)

Building a `Trainer` writes nothing and raises `ValueError` for a config that asks for something impossible. It sets two
things of the whole process: `run.num_threads`, and torch's random generators by `run.seed`. With several processes
every rank has one and calls the same methods.
"""

from __future__ import annotations

import math
import time
from collections.abc import Callable, Iterator, Mapping
from contextlib import AbstractContextManager, nullcontext
from itertools import islice
from pathlib import Path
from typing import Any, Literal

import torch
from torch import Tensor

from nsa.config.load import dump_config
from nsa.config.run import GuardSection, RunConfig
from nsa.data.corpus import open_corpus
from nsa.data.stream.loader import build_eval_batches
from nsa.data.stream.packing import Batch
from nsa.data.stream.prefetch import build_prefetcher
from nsa.data.tokenizers import load_tokenizer
from nsa.device import keep_freed_memory
from nsa.eval.perplexity import evaluate, to_device
from nsa.eval.samples import SampleOptions, draw_samples, format_samples
from nsa.flops import FlopCount
from nsa.hf import NSAForCausalLM
from nsa.inspect.one_text import select_in_text
from nsa.inspect.text_selection import TextSelection
from nsa.loss import IGNORED_LABEL, NextTokenLoss
from nsa.machine import device_peak_flops
from nsa.runs.folder import RunFolder, write_text
from nsa.runs.heartbeat import Phase
from nsa.runs.tables import FINAL_LOSSES, EvalRecord, StepRecord
from nsa.train.activation import checkpoint_activations
from nsa.train.checkpoint.load import load_checkpoint, restore_random_state
from nsa.train.checkpoint.save import Checkpointer
from nsa.train.guards import StepGuard
from nsa.train.model import build_model, compile_layers, whole_model
from nsa.train.optim import build_optimizer, clip_gradients, learning_rate, set_learning_rate
from nsa.train.parallel import Parallel, distribute, gradient_sync, one_process, release_gathered
from nsa.train.position import Position
from nsa.train.telemetry.eta import Deadline
from nsa.train.telemetry.health_probe import HealthProbe, ModelHealth
from nsa.train.telemetry.pace import Pace
from nsa.train.telemetry.profiler import check_windows


class Trainer:
    """Model, data, optimizer and guards of one run, and its position in it.

    Args:
        config: of the run.
        parallel: this process among those of the run; one process unless given.
        checkpoint: to resume from, written with this or another number of ranks; a new run unless given.

    Raises:
        ValueError: the config asks for something impossible, or the checkpoint belongs to other data.
        CheckpointError: the checkpoint cannot be read into the model of the config.

    Attributes:
        model: the language model, whose parameters are this rank's shards under FSDP2.
        step: optimizer steps done.
        tokens: input tokens of those steps, of all ranks.
        losses: training losses of those steps.
        train_s: seconds of those steps.
        pace: tokens per second of the newest steps.
        evaluations: all held-out results so far.
        start_s: `time.perf_counter()` when the run began.
        deadline: when it is to end, for a run with `train.max_minutes`.
        batches: what training steps take their micro-batches from; the loader, unless put in its place.
        on_phase: told "fetch" and "step" as a training step gets there.
        resume_note: a line about what is not as the writers of the checkpoint would have gone on, or None.
    """

    def __init__(self, config: RunConfig, parallel: Parallel | None = None, *, checkpoint: Path | None = None) -> None:
        self.start_s = time.perf_counter()
        self.deadline: Deadline | None = None
        self.config = config
        self.parallel = parallel or one_process(config.run.device)
        self.device = self.parallel.device
        self.num_micro_batches = config.micro_batches_of_each(self.parallel.world_size)
        if config.run.num_threads is not None:
            torch.set_num_threads(config.run.num_threads)
        if self.device.type == "cpu":
            keep_freed_memory()
        torch.manual_seed(config.run.seed)
        self.tokenizer = load_tokenizer(config.data.tokenizer)
        position = None if checkpoint is None else Position.read(checkpoint)
        self._build_data(None if position is None else position.loader)
        self._build_model()
        self.probe = self._build_probe()
        self.on_phase: Callable[[Phase], None] = lambda phase: None
        self.optimizer = build_optimizer(self.model, config.optim)
        self.guard = StepGuard(self._guards())
        self.flops = FlopCount(self.model.config, config.train.sequence_length)
        self.peak_flops = device_peak_flops(self.device, config.train.precision)
        self.step, self.tokens = 0, 0
        self.pace = Pace(config.train.log_every_steps)
        self.evaluations: list[EvalRecord] = []
        self.losses: list[float] = []
        self.train_s = 0.0
        self.resume_note: str | None = None
        if checkpoint is not None and position is not None:
            self._go_on(checkpoint, position)

    def _build_data(self, start: Mapping[str, Any] | None) -> None:
        """The documents, the batches of them from `start` on, and the held-out batches."""
        config, parallel = self.config, self.parallel
        self.corpus = open_corpus(config.data)
        rows = {"tokenizer": self.tokenizer, "sequence_length": config.train.sequence_length, "corpus": self.corpus}
        self.loader = build_prefetcher(
            config.data,
            **rows,
            rows_per_batch=config.train.micro_batch_rows,
            seed=config.run.seed,
            rank=parallel.rank,
            world_size=parallel.world_size,
            pin_memory_for=parallel.device,
            start=start,
        )
        self.held_out = build_eval_batches(config.data, **rows, rows_per_batch=config.eval.rows)
        self.batches: Iterator[Batch] = iter(self.loader)

    def _guards(self) -> GuardSection:
        """The configured guards, with the floor of the data itself where it is known and none is given."""
        guards, floor = self.config.guards, self.corpus.entropy_floor_nats(self.tokenizer)
        return guards if guards.entropy_floor_nats else guards.model_copy(update={"entropy_floor_nats": floor})

    def _build_model(self) -> None:
        """The model in fp32, alike on all ranks, then what makes it fast, small and shared, in the order that fits."""
        train = self.config.train
        eos = self.tokenizer.eos_id
        self.model = build_model(self.config, vocab_size=self.tokenizer.vocab_size, eos_token_id=eos)
        self.model.to(self.device)  # pyright: ignore[reportArgumentType]  (transformers wraps `to`)
        checkpoint_activations(self.model, train.activation_checkpointing)
        if train.compile:
            compile_layers(self.model)
        self.loss = NextTokenLoss(self.model, compiled=train.compile)
        self.shared_loss = distribute(self.loss, self.parallel, train.precision)
        self._parameters = list(self.model.parameters())

    def _build_probe(self) -> HealthProbe:
        observe = self.config.observe
        check_windows(observe.memory_snapshot_steps, self.device)
        batch = next(iter(self.held_out))
        return HealthProbe(self.loss, batch, self.config.model.geometry, self.device, observe.health_layers)

    def train_step(self) -> StepRecord:
        """One optimizer step on `batch_tokens` tokens.

        The loss is the sum over all micro-batches of all ranks divided by the number of all their valid labels, so
        that it and its gradient do not depend on how the step is cut into micro-batches or ranks.
        """
        start_s = time.perf_counter()
        self.loss.train()
        self.on_phase("fetch")
        micro_batches, waits_s = self._fetch(self.num_micro_batches)
        self.on_phase("step")
        num_valid, num_flops = self._count(micro_batches)
        sum_nats = self._backward(micro_batches, num_valid)
        norm = clip_gradients(self._parameters, self.config.optim.max_grad_norm)
        rate = learning_rate(self.step + 1, self.config.train.steps, self.config.optim)
        set_learning_rate(self.optimizer, rate)
        # The only wait for the device in a step. All ranks get the same two numbers, and so decide alike.
        stats = self.parallel.sum(torch.stack([sum_nats / num_valid, norm / self.parallel.world_size]))
        mean_loss, grad_norm = stats.tolist()
        if self.guard.allows(self.step + 1, mean_loss, grad_norm):
            self.optimizer.step()
        self.optimizer.zero_grad(set_to_none=True)
        step_s = time.perf_counter() - start_s
        return self._record(mean_loss, grad_norm, rate, step_s, waits_s, num_flops)

    def _backward(self, micro_batches: list[Batch], num_valid: float) -> Tensor:
        """Forward and backward of this rank's micro-batches; the sum of their losses."""
        sum_nats = torch.zeros((), device=self.device)
        # What the ranks exchange is the mean of their gradients.
        divisor = num_valid / self.parallel.world_size
        for index, batch in enumerate(micro_batches):
            there = to_device(batch, self.device)
            with gradient_sync(self.shared_loss, index == len(micro_batches) - 1):
                with self._precision():
                    loss = self.shared_loss(there.input_ids, there.labels, there.cu_seqlens)
                (loss / divisor).backward()
            sum_nats += loss.detach()
        return sum_nats

    def evaluate(self) -> EvalRecord:
        """Score the held-out documents, each rank its share; the result is equal on all."""
        with self._precision():
            result = evaluate(
                self.loss,
                self.held_out,
                device=self.device,
                num_bytes=self.held_out.num_bytes,
                rank=self.parallel.rank,
                world_size=self.parallel.world_size,
                total=self.parallel.sum,
            )
        release_gathered(self.loss)
        self.guard.check_evaluation(self.step, result.loss)
        record = EvalRecord(self.step, result.loss, result.perplexity, result.bits_per_byte)
        self.evaluations.append(record)
        return record

    def time_evaluation(self) -> float:
        """Seconds that `evaluate` will take, from one batch of each rank."""
        world_size, start_s = self.parallel.world_size, time.perf_counter()
        with self._precision():
            first = list(islice(self.held_out, world_size))
            evaluate(self.loss, first, device=self.device, num_bytes=1, rank=self.parallel.rank, world_size=world_size)
        release_gathered(self.loss)
        return (time.perf_counter() - start_s) * math.ceil(len(self.held_out) / world_size)

    def measure_health(self) -> ModelHealth | None:
        """Gates and selection on a held-out row, the same on all ranks; None for a model without NSA layers."""
        with self._precision():
            return self.probe.measure(self.step)

    def look_at_selection(self) -> TextSelection | None:
        """What the model selects in a held-out text, on rank 0; None there for a model without NSA layers.

        All ranks must call it, as they may have to send their shards.
        """
        if not self.probe.layers or (model := self.whole_model()) is None:
            return None
        name, ids = self.held_out.longest_piece
        with self._precision():
            return select_in_text(model, ids, self.tokenizer.decode, name)

    @property
    def early_stop(self) -> str | None:
        """Why to end before the last step, or None: evaluations that were no better than the best before them."""
        patience = self.config.train.early_stop_evals
        losses = [record.val_loss for record in self.evaluations]
        if not 0 < patience < len(losses) or min(losses[-patience:]) < min(losses[:-patience]):
            return None
        return f"early stop: {patience} evaluations in a row no better than {min(losses):.4f}"

    def whole_model(self) -> NSAForCausalLM | None:
        """The model with all its weights, which can generate, on rank 0; None on the others.

        All ranks must call it, as they may have to send their shards.
        """
        return whole_model(self.model, self.parallel)

    @property
    def position(self) -> Position:
        """Where the run stands."""
        return Position(
            step=self.step,
            tokens=self.tokens,
            train_s=self.train_s,
            losses=self.losses[-FINAL_LOSSES:],
            evaluations=self.evaluations,
            guard=self.guard.state_dict(),
            loader=self.loader.state_dict(),
        )

    def _go_on(self, checkpoint: Path, position: Position) -> None:
        """Take over a checkpoint's weights, optimizer, position and random generators; the data are there already."""
        load_checkpoint(checkpoint, model=self.model, optimizer=self.optimizer, parallel=self.parallel)
        self.guard.load_state_dict(position.guard)
        self.step, self.tokens, self.train_s = position.step, position.tokens, position.train_s
        self.losses, self.evaluations = position.losses, position.evaluations
        self.resume_note = restore_random_state(checkpoint, seed=self.config.run.seed, parallel=self.parallel)

    def checkpointer(self, folder: RunFolder) -> Checkpointer:
        """What writes this run's checkpoints."""
        return Checkpointer(
            folder.checkpoints,
            self.model,
            self.parallel,
            tokenizer=self.tokenizer,
            config_yaml=dump_config(self.config),
            keep=self.config.train.keep_checkpoints,
            keep_every_steps=self.config.train.keep_every_steps,
            tables=folder.tables,
            saved_step=self.step,
        )

    def save(self, checkpointer: Checkpointer) -> None:
        """Begin to write a checkpoint of this step."""
        checkpointer.save(self.step, optimizer=self.optimizer, trainer=self.position.as_dict())

    def write_samples(self, folder: RunFolder, moment: Literal["before", "after"]) -> None:
        """Write `samples/before.txt` or `samples/after.txt`: the same prompts and random numbers."""
        options = self.config.sample
        if not options.max_new_tokens:
            return
        model = self.whole_model()
        if model is not None:
            draw = SampleOptions(**options.model_dump(exclude={"prompts"}))
            samples = draw_samples(model, self.tokenizer, options.prompts, draw, seed=self.config.run.seed)
            title = f"{moment} training, step {self.step}, seed {self.config.run.seed}, {draw}"
            write_text(folder.samples / f"{moment}.txt", format_samples(samples, title))

    def _fetch(self, count: int) -> tuple[list[Batch], list[float]]:
        """The next micro-batches, and the seconds that each was waited for."""
        batches, waits_s = [], []
        for _ in range(count):
            start_s = time.perf_counter()
            batches.append(next(self.batches))
            waits_s.append(time.perf_counter() - start_s)
        return batches, waits_s

    def _count(self, micro_batches: list[Batch]) -> tuple[float, float]:
        """Valid labels and operations of the step, of all ranks together; worked out on the host."""
        num_valid = sum(int((batch.labels != IGNORED_LABEL).sum()) for batch in micro_batches)
        num_flops = sum(self.flops.training(batch.piece_lengths) for batch in micro_batches)
        total = self.parallel.sum(torch.tensor([num_valid, num_flops], dtype=torch.float64))
        num_valid, num_flops = total.tolist()
        return num_valid, num_flops

    def _precision(self) -> AbstractContextManager[object]:
        """Computation in the configured precision; weights stay in fp32, or FSDP2 casts them as it gathers them."""
        if self.config.train.precision == "fp32":
            return nullcontext()
        return torch.autocast(self.device.type, torch.bfloat16)

    def _record(
        self, loss: float, grad_norm: float, rate: float, step_s: float, waits_s: list[float], num_flops: float
    ) -> StepRecord:
        tokens, peak = self.config.train.batch_tokens, self.peak_flops
        self.step += 1
        self.tokens += tokens
        self.train_s += step_s
        self.losses.append(loss)
        tokens_per_s, flops_per_s = self.pace.add(step_s=step_s, tokens=tokens, flops=num_flops)
        return StepRecord(
            step=self.step,
            tokens=self.tokens,
            loss=loss,
            lr=rate,
            grad_norm=grad_norm,
            tokens_per_s=tokens_per_s,
            mfu=None if peak is None else flops_per_s / peak / self.parallel.world_size,
            step_s=step_s,
            fetch_s=sum(waits_s),
            waits_s=tuple(waits_s),
        )


def _document_lengths(batch: Batch) -> Tensor:
    """Tokens of each packed document of a batch."""
    rows, length = batch.input_ids.shape
    return torch.full((rows,), length) if batch.cu_seqlens is None else batch.cu_seqlens.diff()
