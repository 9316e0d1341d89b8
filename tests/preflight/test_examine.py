"""Preflight as a whole: its text, its JSON, and whether the run may start."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path

import pytest
import torch

from nsa.config.run import RunConfig
from nsa.data.errors import DataError
from nsa.data.tokenizers import ByteTokenizer
from nsa.machine import machine_named
from nsa.preflight import examine as subject
from nsa.preflight.estimate import Speed
from nsa.preflight.examine import PreflightError, examine

Tiny = Callable[..., RunConfig]


def test_a_sound_run_is_ready_with_all_that_it_needs(tiny: Tiny) -> None:
    report = examine(tiny())
    report.raise_if_refused()
    values = json.loads(report.json())
    assert values["ready"] is True
    assert values["tokens"] == 6 * 512
    assert values["num_parameters"] > values["num_non_embedding"] > 0
    assert values["memory"]["total_gib"] > values["memory"]["activations_gib"] > 0
    assert values["run_s"] >= 6 * values["speed"]["step_s"] > 0
    assert 0 < values["disk_needed_gib"] < values["disk_free_gib"]
    assert [f for f in values["findings"] if f["level"] != "info"] == []
    text = report.text()
    for part in ("3,072 in 6 steps of 512", "activations", "tokens/s", "ready: 0 errors, 0 warnings"):
        assert part in text, part


def test_errors_refuse_the_run_and_say_how_to_override_them(tiny: Tiny) -> None:
    config = tiny(train={"steps": 5000, "checkpoint_every_steps": 0}, optim={"lr": 2.0})
    report = examine(config, thorough=False)
    assert [finding.code for finding in report.refused_by] == ["no-checkpoints", "learning-rate"]
    with pytest.raises(PreflightError) as caught:
        report.raise_if_refused()
    message = str(caught.value)
    assert "refuses this run for 2 reason(s)" in message
    assert "--preflight.allow no-checkpoints learning-rate" in message
    assert "REFUSED: 2 errors" in report.text()


def test_an_override_lets_its_finding_pass_alone_and_is_kept(tiny: Tiny) -> None:
    changes = {"train": {"steps": 5000, "checkpoint_every_steps": 0}, "optim": {"lr": 2.0}}
    one = examine(tiny(preflight={"allow": ["learning-rate"]}, **changes), thorough=False)
    assert [finding.code for finding in one.refused_by] == ["no-checkpoints"]
    assert [finding.code for finding in one.allowed] == ["learning-rate"]
    both = examine(tiny(preflight={"allow": ["learning-rate", "no-checkpoints"]}, **changes), thorough=False)
    both.raise_if_refused()
    assert "allowed no-checkpoints:" in both.text()
    assert [f["allowed"] for f in both.values()["findings"] if f["level"] == "error"] == [True, True]


def test_an_override_is_of_errors_only(tiny: Tiny) -> None:
    report = examine(tiny(optim={"lr": 0.05}, preflight={"allow": ["learning-rate"]}), thorough=False)
    assert [(finding.level, finding.allowed) for finding in report.findings] == [("warning", False)]
    assert report.allowed == []


def test_the_data_of_a_run_elsewhere_are_not_looked_for_here(tiny: Tiny, tmp_path: Path) -> None:
    ByteTokenizer().save(tmp_path / "tokenizer")
    data = {"paths": ["/there/only.txt"], "tokenizer": str(tmp_path / "tokenizer")}
    report = examine(tiny(data=data, train={"precision": "bf16"}), machine=machine_named("h200"))
    assert report.refused_by == []
    assert report.plan.vocab_size is not None
    assert report.plan.num_parameters is not None


def test_what_cannot_be_overridden_is_not_offered(tiny: Tiny, tmp_path: Path) -> None:
    (tmp_path / "runs" / "tiny").mkdir(parents=True)
    with pytest.raises(PreflightError) as caught:
        examine(tiny(), thorough=False).raise_if_refused()
    assert "run-folder-used" in str(caught.value)
    assert "--run.name tiny-2" in str(caught.value)
    assert "preflight.allow" not in str(caught.value)


@pytest.mark.parametrize(
    ("changes", "code"),
    [
        ({"run": {"device": "cuda:99"}}, "device-missing"),
        ({"data": {"tokenizer": "no/such"}}, "tokenizer"),
        ({"model": {"attention_backend": "triton"}, "run": {"device": "cpu"}}, "backend-missing"),
        ({"data": {"paths": ["/nowhere.txt"]}}, "data-source"),
    ],
)
def test_what_cannot_run_at_all_is_found_and_not_run(tiny: Tiny, changes: dict[str, dict], code: str) -> None:
    assert code in [finding.code for finding in examine(tiny(**changes)).refused_by]


def test_a_leak_refuses_the_run(tiny: Tiny, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(subject, "find_leaks", lambda config, device: ["the output at position 3 depends on ..."])
    report = examine(tiny(), thorough=False)
    assert [finding.code for finding in report.refused_by] == ["leak"]


def test_a_run_for_a_gpu_elsewhere_is_judged_by_its_figures(tiny: Tiny) -> None:
    train = {"precision": "bf16"}
    report = examine(tiny(train=train, data={"paths": ["/there/only.txt"]}), machine=machine_named("h200"))
    assert report.refused_by == []
    assert report.plan.disk_free_gib is None
    assert report.plan.speed is not None
    assert "assumed 1% MFU" in report.plan.speed.how
    assert "memory" not in {f.code for f in report.findings}
    rows = {"sequence_length": 8192, "micro_batch_rows": 128, "batch_tokens": 128 * 8192}
    large = tiny(model={"hidden_size": 512, "num_hidden_layers": 4}, train=train | rows)
    assert "memory" in {f.code for f in examine(large, machine=machine_named("4090")).refused_by}


@pytest.mark.parametrize("layer_type", ["nsa", "full_attention", "sliding_attention"])
@pytest.mark.parametrize("backend", ["auto", "torch", "reference"])
def test_every_backend_and_kind_of_layer_can_be_examined(tiny: Tiny, backend: str, layer_type: str) -> None:
    report = examine(tiny(model={"attention_backend": backend, "layer_types": [layer_type]}))
    assert report.refused_by == []
    assert report.plan.speed is not None
    assert (report.plan.memory is None) == (backend == "reference" and layer_type == "nsa")


def test_gpt2_s_vocabulary_is_known_without_its_files(tiny: Tiny) -> None:
    report = examine(tiny(train={"precision": "bf16"}, data={"tokenizer": "gpt2"}), machine=machine_named("h200"))
    assert report.plan.vocab_size == 50257


def test_a_tokenizer_that_is_not_here_hides_nothing_else(tiny: Tiny, monkeypatch: pytest.MonkeyPatch) -> None:
    def absent(name: str) -> None:
        raise DataError("GPT-2's vocabulary is not here")

    monkeypatch.setattr(subject, "load_tokenizer", absent)
    monkeypatch.setattr(subject.estimate, "measure_speed", lambda *a, **k: Speed(1.0, ""))
    report = examine(tiny(data={"tokenizer": "gpt2"}, optim={"lr": 2.0}))
    assert [finding.code for finding in report.refused_by] == ["tokenizer", "learning-rate"]
    assert report.plan.memory is not None


def test_a_step_that_would_take_minutes_is_not_timed(tiny: Tiny, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(subject.estimate, "cpu_flops_per_s", lambda config: 1e6)
    monkeypatch.setattr(subject.estimate, "measure_speed", lambda *a, **k: pytest.fail("timed"))
    speed = examine(tiny()).plan.speed
    assert speed is not None
    assert "FLOPs at an assumed" in speed.how


def test_the_evaluations_are_part_of_the_time(tiny: Tiny, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(subject.estimate, "measure_speed", lambda *a, **k: Speed(3.0, ""))
    # Six steps; evaluations of twice a step's tokens, forward only, at 0, 3 and 6, and one to spare.
    assert examine(tiny(data={"max_eval_tokens": 1024})).plan.run_s == pytest.approx(6 * 3.0 + 4 * 2.0)


def test_what_training_finds_by_itself_is_left_out_when_it_starts(tiny: Tiny, monkeypatch: pytest.MonkeyPatch) -> None:
    for name in ("measure_speed", "trace_memory"):
        monkeypatch.setattr(subject.estimate, name, lambda *a, **k: pytest.fail("measured"))
    monkeypatch.setattr(subject, "check_data", lambda *a, **k: pytest.fail("read"))
    before = torch.get_rng_state()
    assert examine(tiny(), thorough=False).refused_by == []
    assert torch.equal(torch.get_rng_state(), before)


@pytest.mark.parametrize(("step_s", "fitted", "codes"), [(0.5, 104, []), (100.0, None, ["budget-too-small"])])
def test_a_budget_of_minutes_bounds_the_time_and_is_refused_where_hardly_a_step_fits(
    tiny: Tiny, monkeypatch: pytest.MonkeyPatch, step_s: float, fitted: int | None, codes: list[str]
) -> None:
    monkeypatch.setattr(subject, "_speed", lambda plan: Speed(step_s, "told"))
    config = tiny(train={"steps": 10_000, "max_minutes": 1.0}, eval={"every_steps": 5000})
    report = examine(config)
    assert report.plan.fitted_steps == fitted
    assert [finding.code for finding in report.findings if finding.code.startswith("budget")] == codes
    if fitted:
        assert report.plan.run_s == 60
        assert f"about {fitted} of the 10,000 steps fit into train.max_minutes 1" in report.text()
