"""The main path of a run: build everything, then train, evaluate, checkpoint and report.

    trainer, folder = prepare(load_config("configs/train_showcase.yaml"))
    outcome = train(trainer, folder)

`Trainer` holds what a run consists of; it is built, and thereby checked, before anything is written. `fit` is the loop
and `Trainer.train_step` one optimizer step.
"""

from __future__ import annotations

import math
import time
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any, Literal

import torch

from nsa.data.loader import build_eval_batches, build_train_loader
from nsa.data.tokenizers import load_tokenizer
from nsa.eval.perplexity import IGNORED_LABEL, TokenBatch, evaluate, sum_loss
from nsa.eval.samples import SampleOptions, draw_samples, format_samples
from nsa.ops.routing import explain_backend
from nsa.train.checkpoint import save_checkpoint
from nsa.train.config import RunConfig
from nsa.train.guards import StepGuard
from nsa.train.load_config import dump_config
from nsa.train.model import build_model
from nsa.train.observe.curves import draw_curves
from nsa.train.observe.environment import snapshot
from nsa.train.observe.recorder import EvalRecord, Recorder, StepRecord
from nsa.train.observe.report import write_report
from nsa.train.optim import build_optimizer, learning_rate, set_learning_rate
from nsa.train.run_folder import FailureStatus, RunFolder, check_unused, write_json, write_text
from nsa.train.stop import StopRequest

FINAL_LOSSES = 20  # training losses whose mean stands for the end of training


@dataclass(frozen=True)
class Outcome:
    """How a run ended.

    Attributes:
        folder: the run folder.
        stopped_by: the signal that ended it early, or None.
        metrics: the contents of `metrics.json`.
    """

    folder: RunFolder
    stopped_by: str | None
    metrics: dict[str, Any]


def prepare(config: RunConfig, command: Sequence[str] = ()) -> tuple[Trainer, RunFolder]:
    """Build and check everything, say what is about to run, and only then make the run folder.

    Raises:
        ValueError: the config asks for something impossible, or the run folder exists; nothing was written.
    """
    path = Path(config.run.folder) / config.run.name
    check_unused(path)
    trainer = Trainer(config)
    print(trainer.describe(), flush=True)
    env = snapshot(trainer.device, command)
    folder = RunFolder.create(path, config_yaml=dump_config(config), env=env, data_index=trainer.data_index())
    return trainer, folder


def train(trainer: Trainer, folder: RunFolder) -> Outcome:
    """Run a whole training.

    Raises:
        TrainingError: a guard ended the run; everything written so far is whole, `status.json` says why.
    """
    config = trainer.config
    with (
        deterministic_algorithms(config.run.deterministic and trainer.device.type == "cpu"),
        FailureStatus(folder) as status,
        StopRequest() as stop,
        Recorder(folder, num_steps=config.train.steps, log_every_steps=config.train.log_every_steps) as recorder,
    ):
        fit(trainer, folder, recorder, stop, status)
        return finish(trainer, folder, stop.reason)


def fit(trainer: Trainer, folder: RunFolder, recorder: Recorder, stop: StopRequest, status: FailureStatus) -> None:
    """The loop: optimizer steps, with evaluations and checkpoints between them; ends with a checkpoint."""
    config, every = trainer.config, trainer.config.train.checkpoint_every_steps
    trainer.write_samples(folder, "before")
    recorder.evaluation(trainer.evaluate())
    while not (trainer.step == config.train.steps or stop.reason or trainer.early_stop):
        recorder.step(*trainer.train_step())
        status.step = trainer.step
        last = trainer.step == config.train.steps
        if last or trainer.step % config.eval.every_steps == 0:
            recorder.evaluation(trainer.evaluate())
        if every and trainer.step % every == 0:
            trainer.save(folder)
        if trainer.step % config.train.log_every_steps == 0:
            folder.write_status("running", step=trainer.step)
    if trainer.saved_step != trainer.step:
        trainer.save(folder)


def finish(trainer: Trainer, folder: RunFolder, stopped_by: str | None) -> Outcome:
    """Samples, metrics, picture and report; then the final status."""
    if stopped_by is None:
        trainer.write_samples(folder, "after")
    metrics = trainer.metrics(stopped_by)
    write_json(folder.metrics_json, metrics)
    draw_curves(folder, folder.curves_png)
    write_report(folder, trainer.config, metrics)
    state = "finished" if stopped_by is None else "stopped"
    folder.write_status(state, step=trainer.step, reason=stopped_by or trainer.early_stop)
    return Outcome(folder, stopped_by, metrics)


class Trainer:
    """Model, data, optimizer and guards of one run, and its position in it.

    Attributes:
        step: optimizer steps done.
        tokens: input tokens of those steps.
        evaluations: all held-out results so far.
    """

    def __init__(self, config: RunConfig) -> None:
        self.config = config
        self.device = choose_device(config.run.device)
        torch.manual_seed(config.run.seed)
        self.tokenizer = load_tokenizer(config.data.tokenizer)
        rows = {"tokenizer": self.tokenizer, "sequence_length": config.train.sequence_length}
        self.loader = build_train_loader(
            config.data, **rows, rows_per_batch=config.train.micro_batch_rows, seed=config.run.seed
        )
        self.held_out = build_eval_batches(config.data, **rows, rows_per_batch=config.eval.rows)
        eos = self.tokenizer.eos_id
        self.model = build_model(config, vocab_size=self.tokenizer.vocab_size, eos_token_id=eos)
        self.model.to(self.device)  # pyright: ignore[reportArgumentType]  (transformers wraps `to`)
        self.optimizer = build_optimizer(self.model, config.optim)
        self.guard = StepGuard(config.guards)
        self.step, self.tokens, self.saved_step = 0, 0, 0
        self.evaluations: list[EvalRecord] = []
        self.losses: list[float] = []
        self.train_s, self._start_s = 0.0, time.perf_counter()
        self._batches: Iterator[TokenBatch] = iter(self.loader)

    def train_step(self) -> tuple[StepRecord, list[float]]:
        """One optimizer step on `batch_tokens` tokens; returns its record and the single waits for data.

        The loss is the sum over all micro-batches divided by the number of all their valid labels, so that it and its
        gradient do not depend on how the step is cut into micro-batches.
        """
        start_s = time.perf_counter()
        self.model.train()
        micro_batches, waits_s = self._fetch(self.config.num_micro_batches)
        num_valid = sum(int((batch.labels != IGNORED_LABEL).sum()) for batch in micro_batches)
        sum_nats = torch.zeros((), device=self.device)
        for batch in micro_batches:
            with self._precision():
                loss = sum_loss(self.model, batch, self.device)
            (loss / num_valid).backward()
            sum_nats += loss.detach()
        norm = torch.nn.utils.clip_grad_norm_(self.model.parameters(), self.config.optim.max_grad_norm)
        rate = learning_rate(self.step + 1, self.config.train.steps, self.config.optim)
        set_learning_rate(self.optimizer, rate)
        mean_loss, grad_norm = torch.stack([sum_nats / num_valid, norm]).tolist()
        if self.guard.allows(self.step + 1, mean_loss, grad_norm):
            self.optimizer.step()
        self.optimizer.zero_grad(set_to_none=True)
        return self._record(mean_loss, grad_norm, rate, time.perf_counter() - start_s, waits_s), waits_s

    def evaluate(self) -> EvalRecord:
        """Score the held-out documents."""
        with self._precision():
            result = evaluate(self.model, self.held_out, device=self.device, num_bytes=self.held_out.num_bytes)
        self.guard.check_floor(result.loss, f"the held-out loss after step {self.step}")
        record = EvalRecord(self.step, result.loss, result.perplexity, result.bits_per_byte)
        self.evaluations.append(record)
        return record

    @property
    def early_stop(self) -> str | None:
        """Why to end before the last step, or None: evaluations that were no better than the best before them."""
        patience = self.config.train.early_stop_evals
        losses = [record.val_loss for record in self.evaluations]
        if not 0 < patience < len(losses) or min(losses[-patience:]) < min(losses[:-patience]):
            return None
        return f"early stop: {patience} evaluations in a row no better than {min(losses):.4f}"

    def save(self, folder: RunFolder) -> None:
        """Write a checkpoint of this step."""
        save_checkpoint(
            folder.checkpoints,
            self.step,
            model=self.model,
            tokenizer=self.tokenizer,
            trainer={"tokens": self.tokens, "evaluations": [asdict(record) for record in self.evaluations]},
            keep=self.config.train.keep_checkpoints,
        )
        self.saved_step = self.step

    def write_samples(self, folder: RunFolder, moment: Literal["before", "after"]) -> None:
        """Write `samples/before.txt` or `samples/after.txt`: the same prompts and random numbers."""
        options = self.config.sample
        draw = SampleOptions(**options.model_dump(exclude={"prompts"}))
        if options.max_new_tokens:
            samples = draw_samples(self.model, self.tokenizer, options.prompts, draw, seed=self.config.run.seed)
            title = f"{moment} training, step {self.step}, seed {self.config.run.seed}, {draw}"
            write_text(folder.samples / f"{moment}.txt", format_samples(samples, title))

    def describe(self) -> str:
        """What is about to run, in a few lines."""
        config, geometry = self.config, self.config.model.geometry
        probe = torch.empty(0, device=self.device)
        backend = config.model.attention_backend
        why = f"{backend}, asked for"
        if backend == "auto":
            why = "{}, {}".format(*explain_backend(probe, geometry))
        total = config.train.steps * config.train.batch_tokens
        lines = {
            "run": Path(config.run.folder) / config.run.name,
            "model": f"{self.model.num_parameters():,} parameters, {config.model.num_hidden_layers} layers "
            f"({', '.join(config.model.layer_types)}), {config.train.precision}",
            "device": f"{self.device}, {torch.get_num_threads()} threads; NSA backend {why}",
            "data": f"{config.data.source}, {self.loader.num_documents} documents to train on and "
            f"{len(self.held_out.document_names)} held out ({self.held_out.num_labels:,} tokens); tokenizer "
            f"{self.tokenizer.name}, vocabulary {self.tokenizer.vocab_size}",
            "steps": f"{config.train.steps} of {config.train.batch_tokens:,} tokens "
            f"({config.num_micro_batches} x {config.train.micro_batch_rows} rows of "
            f"{config.train.sequence_length}), {total:,} in all",
        }
        return "\n".join(f"{name:<7} {text}" for name, text in lines.items())

    def data_index(self) -> dict[str, Any]:
        """What is trained and evaluated on, for `data_index.json`."""
        return {
            "source": self.config.data.source,
            "paths": list(self.config.data.paths),
            "tokenizer": self.tokenizer.name,
            "num_training_documents": self.loader.num_documents,
            "held_out_documents": list(self.held_out.document_names),
            "num_held_out_tokens": self.held_out.num_labels,
            "num_held_out_bytes": self.held_out.num_bytes,
        }

    def metrics(self, stopped_by: str | None) -> dict[str, Any]:
        """The run in numbers, for `metrics.json` and the report."""
        first, last = self.evaluations[0], self.evaluations[-1]
        tail = self.losses[-FINAL_LOSSES:]
        return {
            "step": self.step,
            "tokens": self.tokens,
            "stopped_by": stopped_by,
            "num_parameters": self.model.num_parameters(),
            "vocab_size": self.tokenizer.vocab_size,
            "log_vocab_size": math.log(self.tokenizer.vocab_size),
            "untrained_val_loss": first.val_loss,
            "train_loss": sum(tail) / len(tail) if tail else None,
            **{name: value for name, value in asdict(last).items() if name != "step"},
            "best_val_loss": min(record.val_loss for record in self.evaluations),
            "num_skipped_steps": self.guard.num_skipped,
            "train_s": self.train_s,
            "wall_s": time.perf_counter() - self._start_s,
            "tokens_per_s": self.tokens / self.train_s if self.train_s else None,
        }

    def _fetch(self, count: int) -> tuple[list[TokenBatch], list[float]]:
        """The next micro-batches, and the seconds that each was waited for."""
        batches, waits_s = [], []
        for _ in range(count):
            start_s = time.perf_counter()
            batches.append(next(self._batches))
            waits_s.append(time.perf_counter() - start_s)
        return batches, waits_s

    def _precision(self) -> torch.autocast:
        """Computation in the configured precision; weights stay in fp32."""
        return torch.autocast(self.device.type, torch.bfloat16, enabled=self.config.train.precision == "bf16")

    def _record(self, loss: float, grad_norm: float, rate: float, step_s: float, waits_s: list[float]) -> StepRecord:
        tokens = self.config.train.batch_tokens
        self.step += 1
        self.tokens += tokens
        self.train_s += step_s
        self.losses.append(loss)
        return StepRecord(
            step=self.step,
            tokens=self.tokens,
            loss=loss,
            lr=rate,
            grad_norm=grad_norm,
            tokens_per_s=tokens / step_s,
            mfu=None,
            step_s=step_s,
            fetch_s=sum(waits_s),
        )


def choose_device(name: str) -> torch.device:
    """The device of a name; "auto" is CUDA where there is one, else the CPU.

    Raises:
        ValueError: no such device here.
    """
    if name == "auto":
        name = "cuda" if torch.cuda.is_available() else "cpu"
    try:
        device = torch.device(name)
    except RuntimeError:
        raise ValueError(f'run.device {name!r} is unknown; use "auto", "cpu", "cuda" or "cuda:N"') from None
    if device.type == "cuda" and (device.index or 0) >= torch.cuda.device_count():
        raise ValueError(f"run.device {name!r} is not here: {torch.cuda.device_count()} CUDA devices; use auto or cpu")
    return device


@contextmanager
def deterministic_algorithms(enabled: bool) -> Iterator[None]:
    """Allow deterministic algorithms only inside the block, when `enabled`; then put the setting back."""
    memory: Any = torch.utils.deterministic
    before, fill = torch.are_deterministic_algorithms_enabled(), memory.fill_uninitialized_memory
    torch.use_deterministic_algorithms(enabled or before)
    memory.fill_uninitialized_memory = False  # it costs a write of every new tensor
    try:
        yield
    finally:
        torch.use_deterministic_algorithms(before)
        memory.fill_uninitialized_memory = fill
