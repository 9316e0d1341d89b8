"""Preflight as a whole: what a run needs, everything that is wrong with it, and whether it may start.

report = examine(load_config("configs/train_showcase.yaml"))
print(report.text())
report.raise_if_refused()
"""

from __future__ import annotations

import json
import shutil
import time
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any

import torch

from nsa.config.findings import Finding
from nsa.config.run import RunConfig
from nsa.data.corpus import Corpus
from nsa.data.errors import DataError
from nsa.data.mix import MixedCorpus
from nsa.data.tokenizers import BPE1K_VOCAB_SIZE, GPT2_VOCAB_SIZE, ByteTokenizer, Tokenizer, load_tokenizer
from nsa.device import choose_device
from nsa.machine import Machine, machine_here
from nsa.preflight import estimate
from nsa.preflight.budget import Costs, fit_steps
from nsa.preflight.data_rules import check_corpus, check_data
from nsa.preflight.estimate import Speed
from nsa.preflight.leak import find_leaks, probe_length
from nsa.preflight.rules import Plan, check
from nsa.units import GIB, duration

KNOWN_VOCAB_SIZES = {"byte": ByteTokenizer.vocab_size, "bpe1k": BPE1K_VOCAB_SIZE, "gpt2": GPT2_VOCAB_SIZE}
LEVELS = ("error", "warning", "info")
MEASURE_LIMIT_S = 15.0
ASSUMED_MFU = 0.3  # of a GPU's bf16 peak, where no step can be timed, for models of ASSUMED_WIDTH and wider
ASSUMED_WIDTH = 768  # narrower models keep a GPU busy less, about in proportion
ASSUMED_CPU_SHARE = 0.4  # of the speed of a plain fp32 product, where a step would take too long to time


class PreflightError(ValueError):
    """A run that preflight refuses; the message lists every error with its remedy and how to override it."""


@dataclass(frozen=True)
class Report:
    """What preflight knows about a run.

    Attributes:
        plan: sizes, times and the machine.
        findings: errors first.
        seconds: what preflight took.
    """

    plan: Plan
    findings: tuple[Finding, ...]
    seconds: float

    @property
    def refused_by(self) -> list[Finding]:
        """The errors that the config does not override."""
        return [finding for finding in self.findings if finding.refuses]

    @property
    def allowed(self) -> list[Finding]:
        """The errors that the config overrides."""
        return [finding for finding in self.findings if finding.allowed]

    def raise_if_refused(self) -> None:
        """Raise `PreflightError` when the run may not start."""
        if not self.refused_by:
            return
        lines = [f"preflight refuses this run for {len(self.refused_by)} reason(s):"]
        lines += [f"  {finding.line()}" for finding in self.refused_by]
        if codes := " ".join(finding.code for finding in self.refused_by if finding.overridable):
            lines.append(f"  to run all the same, and have it recorded: --preflight.allow {codes}")
        raise PreflightError("\n".join(lines))

    def text(self) -> str:
        """Everything, for people."""
        facts = "\n".join(f"{name:<11} {text}" for name, text in describe(self.plan).items())
        found = "\n".join(finding.line() for finding in self.findings) or "no findings"
        counts = ", ".join(f"{sum(f.level == level for f in self.findings)} {level}s" for level in LEVELS[:2])
        verdict = "REFUSED" if self.refused_by else "ready"
        return f"{facts}\n\n{found}\n\n{verdict}: {counts}; checked in {self.seconds:.1f} s"

    def values(self) -> dict[str, Any]:
        """Everything as plain values."""
        plan = {name: value for name, value in vars(self.plan).items() if name not in ("config", "machine")}
        for name in ("memory", "speed"):
            plan[name] = None if plan[name] is None else asdict(plan[name])
        if self.plan.memory is not None:
            plan["memory"]["total_gib"] = self.plan.memory.total_gib
        return {
            "ready": not self.refused_by,
            "machine": None if self.plan.machine is None else asdict(self.plan.machine),
            "steps": self.plan.config.train.steps,
            "tokens": num_tokens(self.plan.config),
            **plan,
            "findings": [asdict(finding) for finding in self.findings],
            "seconds": self.seconds,
        }

    def json(self) -> str:
        """Everything, for programs."""
        return json.dumps(self.values(), indent=2)


def examine(config: RunConfig, *, machine: Machine | None = None, world_size: int = 1, thorough: bool = True) -> Report:
    """Check a run before it starts; nothing is written.

    Args:
        config: of the run.
        machine: what the run is meant for; this one unless given.
        world_size: processes of the run.
        thorough: time a few steps, trace the memory of CPU runs too and read the data; `nsa train` leaves out what it
            finds out by itself moments later.
    """
    start_s = time.perf_counter()
    findings: list[Finding] = []
    here = machine or _machine_of(config, findings)
    plan = Plan(config, here, world_size)
    known = KNOWN_VOCAB_SIZES.get(config.data.tokenizer)
    # A run that is meant for another machine may find its tokenizer there only.
    tokenizer = _tokenizer(config, findings) if plan.is_here or known is None else None
    plan = _size(plan, tokenizer.vocab_size if tokenizer else known, findings)
    if plan.num_parameters is not None:
        findings += _leak_findings(plan)
        if here is not None and (thorough or here.kind == "cuda"):
            plan = _add_memory(plan)
        if thorough and here is not None:
            plan = _add_time(plan, findings)
    if thorough and tokenizer is not None and plan.is_here:
        findings += check_data(config, tokenizer, world_size)
    return _report(plan, [*findings, *check(plan)], start_s)


def examine_corpus(report: Report, corpus: Corpus | MixedCorpus, tokenizer: Tokenizer) -> Report:
    """`report` with what is found in data that are open.

    Args:
        report: of the same run, not thorough.
        corpus: the run's documents.
        tokenizer: of the run.

    Raises:
        DataError: no document is held out, or one cannot be read.
    """
    start_s = time.perf_counter()
    findings = [*report.findings, *check_corpus(corpus, tokenizer)]
    return _report(report.plan, findings, start_s - report.seconds)


def examine_resume(config: RunConfig, run: Path, *, world_size: int = 1) -> Report:
    """Check a run before it resumes, in well under a second: the device, the disk, and what else the config tells.

    Args:
        config: of the run, with what is changed.
        run: its folder, whose checkpoints give their room to the coming ones.
        world_size: processes of the run.
    """
    start_s = time.perf_counter()
    findings: list[Finding] = []
    config = config.model_copy(
        update={"run": config.run.model_copy(update={"folder": str(run.parent), "name": run.name})}
    )
    plan = Plan(config, _machine_of(config, findings), world_size)
    tokenizer = _tokenizer(config, findings)
    plan = _size(plan, tokenizer.vocab_size if tokenizer else None, findings)
    if plan.disk_free_gib is not None:
        old = sum(path.stat().st_size for path in (run / "checkpoints").rglob("*") if path.is_file())
        plan = replace(plan, disk_free_gib=plan.disk_free_gib + old / GIB)
    findings += [finding for finding in check(plan) if finding.code != "run-folder-used"]
    return _report(plan, findings, start_s)


def _report(plan: Plan, findings: list[Finding], start_s: float) -> Report:
    """Findings, those that the config overrides marked, errors first."""
    allowed = set(plan.config.preflight.allow)
    findings = [replace(f, allowed=f.code in allowed and f.level == "error") for f in findings]
    findings.sort(key=lambda finding: LEVELS.index(finding.level))
    return Report(plan, tuple(findings), time.perf_counter() - start_s)


def describe(plan: Plan) -> dict[str, str]:
    """What the run needs, as names and texts."""
    config, train = plan.config, plan.config.train
    lines = {
        "run": f"{Path(config.run.folder) / config.run.name}",
        "machine": plan.machine.name if plan.machine else f"{config.run.device}, which is not here",
        "tokens": f"{num_tokens(config):,} in {train.steps:,} steps of {train.batch_tokens:,}; "
        f"{plan.world_size} process(es)",
    }
    if plan.num_parameters is not None:
        lines["parameters"] = f"{plan.num_parameters:,}, {plan.num_non_embedding:,} without embeddings"
    if plan.memory is not None:
        memory = plan.memory
        lines["memory"] = (
            f"{memory.total_gib:.2f} GiB each: weights {memory.weights_gib:.2f}, gradients {memory.gradients_gib:.2f}, "
            f"optimizer {memory.optimizer_gib:.2f}, activations {memory.activations_gib:.2f} (NSA, loss head and 10% "
            f"to spare), libraries {memory.overhead_gib:.2f}; traced with fake tensors"
        )
    if plan.speed is not None and plan.run_s is not None:
        rate = train.batch_tokens / plan.speed.step_s
        lines["time"] = f"{duration(plan.run_s)}; {plan.speed.step_s:.3g} s a step, {rate:,.0f} tokens/s"
        lines["time"] += f" ({plan.speed.how})"
    if plan.fitted_steps is not None:
        lines["budget"] = (
            f"about {plan.fitted_steps:,} of the {train.steps:,} steps fit into train.max_minutes "
            f"{train.max_minutes:g}; the run times them by itself"
        )
    if plan.disk_needed_gib is not None:
        free = "" if plan.disk_free_gib is None else f" of {plan.disk_free_gib:,.1f} GiB free"
        lines["disk"] = f"{plan.disk_needed_gib:.2f} GiB for checkpoints{free}"
    return lines


def num_tokens(config: RunConfig) -> int:
    """Input tokens of the whole run."""
    return config.train.steps * config.train.batch_tokens


def _machine_of(config: RunConfig, findings: list[Finding]) -> Machine | None:
    try:
        return machine_here(choose_device(config.run.device))
    except ValueError as error:
        findings.append(Finding("device-missing", "error", str(error), "or start on a machine that has it"))
        return None


def _tokenizer(config: RunConfig, findings: list[Finding]) -> Tokenizer | None:
    try:
        return load_tokenizer(config.data.tokenizer)
    except DataError as error:
        findings.append(Finding("tokenizer", "error", str(error), "set data.tokenizer"))
        return None


def _size(plan: Plan, vocab_size: int | None, findings: list[Finding]) -> Plan:
    """Parameters and disk."""
    if vocab_size is None:
        return plan
    config = plan.config
    try:
        total, inner = estimate.num_parameters(config, vocab_size)
    except ValueError as error:
        findings.append(Finding("model", "error", str(error), "change the section model"))
        return replace(plan, vocab_size=vocab_size)
    return replace(
        plan,
        vocab_size=vocab_size,
        num_parameters=total,
        num_non_embedding=inner,
        disk_needed_gib=estimate.disk_needed_gib(config, total),
        disk_free_gib=_free_gib(Path(config.run.folder)) if plan.is_here else None,
    )


def _leak_findings(plan: Plan) -> list[Finding]:
    config = plan.config
    device = torch.device("cpu")
    if plan.machine is not None and plan.machine.is_here:
        device = choose_device(config.run.device)
    return [
        Finding("leak", "error", leak, f"probed at {probe_length(config)} tokens; look at masks, windows and shifts")
        for leak in find_leaks(config, device)
    ]


def _add_memory(plan: Plan) -> Plan:
    """The memory of a step, where it can be traced."""
    assert plan.machine is not None
    assert plan.vocab_size is not None
    if plan.config.model.attention_backend == "reference" and "nsa" in plan.config.model.layer_types:
        return plan  # it reads lengths on the host, which fake tensors do not have
    memory = estimate.trace_memory(
        plan.config, vocab_size=plan.vocab_size, world_size=plan.world_size, kind=plan.machine.kind
    )
    return replace(plan, memory=memory)


def _add_time(plan: Plan, findings: list[Finding]) -> Plan:
    """Speed and length of the run; a finding where they cannot be known."""
    speed = _speed(plan)
    if speed is None:
        name = plan.machine.name if plan.machine else "?"
        findings.append(
            Finding("speed-unknown", "info", f"no step can be timed for {name}", "time a short run of the config there")
        )
        return plan
    train = plan.config.train
    num_evaluations = train.steps // plan.config.eval.every_steps + 2
    eval_tokens = plan.config.data.max_eval_tokens or 0
    evaluation_s = eval_tokens / train.batch_tokens * speed.step_s / 3  # a forward pass is a third of a step
    run_s = train.steps * speed.step_s + num_evaluations * evaluation_s
    if train.max_minutes is None or run_s <= 60 * train.max_minutes:
        return replace(plan, speed=speed, run_s=run_s)
    costs = Costs(speed.step_s, evaluation_s, health_s=0.0, samples_s=0.0, build_s=0.0, num_threads=1)
    try:
        steps = fit_steps(plan.config, costs, spent_s=0.0).train.steps
    except ValueError as error:
        findings.append(Finding("budget-too-small", "error", str(error), "or leave train.max_minutes out"))
        return replace(plan, speed=speed, run_s=run_s)
    return replace(plan, speed=speed, run_s=60 * train.max_minutes, fitted_steps=steps)


def _speed(plan: Plan) -> Speed | None:
    config, machine = plan.config, plan.machine
    assert machine is not None
    assert plan.vocab_size is not None
    if config.model.attention_backend == "triton" and not machine.has_triton:
        return None
    flops = estimate.step_flops(config, plan.vocab_size) / plan.world_size
    if machine.is_here and machine.kind == "cuda":
        if plan.memory is None or plan.memory.total_gib > machine.memory_gib:
            return None
        device = choose_device(config.run.device)
        return estimate.measure_speed(
            config, device, vocab_size=plan.vocab_size, limit_s=MEASURE_LIMIT_S, world_size=plan.world_size
        )
    if machine.is_here:
        rate = ASSUMED_CPU_SHARE * estimate.cpu_flops_per_s(config)
        num_passes = config.num_micro_batches / plan.world_size
        if 3 * flops / num_passes / rate < MEASURE_LIMIT_S:
            return estimate.measure_speed(
                config, torch.device("cpu"), vocab_size=plan.vocab_size, limit_s=5, world_size=plan.world_size
            )
        return Speed(flops / rate, f"from {flops:.3g} FLOPs at an assumed {rate / 1e9:.0f} GFLOP/s")
    if machine.bf16_flops_per_s is None:
        return None
    mfu = ASSUMED_MFU * min(1.0, config.model.hidden_size / ASSUMED_WIDTH)
    return Speed(flops / (mfu * machine.bf16_flops_per_s), f"from {flops:.3g} FLOPs at an assumed {mfu:.0%} MFU")


def _free_gib(folder: Path) -> float:
    """Free disk where a folder is or will be."""
    folder = folder.absolute()
    while not folder.is_dir():
        folder = folder.parent
    return shutil.disk_usage(folder).free / GIB
