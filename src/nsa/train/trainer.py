"""What a run consists of, and one optimizer step of it.

    trainer = Trainer(config)
    record, waits_s = trainer.train_step()
    print(record.loss, trainer.evaluate().val_bits_per_byte)

Building a `Trainer` writes nothing and raises `ValueError` for a config that asks for something impossible.
"""

from __future__ import annotations

import time
from collections.abc import Iterator
from dataclasses import asdict
from typing import Literal

import torch

from nsa.data.loader import build_eval_batches, build_train_loader
from nsa.data.tokenizers import load_tokenizer
from nsa.eval.perplexity import IGNORED_LABEL, TokenBatch, evaluate, sum_loss
from nsa.eval.samples import SampleOptions, draw_samples, format_samples
from nsa.train.checkpoint import save_checkpoint
from nsa.train.config import RunConfig
from nsa.train.device import choose_device
from nsa.train.guards import StepGuard
from nsa.train.model import build_model
from nsa.train.observe.recorder import EvalRecord, StepRecord
from nsa.train.optim import build_optimizer, learning_rate, set_learning_rate
from nsa.train.run_folder import RunFolder, write_text


class Trainer:
    """Model, data, optimizer and guards of one run, and its position in it.

    Attributes:
        step: optimizer steps done.
        tokens: input tokens of those steps.
        losses: training losses of those steps.
        train_s: seconds of those steps.
        evaluations: all held-out results so far.
        start_s: `time.perf_counter()` when the run began.
    """

    def __init__(self, config: RunConfig) -> None:
        self.start_s = time.perf_counter()
        self.config = config
        self.device = choose_device(config.run.device)
        if config.run.num_threads is not None:
            torch.set_num_threads(config.run.num_threads)
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
        self.train_s = 0.0
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
        self.guard.check_evaluation(self.step, result.loss)
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
